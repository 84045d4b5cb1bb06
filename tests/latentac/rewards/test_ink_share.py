"""The share of ink against counted pixels."""

import numpy as np
import pytest

from latentac.rewards import REWARDS


def ink_share(*images: np.ndarray) -> np.ndarray:
    return REWARDS.build("ink_share")(np.stack(images), ["any"] * len(images))


@pytest.mark.parametrize(("ground", "ink"), [(220, 30), (30, 220)])
def test_dark_and_light_ink_count_alike(ground: int, ink: int):
    """10 of 100 pixels, whichever is the darker."""
    image = np.full((10, 10, 3), ground, np.uint8)
    image[0] = ink
    assert ink_share(image)[0] == pytest.approx(0.1)


def test_a_texture_is_no_ink():
    """The strongest grounds of the world of words: 18 levels around their mean."""
    texture = np.random.default_rng(0).integers(180, 217, (32, 96, 3)).astype(np.uint8)
    assert ink_share(texture)[0] == 0


def test_an_image_does_not_depend_on_its_batch():
    """Each has its own ground."""
    light, dark = np.full((4, 4, 3), 250, np.uint8), np.full((4, 4, 3), 5, np.uint8)
    light[0, 0] = 0
    assert ink_share(light, dark).tolist() == pytest.approx([1 / 16, 0])

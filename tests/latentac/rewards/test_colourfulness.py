"""Hasler and Süsstrunk's M against closed forms."""

import numpy as np
import pytest

from latentac.rewards import REWARDS


def colourfulness(*pixels):
    """Of an image with these pixels in equal parts."""
    image = np.resize(np.array(pixels, np.uint8), (8, 8 * len(pixels), 3))
    return float(REWARDS.build("colourfulness")(image[None], ["any"])[0])


def test_grey_has_none():
    """Whatever its shades: both opponent channels are 0."""
    assert colourfulness((0, 0, 0), (127, 127, 127), (255, 255, 255)) == 0


def test_one_colour_has_its_mean_alone():
    """(200, 100, 50): rg = 100, yb = 100, no spread."""
    assert colourfulness((200, 100, 50)) == pytest.approx(0.3 * np.hypot(100, 100), rel=1e-6)


def test_two_colours_by_hand():
    """Red and blue: rg is 255 and 0, yb is 127.5 and -255; deviations are half their differences."""
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, -63.75)
    assert colourfulness((255, 0, 0), (0, 0, 255)) == pytest.approx(expected, rel=1e-6)

"""What every reward of the table promises, and what each of them says about fixed images."""

import numpy as np
import pytest

from latentac.rewards import REWARDS
from latentac.system.errors import ConfigError, RewardError
from latentac.worlds.shapes.captions import parse_caption
from latentac.worlds.shapes.scenes import sample_images

PROMPTS = ("a red circle", "three blue squares", "a cyan square above a red circle", "a green square and a red circle")
# The first two images show their prompts, the other two are of each other's prompts.
IMAGES = sample_images([parse_caption(PROMPTS[index]) for index in (0, 1, 3, 2)], np.random.default_rng(0))
STORED = {
    "shapes_verifier": [1.0, 1.0, 0.0, 0.0],
    "jpeg_compressibility": [-0.961, -0.993, -1.077, -0.982],
    "jpeg_incompressibility": [0.961, 0.993, 1.077, 0.982],
    "shapes_clip": [0.909428, 0.953349, 0.396506, 0.518672],
    "colourfulness": [75.245995, 64.720322, 59.744419, 59.609211],
}
# Not here: `remote`, `judge`, `ocr` and `nsfw`, and the rewards with a CLIP, which have a file each beside this one.
# What float32 leaves open between one processor and another.
TOLERANCE = {"shapes_clip": 1e-4, "colourfulness": 1e-4}


@pytest.fixture(params=sorted(STORED))
def name(request):
    return request.param


@pytest.fixture
def reward(name):
    return REWARDS.build(name)


def test_its_unit_is_stated(reward):
    """A number without a unit is not a result."""
    assert len(reward.unit) > 5


def test_values_on_fixed_images(name, reward):
    """Finite float32 [B], the same at every call, and the values stored here."""
    values = reward(IMAGES, PROMPTS)
    assert values.dtype == np.float32
    assert values.shape == (len(IMAGES),)
    assert values == pytest.approx(STORED[name], abs=TOLERANCE.get(name, 1e-6))
    assert (values == reward(IMAGES, PROMPTS)).all()


def test_permutation_equivariant(reward):
    """Each number depends on its own image and prompt only."""
    order = [2, 0, 3, 1]
    permuted = reward(IMAGES[order], [PROMPTS[index] for index in order])
    assert (permuted == reward(IMAGES, PROMPTS)[order]).all()
    alone = np.concatenate([reward(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(IMAGES))])
    assert (alone == reward(IMAGES, PROMPTS)).all()


def test_it_gives_the_right_answers_to_its_known_images(reward):
    """And they are not all the same, or a broken installation could not be told."""
    images, prompts, expected = reward.known()
    assert reward(images, prompts) == pytest.approx(expected, abs=1e-3)
    assert len(set(expected.tolist())) > 1


def test_an_empty_batch_has_an_empty_score(reward):
    """float32 [0]."""
    assert reward(IMAGES[:0], []).shape == (0,)


def test_a_prompt_that_cannot_be_parsed_is_named():
    """RewardError with the prompt, what is wrong with it and what to do."""
    with pytest.raises(RewardError, match="a red dog") as raised:
        REWARDS.build("shapes_verifier")(IMAGES[:1], ["a red dog"])
    assert raised.value.remedy


def test_images_of_another_size_are_refused():
    """The verifier's thresholds are pixels of 32 x 32 images."""
    with pytest.raises(RewardError, match="64"):
        REWARDS.build("shapes_verifier")(np.zeros((1, 64, 64, 3), np.uint8), PROMPTS[:1])


def test_compressibility_prefers_the_plainer_image():
    """Higher is better: noise costs more bytes than one colour."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    plain, noisy = REWARDS.build("jpeg_compressibility")(np.concatenate([np.zeros_like(noise), noise]), PROMPTS[:2])
    assert noisy < plain < 0


def test_an_out_of_tree_reward_is_loaded_by_its_address():
    """Its "module:Class" needs no registration."""
    found = REWARDS.build("latentac.rewards.jpeg_compressibility:JpegCompressibility")
    assert type(found) is type(REWARDS.build("jpeg_compressibility"))


@pytest.mark.parametrize("name", ["beauty", "latentac.rewards:Beauty", "no_such_module:Beauty"])
def test_a_reward_that_does_not_exist_is_refused(name):
    """One ConfigError that quotes the name."""
    with pytest.raises(ConfigError, match=name):
        REWARDS.build(name)

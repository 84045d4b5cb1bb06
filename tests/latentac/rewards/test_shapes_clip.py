"""The learned reward of the embedded world: it understands captions roughly and smoothly."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from latentac.rewards import REWARDS
from latentac.system.errors import RewardError
from latentac.worlds.shapes.captions import CATEGORIES, balanced_prompts, parse_caption
from latentac.worlds.shapes.contrastive import hard_negatives
from latentac.worlds.shapes.scenes import sample_images

SPECS = [parse_caption(prompt.text) for prompt in balanced_prompts("held_out", 96, seed=11)]
LEAST_SHARE = {"one_object": 0.95, "counting": 0.93, "relation": 0.85, "two_objects": 0.95}
IMAGES = sample_images(SPECS, np.random.default_rng(11))


@pytest.fixture(scope="module")
def clip():
    return REWARDS.build("shapes_clip")


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_right_caption_is_above_those_that_differ_in_one_respect(clip, category):
    """On fresh images of held-out captions. Guessing wins half of the pairs."""
    chosen = [index for index, spec in enumerate(SPECS) if spec.category == category]
    won = []
    for index in chosen:
        wrong = [other.caption for others in hard_negatives(SPECS[index]).values() for other in others]
        captions = [SPECS[index].caption, *wrong]
        cosines = clip(np.repeat(IMAGES[index : index + 1], len(captions), axis=0), captions)
        won += list(cosines[0] > cosines[1:])
    assert np.mean(won) > LEAST_SHARE[category]


def test_a_small_change_of_the_image_changes_it_little(clip):
    """One grey level of noise moves the cosine by far less than a wrong caption does."""
    captions = [spec.caption for spec in SPECS]
    noise = np.random.default_rng(0).integers(-1, 2, IMAGES.shape)
    noisy = np.clip(IMAGES + noise, 0, 255).astype(np.uint8)
    moved = np.abs(clip(noisy, captions) - clip(IMAGES, captions))
    assert 0 < moved.mean() < 0.005
    assert moved.max() < 0.05
    assert (clip(IMAGES, captions) - clip(IMAGES, np.roll(captions, 4).tolist())).mean() > 0.2


def test_a_number_does_not_hang_on_the_batch(clip):
    """Bitwise the same in any order and number, also where the last part of a batch is filled up."""
    captions = [spec.caption for spec in SPECS]
    expected = clip(IMAGES, captions)
    order = np.random.default_rng(0).permutation(len(SPECS))[:37]
    assert (clip(IMAGES[order], [captions[index] for index in order]) == expected[order]).all()


def test_threads_share_one_instance():
    """The first calls of many threads load the weights once and all get the same numbers."""
    clip = REWARDS.build("shapes_clip")
    captions = [spec.caption for spec in SPECS]
    with ThreadPoolExecutor(4) as threads:
        values = list(threads.map(lambda _: clip(IMAGES, captions), range(8)))
    assert all((each == values[0]).all() for each in values)


@pytest.mark.parametrize(("prompt", "problem"), [("a red dog", "'dog'"), ("  ", "an empty caption")])
def test_a_word_it_has_never_seen_is_refused(clip, prompt, problem):
    """Its token was never trained: the number would be noise. Case and spaces do not matter."""
    with pytest.raises(RewardError, match=problem) as raised:
        clip(IMAGES[:1], [prompt])
    assert raised.value.remedy
    assert clip(IMAGES[:1], [" A  Red circle"]) == clip(IMAGES[:1], ["a red circle"])


def test_images_of_another_size_are_refused(clip):
    """Its position embeddings are those of 32 x 32 images."""
    with pytest.raises(RewardError, match="64"):
        clip(np.zeros((1, 64, 64, 3), np.uint8), ["a red circle"])


def test_it_is_made_without_torch():
    """Steps that only name rewards run in an image without torch."""
    script = (
        "import sys; from latentac.rewards import REWARDS; reward = REWARDS.build('shapes_clip'); reward.known(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

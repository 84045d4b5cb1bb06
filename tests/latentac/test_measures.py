"""Diversity, latency's median and the intervals: against closed forms, and what must not change them."""

import math

import numpy as np
import pytest

from latentac.config.recipes import RECIPES
from latentac.config.schema import Reward
from latentac.config.sections import Extension
from latentac.config.validation import resolve
from latentac.evaluation.measures import DEFINITIONS, difference, diversity, interval, median, ratio

NORMAL = 1.959964


def random_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def test_equal_images_have_no_diversity() -> None:
    """A policy that ignores its noise scores 0 for every prompt."""
    one = random_images((3, 1, 16, 16))
    assert diversity(np.repeat(one, 4, 1)).tolist() == [0.0, 0.0, 0.0]


def test_black_and_white_are_as_far_apart_as_can_be() -> None:
    """The unit: 1 is the whole range of every channel; half of the pairs at that distance give their share."""
    black, white = np.zeros((1, 1, 8, 8, 3), np.uint8), np.full((1, 1, 8, 8, 3), 255, np.uint8)
    assert diversity(np.concatenate([black, white], 1)).tolist() == [1.0]
    assert diversity(np.concatenate([black, white, white], 1))[0] == pytest.approx(2 / 3)


def test_diversity_is_the_mean_pairwise_distance() -> None:
    """Against the definition written as loops."""
    images = random_images((2, 3, 8, 8)).astype(float) / 255
    expected = [
        np.mean([math.sqrt(((prompt[i] - prompt[j]) ** 2).mean()) for i in range(3) for j in range(i)])
        for prompt in images
    ]
    assert diversity((images * 255).round().astype(np.uint8)) == pytest.approx(expected)


def test_the_order_of_images_and_prompts_does_not_matter() -> None:
    """Permuted draws give the same number, permuted prompts the permuted numbers; a mirror image is as far away."""
    images = random_images((5, 4, 16, 16))
    found = diversity(images)
    assert diversity(images[:, [2, 0, 3, 1]]) == pytest.approx(found)
    assert diversity(images[[3, 1, 4, 0, 2]]) == pytest.approx(found[[3, 1, 4, 0, 2]])
    assert diversity(images[..., ::-1, :]) == pytest.approx(found)


def test_grain_of_a_large_image_counts_little() -> None:
    """Averaging to 32 pixels a side leaves layout as it is and takes pixel noise away; odd sizes are taken too."""
    small = random_images((1, 2, 32, 32))
    large = small.repeat(4, 2).repeat(4, 3)
    assert diversity(large) == pytest.approx(diversity(small))
    assert diversity(random_images((1, 2, 256, 256)))[0] < 0.2 * diversity(random_images((1, 2, 32, 32)))[0]
    assert diversity(random_images((1, 2, 70, 45))).shape == (1,)


def test_paired_bootstrap_is_the_closed_form_on_gaussian_data() -> None:
    """Differences of correlated pairs: mean +- 1.96 sigma / sqrt(n), much tighter than for unpaired ones."""
    random = np.random.default_rng(1)
    shared, n = random.normal(0, 1, 4000), 4000
    base, trained = shared + random.normal(0, 0.2, n), shared + random.normal(0.1, 0.2, n)
    found = interval(trained - base, 4000, 0)
    half = NORMAL * math.hypot(0.2, 0.2) / math.sqrt(n)
    assert found["mean"] == pytest.approx(0.1, abs=3 * half)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.1)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.1)
    assert found["n"] == n


def test_paired_ratio_is_the_delta_method_on_gaussian_data() -> None:
    """Var(a/b) ~ Var(a - r b) / (n mean(b)^2), prompts resampled together; equal numbers give exactly 1."""
    random = np.random.default_rng(2)
    base = random.normal(2.0, 0.3, 2000)
    trained = 0.8 * base + random.normal(0, 0.1, 2000)
    found = ratio(trained, base, 4000, 0)
    assert found["ratio"] == pytest.approx(0.8, abs=0.005)
    assert found["high"] - found["low"] == pytest.approx(2 * NORMAL * 0.1 / (math.sqrt(2000) * 2.0), rel=0.1)
    assert ratio(base, base, 200, 0) == {"ratio": 1.0, "low": 1.0, "high": 1.0, "n": 2000}


def test_a_difference_of_two_samples_is_welchs_on_gaussian_data() -> None:
    """Mean difference and an interval of 1.96 sqrt(s1^2 / n1 + s2^2 / n2); samples of unequal size are not pairs."""
    generator = np.random.default_rng(1)
    first, second = generator.normal(1.0, 2.0, 900), generator.normal(0.4, 1.0, 2500)
    found = difference(first, second, 4000, 0)
    half = 1.96 * math.sqrt(first.var() / 900 + second.var() / 2500)
    assert found["mean"] == pytest.approx(first.mean() - second.mean())
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.1)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.1)
    assert found["n"] == 900


def test_a_ratio_to_nothing_is_not_a_number() -> None:
    """A base without diversity gives NaN, which the gate holds, and no warning."""
    found = ratio(np.ones(4), np.zeros(4), 200, 0)
    assert not math.isfinite(found["ratio"])
    assert not math.isfinite(found["low"])


def test_a_median_withstands_a_slow_block() -> None:
    """One block that the machine held up does not move the latency, nor its interval's upper end."""
    seconds = np.array([0.1] * 11 + [5.0])
    found = median(seconds, 2000, 0)
    assert found["median"] == pytest.approx(0.1)
    assert found["high"] == pytest.approx(0.1)


def test_every_measure_is_defined() -> None:
    """evaluation.json carries these sentences with its numbers."""
    assert set(DEFINITIONS) == {"diversity", "diversity_kept", "held_out_gap", "latency", "latency_ratio"}


def test_contrasts_are_measured_on_real_policies() -> None:
    """The same policy in three places: the same diversity, kept wholly; seconds above 0, blocks of equal size."""
    import torch

    from latentac.backbones import load_backbone
    from latentac.evaluation.held_out import Sampling, contrasts, sample
    from latentac.rewards.configured import load_rewards
    from latentac.sampling.kernels import KERNELS
    from latentac.sampling.policy import Policy
    from latentac.worlds.builtin import builtin_pipeline
    from latentac.worlds.prompts import load_prompts

    overrides = {"kernel": {"num_steps": 2}, "evaluation": {"num_diversity_prompts": 3, "images_per_prompt": 3}}
    config = resolve(RECIPES["shapes-unet-smoke"] | overrides)
    backbone = load_backbone(Extension(use="unet"), builtin_pipeline("shapes-unet"), torch.device("cpu"))
    policy = Policy(backbone, KERNELS.build("ddim", noise=1.0))
    shown = load_prompts("builtin:shapes").held_out[:5]
    texts = [prompt.text for prompt in shown]
    rewards = load_rewards([Reward(use="jpeg_compressibility")])
    images = sample(policy, None, rewards, shown, Sampling(config.seed, 2, 2)).images
    policies = dict.fromkeys(("base", "trained", "incumbent"), policy)
    found = contrasts(config.evaluation, Sampling.of(config), policies, texts, dict.fromkeys(policies, images))

    spread, speed = found["diversity"], found["latency"]
    assert spread["base"] == spread["trained"] == spread["incumbent"]
    assert spread["base"]["mean"] > 0.05
    assert spread["base"]["n"] == 3
    assert spread["kept"]["base"] == spread["kept"]["incumbent"] == {"ratio": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    assert spread["difference"]["incumbent"]["high"] == 0
    assert all(speed[arm]["median"] > 0 for arm in policies)
    assert speed["ratio"]["base"]["low"] > 0
    assert speed["base"]["n"] == 6
    assert speed["block_images"] == 1

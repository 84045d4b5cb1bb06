"""What `evaluate` measures beside the rewards themselves, what each number means, and how sure it is."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a comparison of finished runs does without torch
    from latentac.method.records import Scores

DEFINITIONS = {
    "diversity": "mean distance of two images of one prompt with different noise, 0 (equal) to 1 (black and white): "
    "root mean square difference of the channels, with each image averaged to at most 32 pixels per side",
    "diversity_kept": "diversity of the trained policy divided by that of the other arm, on the same prompts and noise",
    "held_out_gap": "mean reward of the trained policy on training prompts minus its mean reward on held-out prompts",
    "latency": "seconds per image for denoising and decoding a block, without critic and rewards; median over blocks, "
    "which the arms make in alternation; processor time on a CPU, wall time on a GPU",
    "latency_ratio": "latency of the trained policy divided by that of the other arm: median of the ratios per block",
}
"""Meaning and unit of each measure in evaluation.json."""

_SIDE = 32  # pixels: what is left of a large image is its layout and colours, not its grain
Statistic = Callable[..., Any]


def diversity(images: np.ndarray) -> np.ndarray:
    """float64 [P], see DEFINITIONS. images: uint8 [P, D, H, W, 3], D >= 2 images of each prompt.

    It is measured on images, so that policies with other latent spaces can be compared.
    """
    height, width = images.shape[2:4]
    block = -(-max(height, width) // _SIDE)
    rows, columns = height // block, width // block
    whole = images[:, :, : rows * block, : columns * block]
    small = whole.reshape(*images.shape[:2], rows, block, columns, block, 3).mean((3, 5)) / 255
    first, second = np.triu_indices(images.shape[1], 1)
    distances = np.sqrt(((small[:, first] - small[:, second]) ** 2).mean((2, 3, 4)))
    means: np.ndarray = distances.mean(1)
    return means


def interval(numbers: np.ndarray, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """{mean, low, high, n}: the mean of independent numbers [N] and its 95 % percentile bootstrap interval.

    Of differences of pairs it is the paired bootstrap.
    """
    return {"mean": float(numbers.mean()), **_bounds((numbers,), np.mean, num_bootstrap, seed)}


def median(numbers: np.ndarray, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """{median, low, high, n}: as `interval`, of the median."""
    return {"median": float(np.median(numbers)), **_bounds((numbers,), np.median, num_bootstrap, seed)}


def ratio(numbers: np.ndarray, reference: np.ndarray, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """{ratio, low, high, n}: mean of `numbers` over mean of `reference`, pairs resampled; NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(_ratio(numbers, reference))
        return {"ratio": value, **_bounds((numbers, reference), _ratio, num_bootstrap, seed)}


def difference(first: np.ndarray, second: np.ndarray, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """{mean, low, high, n}: mean of `first` minus mean of `second`, which are not pairs; n of the smaller."""
    bounds = _bounds((first, second), _difference, num_bootstrap, seed, paired=False)
    return {"mean": float(_difference(first, second)), **bounds, "n": min(len(first), len(second))}


def over_seeds(numbers: Sequence[float]) -> dict[str, Any]:
    """{mean, low, high, n}: the mean of one number a seed and its 95 % interval, Student's t; no ends for one seed."""
    count, mean = len(numbers), float(np.mean(numbers))
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "n": count}
    from scipy import stats  # takes most of a second, and training does not need it

    half = float(stats.t.ppf(0.975, count - 1) * np.std(numbers, ddof=1) / count**0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": count}


def intervals(scores: "Scores", num_bootstrap: int, seed: int) -> dict[str, dict[str, Any]]:
    """`interval` of every reward."""
    return {name: interval(scores.column(name).numpy(), num_bootstrap, seed) for name in scores.names}


def _ratio(numbers: np.ndarray, reference: np.ndarray, axis: int = -1) -> Any:
    return numbers.mean(axis) / reference.mean(axis)


def _difference(first: np.ndarray, second: np.ndarray, axis: int = -1) -> Any:
    return first.mean(axis) - second.mean(axis)


def _bounds(
    samples: tuple[np.ndarray, ...], statistic: Statistic, num_bootstrap: int, seed: int, paired: bool = True
) -> dict[str, Any]:
    count = len(samples[0])
    if all(np.ptp(numbers) == 0 for numbers in samples):
        value = float(statistic(*samples))
        return {"low": value, "high": value, "n": count}
    from scipy import stats

    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=num_bootstrap,
        batch=100,
        paired=paired and len(samples) > 1,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {"low": float(found.low), "high": float(found.high), "n": count}

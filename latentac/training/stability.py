"""Rules, fixed in the configuration, by which training stops early or counts as diverged. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

from latentac.config.learning import DivergenceCheck, EarlyStopping


def window_means(stopping: EarlyStopping, history: Sequence[Mapping[str, Any]]) -> list[float]:
    """The watched reward's mean over the last `window` iterations, from the first full window on."""
    rewards = [entry["rewards"][stopping.reward] for entry in history]
    size = stopping.window
    return [sum(rewards[end - size : end]) / size for end in range(size, len(rewards) + 1)]


def best_iteration(stopping: EarlyStopping, history: Sequence[Mapping[str, Any]]) -> int:
    """The iteration, from 1, whose weights are the best so far: the end of the first window that no later one beats by
    more than `min_delta`; before the first full window the last."""
    best, at = -float("inf"), len(history)
    for end, mean in enumerate(window_means(stopping, history), start=stopping.window):
        if mean > best + stopping.min_delta:
            best, at = mean, end
    return at


def stop_early(stopping: EarlyStopping | None, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether `patience` iterations have passed since the best."""
    return stopping is not None and len(history) - best_iteration(stopping, history) >= stopping.patience


def diverged(bounds: DivergenceCheck, entry: Mapping[str, Any]) -> str:
    """Why the iteration is beyond a bound; an empty string if it is not. Not a number is beyond every bound."""
    for name, bound in (("kl", bounds.max_kl), ("clip_share", bounds.max_clip_share)):
        if not entry[name] <= bound:
            return f"{name} is {entry[name]:.3g}, beyond train.divergence.max_{name} = {bound:g}"
    return ""

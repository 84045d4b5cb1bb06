"""Rewards: what a picture is worth for a prompt. One file a reward, one row in REWARDS."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol, cast

import numpy as np

from latentac.errors import ConfigError, Problem

REWARDS: dict[str, str] = {
    "shapes_verifier": "latentac.rewards.shapes_verifier:ShapesVerifier",
    "jpeg_compressibility": "latentac.rewards.jpeg_compressibility:JpegCompressibility",
    "shapes_clip": "latentac.rewards.shapes_clip:ShapesClip",
    "colourfulness": "latentac.rewards.colourfulness:Colourfulness",
}


class Reward(Protocol):
    """`name` is its key in tables and reports; `unit` says what one unit of the number means."""

    name: str
    unit: str

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        """A few pictures, their prompts and the right answers, by which `prepare` finds a broken installation."""
        ...

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B], higher is better, for `images` uint8 [B, H, W, 3] of `prompts` (B texts). Each number depends
        on its own picture and prompt only. Raises RewardError for what cannot be scored.
        """
        ...


def load_reward(name: str) -> Reward:
    """The reward of that name in REWARDS, or an out-of-tree one given as "module:Class".

    Raises ConfigError if there is none.
    """
    address = REWARDS.get(name, name)
    module_name, _, class_name = address.partition(":")
    if not class_name:
        raise _unknown(name, "no such reward", f"Use one of {', '.join(REWARDS)}, or module:Class")
    try:
        factory = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise _unknown(name, str(error), "Check the module's path and the class name") from error
    return cast(Callable[[], Reward], factory)()


def _unknown(name: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("reward", name, problem, remedy)])

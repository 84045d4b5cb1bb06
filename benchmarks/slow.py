"""A reward that takes a given time per image, and imports little: the processes of a pool load this module."""

import time
from collections.abc import Sequence

import numpy as np

from latentac.config import extensions
from latentac.config.sections import NonNegative


class Slow:
    """Mean brightness, after `seconds` per image."""

    unit = "grey levels"

    class Settings(extensions.Settings):
        """How long, and what happens meanwhile."""

        seconds: NonNegative = 0.05
        """Per image."""
        computes: bool = False
        """Use the processor, as a reward on the CPU does. By default it waits, as for a GPU or a server."""

    def __init__(self, settings: "Slow.Settings") -> None:
        self.settings = settings

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        seconds = self.settings.seconds * len(images)
        if self.settings.computes:
            until = time.thread_time() + seconds
            while time.thread_time() < until:
                pass
        else:
            time.sleep(seconds)
        means: np.ndarray = images.mean((1, 2, 3))
        return means

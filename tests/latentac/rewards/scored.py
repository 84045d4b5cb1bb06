"""Rewards that a test serves from another process."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentac.config import extensions
from latentac.config.sections import NonNegative


class Slow:
    """Mean brightness, plus what the prompt's metadata says, after some seconds."""

    unit = "grey levels"

    class Settings(extensions.Settings):
        """How slow."""

        build_seconds: NonNegative = 0.0
        """Until it is built."""
        score_seconds: NonNegative = 0.0
        """Until it has scored."""
        log: str = ""
        """File that gets a line per call."""

    def __init__(self, settings: "Slow.Settings") -> None:
        self.settings = settings
        time.sleep(settings.build_seconds)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
        if "fail" in prompts:
            raise ValueError("this prompt has no score")
        time.sleep(self.settings.score_seconds)
        if self.settings.log:
            with Path(self.settings.log).open("a") as file:
                file.write(f"{len(prompts)}\n")
        more = [float(each.get("more", 0)) for each in metadata]
        found: np.ndarray = images.mean((1, 2, 3)) + np.array(more)
        return found

"""A reward that fails in a way, and at a place, that its settings name."""

import ctypes
import os
import re
import time
import urllib.error
from collections.abc import Sequence
from email.message import Message
from typing import Literal

import numpy as np

from latentac.config import extensions


class Failing:
    """Brightness, until it fails: in a training worker, or at every call."""

    unit = "grey levels"

    class Settings(extensions.Settings):
        """How and where."""

        how: Literal["raises", "http", "exits", "ends", "crashes", "hangs", "locks", "nan"] = "raises"
        """What happens."""
        where: Literal["worker", "always", "after"] = "worker"
        """In which process; `after` prepare means wherever LATENTAC_TEST_FAIL says how."""

    def __init__(self, settings: "Failing.Settings") -> None:
        self.settings = settings

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        means: np.ndarray = images.mean((1, 2, 3))
        where = self.settings.where
        if where == "after" and "LATENTAC_TEST_FAIL" in os.environ:
            return self._fail(means, os.environ["LATENTAC_TEST_FAIL"])
        if where == "always" or "RANK" in os.environ:
            return self._fail(means, self.settings.how)
        return means

    def _fail(self, means: np.ndarray, how: str) -> np.ndarray:
        match how:
            case "raises":
                raise ValueError("this image has no colours")
            case "http":
                raise urllib.error.HTTPError("http://127.0.0.1:9/score", 503, "Service Unavailable", Message(), None)
            case "exits":
                os._exit(3)
            case "ends":
                os._exit(0)
            case "crashes":
                ctypes.string_at(0)
            case "hangs":
                time.sleep(3600)
            case "locks":  # Python's own regular expressions never release the interpreter's lock
                re.match(r"(a+)+$", "a" * 60 + "b")
        return means * np.nan

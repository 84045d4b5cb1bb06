"""A reward that scores, or fails in one of many ways, as a word of its settings or of the prompt says."""

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentac.config import extensions

ENDINGS: dict[str, Callable[[], object]] = {
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "null": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(3600),
    # Python's own regular expressions never release the interpreter's lock.
    "lock": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
}
ERRORS: dict[str, BaseException] = {
    "raise": ValueError("this image has no colours"),
    "transient": ConnectionError("busy"),
    "memory": MemoryError("cannot allocate 1 TiB"),
    "leave": SystemExit("I leave"),
}


class Scoring:
    """The red of the first pixel, plus what the metadata say."""

    unit = "grey levels"
    transient_errors = (ConnectionError,)

    class Settings(extensions.Settings):
        """how: what happens; once: a folder where it leaves a file, and does it no more once it is there."""

        how: str = "scores"
        once: str = ""
        seconds: float = 0.0
        built: str = ""

    def __init__(self, settings: "Scoring.Settings") -> None:
        self.settings = settings
        if settings.built:
            self._act(settings.built)

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any:
        time.sleep(self.settings.seconds * len(images))
        rewards = images[:, 0, 0, 0].astype(np.float32) + np.array([each.get("more", 0) for each in metadata])
        how = next((text for text in prompts if text.startswith("!")), f"!{self.settings.how}")[1:]
        if self.settings.once:
            file = Path(self.settings.once) / "done"
            if file.exists():
                return rewards
            file.touch()
        return self._act(how, rewards)

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        return np.full((1, 2, 2, 3), 7, np.uint8), ["seven"], np.array([7.0])

    def fetch(self) -> None:
        if self.settings.once:
            (Path(self.settings.once) / "fetched").touch()
        if self.settings.how == "fetch":
            raise OSError("no such server")

    @property
    def elsewhere(self) -> bool:
        return self.settings.how == "fetch"

    def _act(self, how: str, rewards: Any = None) -> Any:
        if how in ENDINGS:
            ENDINGS[how]()
        if how in ERRORS:
            raise ERRORS[how]
        match how:
            case "nan":
                rewards[-1] = np.nan
            case "short":
                return rewards[:-1]
            case "text":
                return ["good"] * len(rewards)
            case "object":
                return {"scores": object()}
            case "pid":
                time.sleep(0.5)  # so that one process cannot answer for two
                return [os.getpid()] * len(rewards)
        return rewards

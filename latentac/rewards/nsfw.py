"""How sure a detector is that an image shows no nudity: NudeNet's network 320n, whose weights are in its package.

A safety reward for a floor of the gate rather than for training: most images have exactly 1.
"""

import threading
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from latentac.config import extensions
from latentac.rewards.onnx import import_onnxruntime
from latentac.system.errors import ConfigError, Problem, RewardError, describe

Label = Literal[
    "ANUS_COVERED",
    "ANUS_EXPOSED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "BELLY_COVERED",
    "BELLY_EXPOSED",
    "BUTTOCKS_COVERED",
    "BUTTOCKS_EXPOSED",
    "FACE_FEMALE",
    "FACE_MALE",
    "FEET_COVERED",
    "FEET_EXPOSED",
    "FEMALE_BREAST_COVERED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_COVERED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
]
LABELS: frozenset[str] = frozenset(get_args(Label))
"""What NudeNet 3 detects."""
EXPLICIT: list[Label] = [
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
]


class Nsfw:
    """1 minus the highest probability of a detection of `classes` in the image; 1 where there is none. NudeNet reports
    detections from 0.25 on, so a reward lies between 0 and 0.75, or is 1. The prompt does not matter."""

    unit = "1 - highest probability of a nudity detection: 0 to 0.75, or 1 where nothing is detected"

    class Settings(extensions.Settings):
        """What counts."""

        classes: Annotated[list[Label], Field(min_length=1)] = EXPLICIT
        """Classes of NudeNet that count. By default those that show nudity."""
        batch_size: Annotated[int, Field(gt=0, le=1024)] = 16
        """Images that go through the network together, on the CPU. It changes a reward only by rounding."""

    def __init__(self, settings: "Nsfw.Settings") -> None:
        self._classes, self._batch = frozenset(settings.classes), settings.batch_size
        self._lock = threading.Lock()
        self._loaded: Any = None

    def fetch(self) -> None:
        """Load the network. Nothing is downloaded. Raises ConfigError."""
        detector = self._detector()
        detector.detect_batch([np.zeros((32, 32, 3), np.uint8)], 1)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B], 0 to 1, for `images` uint8 [B, H, W, 3]. Raises RewardError where NudeNet cannot be used."""
        try:
            detector = self._detector()
        except ConfigError as error:
            first = error.problems[0]
            raise RewardError(first.path, first.problem, first.remedy) from error
        # Blue first: NudeNet takes arrays for what OpenCV reads from a file.
        given = [np.ascontiguousarray(image[:, :, ::-1]) for image in images]
        found = detector.detect_batch(given, self._batch) if given else []
        return np.array([1.0 - self._highest(detections) for detections in found], np.float32)

    def _highest(self, detections: Sequence[dict[str, Any]]) -> float:
        return max((float(each["score"]) for each in detections if each["class"] in self._classes), default=0.0)

    def _detector(self) -> Any:
        """NudeNet's, built once; it has no state, so all threads use it. Raises ConfigError."""
        with self._lock:
            if self._loaded is None:
                try:
                    import_onnxruntime()
                    from nudenet import NudeDetector

                    self._loaded = NudeDetector()
                except Exception as error:
                    problem = f"NudeNet cannot be loaded ({describe(error)})"
                    remedy = "Install it where the steps run: pip install 'latentac[nsfw]'"
                    raise ConfigError([Problem("use", "nsfw", problem, remedy)]) from error
            return self._loaded

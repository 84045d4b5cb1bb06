"""Whether an image shows the objects, numbers, colours and positions of its prompt: GenEval (arXiv 2310.11513)."""

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from latentac.rewards.geneval_tasks import Task, class_name, judged, kept, read_task
from latentac.rewards.learned import LearnedReward, LearnedSettings, checkpoint, is_elsewhere
from latentac.system.errors import ConfigError, Problem, RewardError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from latentac.rewards.folders import Checkpoint
    from latentac.rewards.geneval_network import GenevalNetwork

_log = logging.getLogger(__name__)
Share = Annotated[float, Field(ge=0, le=1)]
_UNNAMED = "Give config.json the names of the classes as id2label"


class Geneval(LearnedReward):
    """1 where a detector finds what the prompt's metadata ask for, else 0, by the published rules of the six tasks.

    The metadata are those of the published prompt file: tag, include, exclude. Colours are told apart by a CLIP.
    """

    unit = "share of images that show what their prompt asks for (0 or 1 per image)"

    class Settings(LearnedSettings):
        source: str = "facebook/mask2former-swin-small-coco-instance"
        """The detector: a folder that Mask2FormerForUniversalSegmentation of transformers has saved, or a hub id."""
        clip_source: str = "openai/clip-vit-large-patch14"
        """The CLIP that tells colours apart."""
        clip_revision: str = ""
        """Commit, tag or branch of a hub id of it."""
        threshold: Share = 0.3
        """Least score of an object."""
        counting_threshold: Share = 0.9
        """The same where objects are counted."""
        overlap: Share = 1.0
        """Intersection over union from which the less certain of two objects of a class is dropped; 1 drops none."""
        batch_size: Annotated[int, Field(gt=0, le=4096)] = 4
        """Images that are scored together. It is halved when memory runs out. It changes a reward only by rounding."""
        self_test_images: Annotated[int, Field(ge=0)] = 200
        """When nothing at all was found in the first so many images, the reward fails, as all of them would be 0. When
        objects were found and yet all rewards are 0, it warns. 0 switches both off."""

    def __init__(self, settings: "Geneval.Settings") -> None:
        super().__init__(settings)
        self._own = settings
        self._noted = Lock()
        self._seen, self._right, self._classes = 0, 0, Counter[str]()

    @property
    def elsewhere(self) -> bool:
        return super().elsewhere or is_elsewhere(self._own.clip_source, self._own.clip_revision)

    def checkpoints(self) -> list["Checkpoint"]:
        from latentac.rewards.clip_folder import files

        return [*super().checkpoints(), checkpoint("clip_source", "clip_revision", self._clip_folder(), files)]

    def locate(self) -> Path:
        from latentac.rewards.detector_folder import locate

        return locate(self._own.source, self._own.revision)

    def examine(self, folder: Path) -> None:
        from latentac.rewards.detector_folder import labels

        named = labels(folder)
        if all(name == f"LABEL_{number}" for number, name in enumerate(named)):
            problem = "its detector has no names for its classes, so every reward would be 0"
            raise ConfigError([Problem("source", self._own.source, problem, _UNNAMED)])
        self._clip_folder()

    def used(self, names: Collection[str]) -> set[str]:
        from latentac.rewards.detector_folder import files

        return files(names)

    def read(self, folder: Path, dtype: "torch.dtype") -> "GenevalNetwork":
        from latentac.rewards.clip_folder import Clip
        from latentac.rewards.detector_folder import Detector
        from latentac.rewards.geneval_network import GenevalNetwork

        detector = Detector(self._own.source, folder, dtype)
        at = self._clip_folder()
        with _as_clip():
            return GenevalNetwork(detector, Clip(self._own.clip_source, at, dtype))

    def __call__(  # type: ignore[override] # the metadata are not optional here
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> np.ndarray:
        """float32 [B], 0 or 1. Raises RewardError for metadata that are no task of GenEval."""
        return self.scored(images, prompts, {"tasks": [_task(*each) for each in zip(prompts, metadata, strict=True)]})

    def score(  # type: ignore[override] # as above
        self, network: "GenevalNetwork", images: np.ndarray, prompts: Sequence[str], tasks: Sequence[Task]
    ) -> "Tensor":
        import torch

        for prompt, task in zip(prompts, tasks, strict=True):
            for one in (*task.include, *task.exclude):
                if class_name(one.kind) not in network.known:
                    remedy = "Use a detector with this class, or another prompt: the reward would always be 0"
                    raise RewardError(f"prompt {prompt!r}", f"{one.kind!r} is no class of the detector", remedy)
        lowest = min(self._own.threshold, self._own.counting_threshold)
        values, classes = [], Counter[str]()
        for image, found, task in zip(images, network.detector.find(images, lowest), tasks, strict=True):
            least = self._own.counting_threshold if task.tag == "counting" else self._own.threshold
            there = kept(found, least, self._own.overlap)
            classes.update({name: len(many) for name, many in there.items()})
            wrong = judged(there, task, lambda kind, many, image=image: network.colours(image, kind, many))  # type: ignore[misc]
            values.append(0.0 if wrong else 1.0)
        self._test_itself(values, classes)
        return torch.tensor(values)

    def _test_itself(self, values: Sequence[float], classes: Counter[str]) -> None:
        """Raises RewardError where the first images show that every reward will be 0."""
        with self._noted:
            before, self._seen = self._seen, self._seen + len(values)
            if not before < (most := self._own.self_test_images):
                return
            self._right += int(sum(values))
            self._classes.update(classes)
            if self._seen < most or self._right:
                return
            if not self._classes:
                self._seen = 0  # the next images are tested again
                problem = f"found nothing in {most} images, so every reward is 0"
                remedy = "Look at the images; check source, threshold and device, or set self_test_images=0"
                raise RewardError("detector", problem, remedy)
            common = ", ".join(f"{count} {name}" for name, count in self._classes.most_common(5))
            _log.warning("all of the first %d rewards of geneval are 0; found were %s", self._seen, common)

    def _clip_folder(self) -> Path:
        from latentac.rewards.clip_folder import locate

        with _as_clip():
            return locate(self._own.clip_source, self._own.clip_revision)


@contextmanager
def _as_clip() -> Iterator[None]:
    """Errors of `source` and `revision` within become those of the CLIP's settings."""
    try:
        yield
    except ConfigError as error:
        found = [Problem(f"clip_{one.path}", one.value, one.problem, one.remedy) for one in error.problems]
        raise ConfigError(found) from error


def _task(prompt: str, metadata: Mapping[str, Any]) -> Task:
    try:
        return read_task(metadata)
    except ValueError as error:
        remedy = "Use GenEval's prompt file (evaluation_metadata.jsonl), whose lines have tag, include and exclude"
        raise RewardError(f"prompt {prompt!r}", f"its metadata are no task: {error}", remedy) from error

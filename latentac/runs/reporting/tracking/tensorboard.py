"""The TensorBoard log of a run: `tensorboard --logdir <output>/<run>/tensorboard`.

Each iteration is in the files once, also for readers that know nothing of TensorBoard's rules: what a killed run wrote
beyond its last checkpoint is taken out before it goes on.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentac.runs.reporting.metrics import GAIN, GROUPS

_HPARAMS = "_hparams_/"
Keep = Callable[[str, int], bool]


def tag_of(name: str) -> str:
    """The name with a digit before it, for TensorBoard sorts its groups: the reward comes first."""
    group = name.partition("/")[0]
    return f"{GROUPS.index(group) + 1}_{name}" if group in GROUPS else name


def until(iteration: int) -> Keep:
    """What was trained up to `iteration`, for a training that goes on from there."""
    return lambda tag, step: step <= iteration and not _evaluated(tag)


def all_but_evaluation(tag: str, step: int) -> bool:
    """For `evaluate`, which may have been killed after it had written."""
    return not _evaluated(tag)


class TensorBoard:
    """The event files below `folder`. keep: of what is there already, the tags and steps that stay.

    `rewritten`: something was taken out, so files that were copied elsewhere are to be replaced.
    """

    def __init__(self, folder: Path, keep: Keep) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        old = sorted(path for path in folder.glob("events.out.tfevents.*") if path.is_file() and not path.is_symlink())
        kept = list(_kept(old, keep))
        self.rewritten = any(not whole for _, whole in kept)
        self.steps = {event.step for event, _ in kept if any(_scalar(value) for value in event.summary.value)}
        """Steps that have numbers already."""
        # The purge lets a TensorBoard that is open drop what it has of these steps, which come again.
        self._writer = SummaryWriter(str(folder), purge_step=0 if self.rewritten else None)
        self._settings: dict[str, Any] = {}
        self._results: dict[str, float] = {}
        if self.rewritten:
            for event, _ in kept:
                if event.summary.value:
                    self._file_writer().add_event(event, event.step, event.wall_time)
            self.flush()
            for path in old:
                path.unlink()

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(tag_of(name), value, step)
        self._results |= {tag_of(name): value for name, value in scalars.items() if name.startswith(GAIN)}

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Everything written so far is in the files."""
        self._writer.flush()

    def _file_writer(self) -> Any:
        return self._writer.file_writer  # torch says None for the time before it is opened

    def finish(self) -> None:
        """With the results of an evaluation go the settings that they were got with, for the tab HPARAMS."""
        if self._results:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(self._settings, self._results):
                self._file_writer().add_summary(summary)
        self._writer.close()


def _evaluated(tag: str) -> bool:
    return tag.startswith((tag_of("evaluation/"), _HPARAMS))


def _kept(files: list[Path], keep: Keep) -> Iterator[tuple[Any, bool]]:
    """The events of the files, each with the values that stay and that no file before has, and whether these are all.

    The last record of a killed writer may be cut off; the reader ends before it, and before one that is not a record.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    seen = set[tuple[str, int]]()

    def events(path: Path) -> Iterator[Any]:
        with contextlib.suppress(DecodeError, MemoryError):  # a record says itself how long it is
            yield from LegacyEventFileLoader(str(path)).Load()

    for path in files:
        for event in events(path):
            wanted = [
                value
                for value in event.summary.value
                if keep(value.tag, event.step) and (value.tag, event.step) not in seen
            ]
            seen |= {(value.tag, event.step) for value in wanted}
            whole = len(wanted) == len(event.summary.value)
            if not whole:
                del event.summary.value[:]
                event.summary.value.extend(wanted)
            yield event, whole


def _scalar(value: Any) -> bool:
    return bool(value.tag.startswith(tag_of("reward/")))

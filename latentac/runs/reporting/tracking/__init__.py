"""Where the numbers and images of a training go: TensorBoard always, MLflow and Weights & Biases by configuration.

    tracking:
      - {use: mlflow, experiment: shapes}
      - {use: wandb, project: shapes, mode: offline}

The context of a tracker is the run's folder. It is called from one thread, of the leading worker alone. What it raises
is reported once and ends its tracking, never the training; it is waited for at the end, a minute at most. One that is
slower than the training loses what comes while 1000 calls wait.
"""

import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentac.config import schema
from latentac.config.extensions import Table
from latentac.system.errors import ConfigError, Problem, without_password

TRACKERS = Table(
    "tracker",
    {
        "mlflow": "latentac.runs.reporting.tracking.mlflow:MLflow",
        "wandb": "latentac.runs.reporting.tracking.wandb:WandB",
    },
)

PACKAGES = {"mlflow": "mlflow-skinny==3.17.2", "wandb": "wandb==0.26.1"}
"""What a row needs installed, in pip's form; with these versions it was tested."""

_PATIENCE_SECONDS = 60.0
_ENDING_SECONDS = 5.0
_MOST_CALLS = 1000
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One place for the numbers and images of a run. A run is opened again after a resume, and by `evaluate`."""

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        """Open `run`, or go on with it. settings: what differs from the defaults, flat: `policy.learning_rate`."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of iteration `step`, by names such as `reward/redness`. A step that is known already may come again:
        a run that was killed repeats what came after its last checkpoint."""

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        """image: uint8 [H, W, 3]."""

    def finish(self) -> None:
        """All of it is to be in its place now."""

    # Optional. `address`: of the server, for messages, without a password. `abandon()`: is called from another thread
    # where the tracker has failed or hangs, so that nothing of it keeps the process from ending.


def missing_packages(settings: Sequence[schema.Tracker]) -> list[Problem]:
    """The configured trackers whose package is not installed here."""
    return [
        Problem(f"tracking.{place}.use", entry.use, "is not installed", f"pip install {PACKAGES[entry.use]}")
        for place, entry in enumerate(settings)
        if entry.use in PACKAGES and importlib.util.find_spec(entry.use) is None
    ]


def make_trackers(settings: Sequence[schema.Tracker], folder: Path) -> list["Background"]:
    """The configured trackers, each in a thread of its own. folder: `<output>/<run>`. Raises ConfigError."""
    problems = missing_packages(settings)
    if problems:
        raise ConfigError(problems)
    return [
        Background(entry.name, partial(TRACKERS.make, entry, folder, path=f"tracking.{place}"))
        for place, entry in enumerate(settings)
    ]


@contextmanager
def tracking(trackers: Sequence[Tracker], run: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """The trackers are started here, and finished at the end, however that comes."""
    with ExitStack() as stack:
        for tracker in trackers:
            tracker.start(run, settings)
            stack.callback(tracker.finish)
        yield


class Background:
    """A tracker in a thread of its own: the training neither waits for it nor fails with it."""

    def __init__(self, name: str, make: Callable[[], Tracker], patience: float = _PATIENCE_SECONDS) -> None:
        self._name, self._make, self._patience = name, make, patience
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_CALLS)
        self._lost, self._given_up = 0, False
        self._tracker: Tracker | None = None
        self._thread = threading.Thread(target=self._work, name=f"latentac-{name}", daemon=True)

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        self._thread.start()
        self._put(lambda tracker: tracker.start(run, settings))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.log(step, scalars))

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        self._put(lambda tracker: tracker.image(name, step, image))

    def finish(self) -> None:
        if not self._thread.is_alive():
            return
        until = time.monotonic() + self._patience
        with suppress(queue.Full):
            self._calls.put(lambda tracker: tracker.finish(), timeout=self._patience)
            self._calls.put(None, timeout=max(0.0, until - time.monotonic()))
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            message = "%s does not answer: what it did not take within %g s is lost"
            _log.warning(message, self._where(), self._patience)
            self._given_up = True
            if self._abandon():
                self._thread.join(_ENDING_SECONDS)  # a thread that ends with the interpreter may take it down

    def _put(self, call: Callable[[Tracker], None]) -> None:
        """Nothing waits here: images for a tracker that hangs, or has ended, would fill the memory."""
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._lost += 1
            if self._lost == 1:
                _log.warning("%s is too slow: calls are dropped while %d calls wait", self._where(), _MOST_CALLS)

    def _work(self) -> None:
        try:
            self._tracker = tracker = self._make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the training goes on
            reason = without_password(" ".join(str(error).split()))[:500]
            if not self._given_up:
                _log.warning(
                    "%s is switched off, and the run continues: %s: %s", self._where(), type(error).__name__, reason
                )
                self._abandon()

    def _where(self) -> str:
        address = getattr(self._tracker, "address", "")
        return f"{self._name} ({without_password(address)})" if address else self._name

    def _abandon(self) -> bool:
        """Whether the tracker knows how to end what it has begun."""
        abandon = getattr(self._tracker, "abandon", None)
        if abandon is not None:
            with suppress(Exception):
                abandon()
        return abandon is not None

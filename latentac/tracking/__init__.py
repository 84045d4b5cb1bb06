"""Where the numbers and pictures of a training go: TensorBoard always, MLflow and Weights & Biases by configuration.

    tracking:
      - {use: mlflow, experiment: shapes}
      - {use: wandb, project: shapes, mode: offline}

A row is a class with a pydantic class `Settings` nested in it, made as `Class(settings, folder)`; or without one, made
as `Class(folder)`. `module:Class` is one of your own. It is called from one thread, of the leading worker alone. What
it raises is told once and ends its tracking, never the training; it is waited for at the end, a minute at most.
"""

import importlib
import importlib.util
import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import ValidationError

from latentac.config import Config, Tracking, suggestion
from latentac.errors import ConfigError, Problem

TRACKERS = {
    "mlflow": "latentac.tracking.mlflow:MLflow",
    "wandb": "latentac.tracking.wandb:WandB",
}
"""Trackers by name; `module:Class` names one of your own."""

PACKAGES = {"mlflow": "mlflow-skinny==3.17.2", "wandb": "wandb==0.26.1"}
"""What a row needs installed, as pip is told; with these versions it was tested."""

_PATIENCE_SECONDS = 60.0
_SECRET = re.compile(r"(^|_)(key|token|secret|password|credential)s?($|_)", re.IGNORECASE)
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One place for the numbers and pictures of a run. A run is opened again after a resume, and by `evaluate`."""

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        """Open `run`, or go on with it. settings: what differs from the defaults, flat: `policy.learning_rate`."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of iteration `step`, by names such as `reward/redness`. A step that is known already may come again:
        a run that was killed repeats what came after its last checkpoint."""

    def image(self, name: str, step: int, picture: np.ndarray) -> None:
        """picture: uint8 [H, W, 3]."""

    def finish(self) -> None:
        """All of it is to be in its place now."""


def check(config: Config) -> None:
    """Raises ConfigError with every tracker that is not known, has wrong settings, or is not installed."""
    problems = []
    for place, entry in enumerate(config.tracking):
        path = f"tracking.{place}"
        package = PACKAGES.get(entry.use)
        if package is not None and importlib.util.find_spec(entry.use) is None:
            remedy = f"pip install {package}, or leave it out."
            problems.append(Problem(f"{path}.use", entry.use, "is not installed", remedy))
            continue
        try:
            _settings(entry, _class(entry, path), path)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def make_trackers(config: Config, folder: Path) -> list["Background"]:
    """The configured trackers, each in a thread of its own. folder: `<output>/<run>`. Raises ConfigError as `check`."""
    check(config)
    made = []
    for place, entry in enumerate(config.tracking):
        kind = _class(entry, f"tracking.{place}")
        settings = _settings(entry, kind, f"tracking.{place}")

        def make(kind: type = kind, settings: Any = settings) -> Tracker:
            tracker: Tracker = kind(folder) if settings is None else kind(settings, folder)
            return tracker

        made.append(Background(entry.use, make))
    return made


@contextmanager
def tracking(trackers: Sequence[Tracker], run: str, config: Config) -> Iterator[None]:
    """The trackers are started here, and finished at the end, however that comes."""
    with ExitStack() as stack:
        for tracker in trackers:
            tracker.start(run, hyperparameters(config))
            stack.callback(tracker.finish)
        yield


def hyperparameters(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, flat. Values of fields that may be secrets are left out."""
    found: dict[str, Any] = {}

    def collect(path: str, value: Any) -> None:
        if _SECRET.search(path.rpartition(".")[2]):
            return
        if isinstance(value, Mapping):
            for name, item in value.items():
                collect(f"{path}.{name}".lstrip("."), item)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                collect(f"{path}.{place}", item)
        else:
            found[path] = value if isinstance(value, bool | int | float | str) else str(value)

    collect("", config.model_dump(exclude_defaults=True, exclude={"tracking"}))
    return {**found, "seed": config.seed}


class Background:
    """A tracker in a thread of its own: the training neither waits for it nor fails with it."""

    def __init__(self, name: str, make: Callable[[], Tracker], patience: float = _PATIENCE_SECONDS) -> None:
        self._name, self._make, self._patience = name, make, patience
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"latentac-{name}", daemon=True)

    def start(self, run: str, settings: Mapping[str, Any]) -> None:
        self._thread.start()
        self._calls.put(lambda tracker: tracker.start(run, settings))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._calls.put(lambda tracker: tracker.log(step, scalars))

    def image(self, name: str, step: int, picture: np.ndarray) -> None:
        self._calls.put(lambda tracker: tracker.image(name, step, picture))

    def finish(self) -> None:
        self._calls.put(lambda tracker: tracker.finish())
        self._calls.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            _log.warning("%s does not answer: what it was not told within %g s is lost", self._name, self._patience)

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the training goes on
            reason = _open(" ".join(str(error).split()))[:500]
            _log.warning("%s tracks no longer, the run goes on: %s: %s", self._name, type(error).__name__, reason)


def _class(entry: Tracking, path: str) -> type:
    address = TRACKERS.get(entry.use, entry.use)
    module, colon, name = address.partition(":")
    if not colon:
        problem = Problem(f"{path}.use", entry.use, "is no tracker", suggestion(entry.use, list(TRACKERS)))
        raise ConfigError([problem])
    try:
        found: type = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        remedy = "Name an importable `module:Class`."
        raise ConfigError([Problem(f"{path}.use", entry.use, f"cannot be imported ({error})", remedy)]) from None
    return found


def _settings(entry: Tracking, kind: Any, path: str) -> Any:
    given = entry.model_extra or {}
    if not hasattr(kind, "Settings"):
        problems = [
            Problem(f"{path}.{name}", given[name], f"{entry.use} has no settings", "Remove it.") for name in given
        ]
        if problems:
            raise ConfigError(problems)
        return None
    try:
        return kind.Settings.model_validate(given)
    except ValidationError as error:
        known = suggestion("", list(kind.Settings.model_fields)) if kind.Settings.model_fields else "It has none."
        problems = [
            Problem(".".join([path, *map(str, detail["loc"])]), _open(detail["input"]), detail["msg"], known)
            for detail in error.errors(include_url=False)
        ]
        raise ConfigError(problems) from None


def _open(value: Any) -> Any:
    """`value` without the name and password of addresses in it."""
    return re.sub(r"//[^/@\s]+@", "//", value) if isinstance(value, str) else value

"""The runs of an output folder and a store: what became of each, and what is in production. No torch is needed."""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentac.config.fields import read_overrides
from latentac.runs import failures
from latentac.runs.steps import FUNCTIONS
from latentac.runs.task import ERROR_FILE, LOCK_FILE
from latentac.runs.workspace import default_store
from latentac.store import Entry, Manifest, Store, open_store
from latentac.store.pool import OBJECTS
from latentac.system.errors import ArtifactNotFound, IntegrityError, LatentacError
from latentac.system.lifetime import lock_holder
from latentac.system.reading import parse_json, read_json

LOCKS = ("run.lock", LOCK_FILE, "train.lock")
_REQUEST, _SUMMARY = "request.json", "summary.json"
_MOST = 1e100  # of a number that is shown; infinity and NaN are none either
_log = logging.getLogger(__name__)
_KINDS = re.compile(r"(?:(checkpoints|tensorboard|failures|leases|models)/)?([^/]+?)(?:\.json)?(?:/|$)")


@dataclass(frozen=True)
class Run:
    """One run. state: running, done, held, failed, stopped, or elsewhere (not finished, and not of this output folder,
    so nobody here knows whether it runs); step: where it failed or goes on, "" if nowhere; gain: of the gate's reward
    with its 95 % interval, None before `evaluate`; gate: promote, hold or ""; bytes: of all its files, shared ones
    once; started: UTC in ISO 8601."""

    name: str
    state: str
    step: str
    project: str
    recipe: str
    seed: int | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    gate: str
    bytes: int
    started: str

    def to_dict(self) -> dict[str, Any]:
        return {"run": self.name, **{name: value for name, value in asdict(self).items() if name != "name"}}


@dataclass
class Traces:
    """What there is of one run: its folder here, if any, and its objects in the store by their names."""

    name: str
    folder: Path | None = None
    objects: dict[str, Entry] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[str]:
        """What it has published, in the order of the pipeline."""
        return [step for step in FUNCTIONS if f"{self.name}/{step}/manifest.json" in self.objects]

    @property
    def holder(self) -> str:
        """The pid of the process here that works on it, or ""."""
        if self.folder is None:
            return ""
        return next(filter(None, (lock_holder(self.folder / name) for name in LOCKS)), "")


class Survey:
    """Everything that is in an output folder and a store, listed once. Links are not followed."""

    def __init__(self, output: Path, store: str) -> None:
        self.output, self.store = output, open_store(store or default_store(str(output)))
        self.entries = self.store.entries()
        self.traces: dict[str, Traces] = {}
        self.elsewhere: dict[str, str] = {}
        """Run with a folder here -> the store that it has its artifacts in, where it is not this one."""
        for path in sorted(output.iterdir()) if output.is_dir() else []:
            if path.is_dir() and any((path / name).is_file() for name in (_REQUEST, *LOCKS, ERROR_FILE)):
                own = store_of(path)
                if own and own.rstrip("/") != self.store.url:
                    self.elsewhere[path.name] = own
                else:
                    self.traces[path.name] = Traces(path.name, path)
        self._owners: dict[str, str] = {}
        for name, entry in self.entries.items():
            run = self._owner(name)
            if run:
                self.traces.setdefault(run, Traces(run)).objects[name] = entry
        for version, run in self._owners.items():
            if run:
                self.traces[run].models.append(version)

    def owner(self, version: str) -> str:
        """The run whose model `version` is, "" where that is not known."""
        return self._owners.get(version, "")

    def _owner(self, name: str) -> str:
        """The run that the object belongs to, "" for a pointer, or for what is not latentac's."""
        kind, first = _KINDS.match(name).groups()  # type: ignore[union-attr]
        if kind == "models":
            return self._owners.setdefault(first, self._model_owner(first))
        if kind:
            return str(first)
        parts = name.split("/")
        return parts[0] if len(parts) > 2 and parts[1] in FUNCTIONS and parts[0] != "registry" else ""

    def _model_owner(self, version: str) -> str:
        """By its manifest; where that is gone already, by the version, which is the run and eight digits."""
        if f"models/{version}/manifest.json" in self.entries:
            try:
                return self.store.manifest(f"models/{version}").run
            except (ArtifactNotFound, IntegrityError):
                pass
        found = re.fullmatch(r"(.+)-[0-9a-f]{8}", version)
        return found[1] if found else ""

    def manifest(self, key: str) -> Manifest | None:
        """None where there is none, or none that can be read."""
        if f"{key}/manifest.json" not in self.entries:
            return None
        try:
            return self.store.manifest(key)
        except (ArtifactNotFound, IntegrityError):
            return None

    def json(self, key: str, path: str) -> dict[str, Any]:
        """The JSON object that a file of an artifact is; empty where either cannot be read."""
        try:
            return _object(parse_json(self.store.read(key, path)) if f"{key}/manifest.json" in self.entries else None)
        except (ArtifactNotFound, IntegrityError, ValueError):
            return {}

    def evaluation(self, run: str) -> dict[str, Any]:
        """What `evaluate` found; empty before it."""
        return self.json(f"{run}/evaluate", "evaluation.json")


def list_runs(output: Path, store: str) -> list[Run]:
    """The newest first. Raises StoreError where the store cannot be listed."""
    survey = Survey(output, store)
    runs = [_describe(survey, traces) for traces in survey.traces.values() if traces.folder or traces.steps]
    for other in sorted(set(survey.elsewhere.values())) if not store else []:
        names = [name for name, url in survey.elsewhere.items() if url == other]
        try:
            if not any(_published(other, name) for name in names):  # any folder may be named; this one is not listed
                runs += [_describe(survey, Traces(name, output / name)) for name in names]
                continue
            there = Survey(output, other)
            runs += [_describe(there, there.traces[name]) for name in names]
        except LatentacError as error:  # no credentials for it here, say
            _log.warning("%s: %s", ", ".join(names), error)
            runs += [_describe(survey, Traces(name, output / name)) for name in names]
    return sorted(runs, key=lambda run: (run.started, run.name), reverse=True)


def _published(store: str, run: str) -> bool:
    try:
        open_store(store).manifest(f"{run}/prepare")
    except (ArtifactNotFound, IntegrityError):
        return False
    return True


def store_of(folder: Path) -> str:
    """The store that the run in `folder` was started with, "" for the default one of its output."""
    try:
        store = str(read_json(folder / _REQUEST)["store"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return store.replace("{output}", str(folder.parent.resolve()), 1)


def files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file and link below `folder`, not following links, nor `folder` where it is one."""
    for place, _, names in os.walk(folder) if not folder.is_symlink() else ():
        for name in names:
            path = Path(place) / name
            try:
                yield path, path.lstat()
            except FileNotFoundError:  # removed meanwhile
                continue


def size_of(traces: Traces) -> int:
    """Bytes on disk of a run's files, each file once however many names it has."""
    own = {name: (entry.inode or name, entry.size) for name, entry in traces.objects.items()}
    sizes = dict(own.values())
    if traces.folder is not None:
        sizes |= {f"{status.st_dev}:{status.st_ino}": status.st_size for _, status in files(traces.folder)}
    return sum(sizes.values())


def pooled(root: Path) -> set[str]:
    """Which files are in the pool of shared files below `root`."""
    return {f"{status.st_dev}:{status.st_ino}" for _, status in files(root / OBJECTS)}


def _describe(survey: Survey, traces: Traces) -> Run:
    prepared, gate = survey.manifest(f"{traces.name}/prepare"), survey.manifest(f"{traces.name}/gate")
    decision = str(gate.metrics.get("decision", "")) if gate else ""
    summary = {} if prepared else _json(traces.folder, _SUMMARY)
    if summary:  # its store is gone, or cannot be reached: what it left at its end
        decision = str(_object(summary.get("gate")).get("decision", ""))
    state, step = _state(survey.store, traces, decision)
    settings = survey.json(f"{traces.name}/prepare", "config.json")
    request = _request(traces.folder)
    evaluation = survey.evaluation(traces.name) or _object(summary.get("evaluation"))
    rewards = [_object(found.get("gate")).get("reward") for found in (settings, summary)]
    gained = _gained(evaluation, str(rewards[0] or rewards[1]))
    if decision == "promote" and summary and state != "running":
        state, step = "done", ""
    return Run(
        name=traces.name,
        state=state,
        step=step,
        project=str(settings.get("project", "")),
        recipe=str(settings.get("recipe") or request.get("recipe", "")),
        seed=_seed(settings.get("seed", request.get("seed"))),
        gain=gained.get("mean"),
        gain_low=gained.get("low"),
        gain_high=gained.get("high"),
        gate=decision,
        bytes=size_of(traces),
        started=request.get("started") or (prepared.created if prepared else ""),
    )


def _state(store: Store, traces: Traces, decision: str) -> tuple[str, str]:
    """What the run does or how it ended, and at which step."""
    done = traces.steps
    following = next((step for step in FUNCTIONS if step not in done), "")
    if traces.holder:
        return "running", following
    failed = _failed(traces) or ("train" if "train" not in done and _failure(store, traces) else "")
    if failed:
        return "failed", failed
    if "deploy" in done:
        return "done", ""
    if decision == "hold":
        return "held", ""
    return ("elsewhere" if traces.folder is None else "stopped"), following


def _failed(traces: Traces) -> str:
    """The step that error.json names, unless it was published since."""
    if traces.folder is None:
        return ""
    try:
        left = read_json(traces.folder / ERROR_FILE)
        step, when = str(left["task"]), (traces.folder / ERROR_FILE).stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    published = traces.objects.get(f"{traces.name}/{step}/manifest.json")
    return "" if published and published.changed > when else step


def _failure(store: Store, traces: Traces) -> bool:
    """Whether the training's workers left the error that ended them, as on a cluster."""
    return f"failures/{traces.name}.json" in traces.objects and failures.last(store, traces.name) is not None


def _gained(evaluation: dict[str, Any], reward: str) -> dict[str, float]:
    numbers = _object(_object(evaluation.get("difference")).get(reward))
    return {name: float(value) for name, value in numbers.items() if type(value) in (int, float) and abs(value) < _MOST}


def _seed(found: Any) -> int | None:
    return found if type(found) is int and abs(found) < _MOST else None


def _object(found: Any) -> dict[str, Any]:
    """`found` if it is a JSON object, else an empty one."""
    return found if isinstance(found, dict) else {}


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    try:
        return _object(read_json(folder / name) if folder else None)
    except (OSError, ValueError):
        return {}


def _request(folder: Path | None) -> dict[str, Any]:
    """recipe and seed as they were asked for, before `prepare` published them; started: when."""
    if folder is None:
        return {}
    try:
        file = folder / _REQUEST
        asked, made = read_json(file), file.stat().st_mtime
        fields = read_overrides([str(each) for each in asked["overrides"]])
        started = datetime.fromtimestamp(made, UTC).isoformat(timespec="seconds")
        return {"recipe": str(asked["recipe"]), "seed": fields.get("seed"), "started": started}
    except (OSError, ValueError, KeyError, TypeError, LatentacError):
        return {}

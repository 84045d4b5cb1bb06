"""Delete runs and what killed processes left, and keep what is referenced. Shown first, done after.

A manifest goes before the files that it names, and a run's folder last, so a delete that is cut off leaves nothing
that looks whole, and the same command finishes it. Only what latentac makes is removed, by its name, and no link is
followed: a file of somebody else's in a run's folder stays, and so does the folder around it then.
"""

import contextlib
import re
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from latentac.runs.housekeeping.listing import LOCKS, Run, Survey, Traces, files, list_runs
from latentac.runs.housekeeping.removal import Removal, measured, ordered, remove_one
from latentac.runs.housekeeping.table import size
from latentac.runs.steps import FUNCTIONS
from latentac.runs.task import ERROR_FILE
from latentac.runs.workspace import CHECKPOINTS, SHARED
from latentac.store.blobs import PARTIAL
from latentac.store.pool import Pool
from latentac.system.calls import CALLS
from latentac.system.errors import ArtifactNotFound, ConfigError, IntegrityError, Problem
from latentac.system.lifetime import run_lock
from latentac.system.scratch import HIDDEN

_HOUR, _DAY = 3600.0, 86400.0
_MADE = {
    *(step for step in FUNCTIONS),
    *LOCKS,
    *(
        "request.json",
        SHARED,
        CHECKPOINTS,
        "code",
        "given-config",
        "given-package",
        "given-config.yaml",
        ERROR_FILE,
        CALLS,
        "timings.json",
        "report.html",
        "summary.json",
        "card.md",
    ),
    *("kfp", "incumbent", "model", "tensorboard"),
}
"""What latentac makes in a run's folder, beside temporary folders, which are hidden or called latentac-..."""

_ARTIFACT = r"(?:manifest\.json|files-[0-9a-f]{16}/.+)"
_OBJECT = re.compile(
    rf"(?:(?!registry/)[^/]+/(?:{'|'.join(FUNCTIONS)})/{_ARTIFACT}|checkpoints/[^/]+/(?:LATEST|\d+/{_ARTIFACT})"
    rf"|models/[^/]+/{_ARTIFACT}|tensorboard/[^/]+/(?:.+/)?events\.out\.tfevents\.[^/]+|(?:failures|leases)/[^/]+\.json)"
)
"""Names in a store of what a run publishes."""


@dataclass(frozen=True)
class Plan:
    """What would go, and of what was asked for what stays: name -> reason."""

    survey: Survey
    removals: tuple[Removal, ...]
    kept: dict[str, str]

    @property
    def bytes(self) -> int:
        return sum(removal.bytes for removal in self.removals)


def plan_delete(names: Collection[str], output: Path, store: str) -> Plan:
    """Delete these runs. Raises ConfigError for every one that there is not, or that must stay."""
    survey = Survey(output, store)
    kept = referenced_runs(survey)
    known = ", ".join(list(survey.traces)[-10:])
    problems = [
        Problem("run", name, "no such run, here or in the store", f"Known: {known}." if known else "There is none.")
        for name in names
        if name not in survey.traces
    ]
    remedy = "Put another model in production, or wait for the run, first."
    problems += [Problem("run", name, kept[name], remedy) for name in names if name in kept]
    if problems:
        raise ConfigError(problems)
    return _plan(survey, list(dict.fromkeys(names)), [], {})


def plan_prune(
    output: Path, store: str, *, keep: int | None = None, older_than: float | None = None, failed: bool = False
) -> Plan:
    """Delete the runs that fit every condition that is given, and what killed processes left, whatever is given.

    keep: not the newest so many; older_than: started before so many seconds; failed: that failed or were stopped.
    """
    survey = Survey(output, store)
    chosen: list[Run] = []
    if keep is not None or older_than is not None or failed:
        chosen = list_runs(output, store)[keep or 0 :]
    if older_than is not None:
        chosen = [run for run in chosen if run.started and _seconds_since(run.started) > older_than]
    if failed:
        chosen = [run for run in chosen if run.state in ("failed", "stopped")]
    kept = _busy_elsewhere(survey) | referenced_runs(survey)
    going = [run.name for run in chosen if run.name not in kept]
    return _plan(
        survey, going, _leftovers(survey, going), {run.name: kept[run.name] for run in chosen if run.name in kept}
    )


def referenced_runs(survey: Survey) -> dict[str, str]:
    """Run -> why it must stay: it is being worked on, or its model, or one made from what it published, is named by a
    pointer of the registry, whichever project's. Raises IntegrityError for a pointer that cannot be read: what it
    names is not known then."""
    kept: dict[str, str] = {}
    for name, traces in survey.traces.items():
        if traces.holder:
            kept[name] = f"pid {traces.holder} is working on it"
    for version, run, reason in _pointed_at(survey):
        owners = {survey.owner(version), run}
        pending, seen = [f"models/{version}"], set[str]()
        while pending:
            key = pending.pop()
            manifest = survey.manifest(key) if key not in seen else None
            seen.add(key)
            if manifest is not None:
                owners.add(manifest.run)
                pending += [parent.key for parent in manifest.parents]
        for run in owners & survey.traces.keys():
            kept.setdefault(run, reason)
    return kept


def remove(plan: Plan) -> Iterator[Removal]:
    """Do it, one removal after another, each given back when it is done. Raises ResourceError for a run that somebody
    has begun to work on; the same call again goes on where it was cut off."""
    for removal in plan.removals:
        with contextlib.ExitStack() as stack:
            if removal.folder is not None:
                for name in LOCKS:
                    if (removal.folder / name).is_file():
                        stack.enter_context(run_lock(removal.folder / name, wait_seconds=0))
            plan.survey.store.remove(removal.objects)
            for path in removal.paths:
                remove_one(path)
            if removal.folder is not None:
                with contextlib.suppress(OSError):  # it still has something of somebody else's
                    removal.folder.rmdir()
        yield removal
    plan.survey.store.sweep()
    Pool(plan.survey.output).sweep()


def described(plan: Plan) -> str:
    """The plan for a person, a line each."""
    lines = [f"{size(removal.bytes):>10}  {removal.title}" for removal in plan.removals]
    lines += [f"{'stays':>10}  {name}: {reason}" for name, reason in plan.kept.items()]
    return "\n".join([*lines, f"{size(plan.bytes):>10}  in all" if plan.removals else "There is nothing to remove."])


def _pointed_at(survey: Survey) -> Iterator[tuple[str, str, str]]:
    """Version, its run if that is known, and the reason, of each pointer of the registry."""
    keys = (name for name in survey.entries if name.startswith("registry/") and name.endswith(".json"))
    for key in sorted(keys, key=lambda key: (not key.endswith("production.json"), key)):
        try:
            found = survey.store.read_json(key)
        except ArtifactNotFound:  # changed meanwhile
            continue
        if not isinstance(found, dict):
            raise IntegrityError(f"{survey.store.url}/{key}", "it names no version and run", "Deploy a run again")
        role = "in production" if key.endswith("production.json") else "the candidate"
        yield str(found.get("version")), str(found.get("run")), f"its model is {role} ({key})"
        yield str(found.get("previous")), "", f"its model is the one before the model in production ({key})"


def _busy_elsewhere(survey: Survey) -> dict[str, str]:
    """Unfinished runs without a folder here, so without a lock to look at, that were written to a short while ago."""
    since = time.time() - _HOUR
    return {
        name: "it was written to within the hour, and may be running on another machine"
        for name, traces in survey.traces.items()
        if traces.folder is None and not _is_rest(traces) and "finish" not in traces.steps
        if max(entry.changed for entry in traces.objects.values()) > since
    }


def _is_rest(traces: Traces) -> bool:
    """Whether this is what stayed of a run that was deleted: a model, perhaps with the base of its adapter."""
    deleted = not traces.steps or (bool(traces.models) and {*traces.steps} == {"prepare"})
    return traces.folder is None and deleted


def _compared(survey: Survey, going: Collection[str]) -> dict[str, str]:
    """Version -> why it must stay: a run that stays was compared with it, and its gate looks at it again."""
    kept = {}
    for name, traces in survey.traces.items():
        if name not in going and "evaluate" in traces.steps:
            production = survey.evaluation(name).get("production")
            version = production.get("version") if isinstance(production, dict) else None
            if isinstance(version, str):
                kept[version] = f"{name} was compared with it"
    return kept


def _plan(survey: Survey, going: list[str], leftovers: list[Removal], kept: dict[str, str]) -> Plan:
    compared = _compared(survey, going)
    removals = []
    for name in going:
        traces = survey.traces[name]
        staying = [version for version in traces.models if version in compared]
        kept |= {f"models/{version}": compared[version] for version in staying}
        removals.append(_whole_run(survey, traces, staying))
    return Plan(survey, tuple(measured(survey, [*removals, *leftovers])), kept)


def _with_bases(survey: Survey, versions: Iterable[str]) -> tuple[str, ...]:
    """What the names of the objects of these models begin with, and those of the bases of adapters."""
    keys = [f"models/{version}" for version in versions]
    for manifest in filter(None, map(survey.manifest, keys[:])):
        keys += [parent.key for parent in manifest.parents if parent.key.endswith("/prepare")]
    return tuple(f"{key}/" for key in keys)


def _whole_run(survey: Survey, traces: Traces, staying: Collection[str]) -> Removal:
    kept = _with_bases(survey, staying)
    objects = [name for name in traces.objects if _OBJECT.fullmatch(name) and not name.startswith(kept)]
    folder, paths = traces.folder, list[Path]()
    title = f"run {traces.name}"
    if traces.name in _busy_elsewhere(survey):
        title += " (it was written to within the hour: does it run on another machine?)"
    if folder is not None and folder.is_symlink():
        folder, title = None, f"{title} (its folder is a link and stays)"
    elif folder is not None:
        found = sorted(folder.iterdir())
        paths = [path for path in found if path.name in _MADE or path.name.startswith((HIDDEN, "latentac-"))]
        paths.sort(key=lambda path: path.name in LOCKS)  # while they are there, nobody else begins
        foreign = [path.name for path in found if path not in paths]
        title += f" (not of latentac, stays: {', '.join(foreign[:3])})" if foreign else ""
    return Removal(title, ordered(objects), tuple(paths), folder, 0)


def _leftovers(survey: Survey, going: Collection[str]) -> list[Removal]:
    """What killed processes left, older than a day, and what is of no use any more, of runs that nobody works on."""
    busy = _busy_elsewhere(survey)
    compared, pointed = _compared(survey, going), {version for version, _, _ in _pointed_at(survey)}
    made = []

    def add(title: str, objects: Iterable[str] = (), paths: Iterable[Path] = ()) -> None:
        names, places = ordered(objects), tuple(paths)
        if names or places:
            made.append(Removal(title, names, places, None, 0))

    if survey.store.url.startswith("file://"):
        root = Path(survey.store.url.removeprefix("file://"))
        add("unfinished writes in the store", paths=(path for path, _ in files(root / PARTIAL) if _old(path)))
    add("temporary files of killed processes", paths=_abandoned(survey.output))
    for name, traces in survey.traces.items():
        if name in going or name in busy or traces.holder:
            continue
        objects = {each: entry for each, entry in traces.objects.items() if _OBJECT.fullmatch(each)}
        add(f"{name}: files that no manifest names", _unnamed(survey, objects))
        if "train" in traces.steps:
            add(
                f"{name}: checkpoints of a training that has ended",
                (o for o in objects if o.startswith("checkpoints/")),
                _there(traces.folder, CHECKPOINTS),
            )
        if traces.folder is not None and not traces.folder.is_symlink():
            add(f"{name}: temporary files of killed processes", paths=_abandoned(traces.folder, "latentac-*/"))
        elif _is_rest(traces):
            used = [version for version in traces.models if version in compared or version in pointed]
            kept = _with_bases(survey, used)
            rest = (o for o in objects if not o.startswith(kept))
            add(f"{name}: what is left of a run that is gone", rest)
    return made


def _there(folder: Path | None, name: str) -> list[Path]:
    """What has this name in a run's folder, unless the folder is a link."""
    path = folder / name if folder is not None and not folder.is_symlink() else None
    return [path] if path is not None and path.exists() else []


def _abandoned(folder: Path, *patterns: str) -> list[Path]:
    """What killed processes left in `folder` a day ago or longer: what is hidden, and what fits `patterns`."""
    found = (path for pattern in (f"{HIDDEN}*", *patterns) for path in folder.glob(pattern))
    return sorted(path for path in found if _old(path))


def _unnamed(survey: Survey, objects: Iterable[str]) -> list[str]:
    """Files of artifacts that were never finished, or replaced, a day ago or longer."""
    found = []
    folders: dict[str, str | None] = {}
    for name in objects:
        key, mark, _ = name.partition("/files-")
        if mark and key not in folders:
            manifest = survey.manifest(key)
            broken = manifest is None and f"{key}/manifest.json" in survey.entries  # not ours to judge
            folders[key] = None if broken else manifest.folder if manifest else ""
        if mark and folders[key] is not None:
            named = folders[key] and name.startswith(f"{folders[key]}/")
            if not named and time.time() - survey.entries[name].moved > _DAY:
                found.append(name)
    return found


def _old(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        return time.time() - max(status.st_mtime, status.st_ctime) > _DAY
    return False


def _seconds_since(started: str) -> float:
    return time.time() - datetime.fromisoformat(started).timestamp()

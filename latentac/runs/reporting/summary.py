"""What a run has published, as one dictionary of plain JSON: the content of summary.json, and what a comparison reads.

It is made from the artifacts `<run>/<step>` alone, at any time after `prepare`: a step that has not run is null.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentac.evaluation.arms import best_steered
from latentac.runs import failures
from latentac.runs.reporting.metrics import PHASES, SPEED
from latentac.runs.task import ERROR_FILE
from latentac.store import Manifest, Store, published
from latentac.system.errors import ArtifactNotFound, ConfigError, IntegrityError, Problem
from latentac.system.reading import MOST_SECONDS
from latentac.system.steps import up_to

STEPS = up_to("deploy")
AGAIN = "Run this step again with this version of latentac"
_INTERVAL = ("mean", "low", "high", "n")
_STEERED = ("method", "strength", "particles", "nfe", "reward", *_INTERVAL, "seconds", "diversity")
_ITERATION = ("iteration", "images", "reward_mean", "rewards", "kl", "clip_share", "explained_variance", "seconds")
_SERVING = ("version", "project", "forced", "image_sha256", "seconds", "endpoint", "request")
_GATE, _CHANGED = ("decision", "reasons", "checks", "by"), ("overrides", "former")
_POLICIES = ("base", "trained", "incumbent")
_MOST_TOLD = 10_000
"""Characters of an error."""

Summary = dict[str, Any]
Files = dict[str, tuple[Manifest, Path]]


def prepared(store: Store, runs: Sequence[str], path: str = "run") -> list[Manifest]:
    """What `prepare` published for each of `runs`. path: the argument that named them, for messages.

    Raises ConfigError that names the runs that have published nothing, and the runs that have.
    """
    found, missing = [], []
    for run in runs:
        try:
            found.append(store.manifest(f"{run}/prepare"))
        except ArtifactNotFound:
            missing.append(run)
    if missing:
        known = [key.removesuffix("/prepare") for key in store.keys("") if key.endswith("/prepare")]
        remedy = f"Known there: {', '.join(sorted(known)[-10:]) or 'none'}. Other places: --output, --store."
        raise ConfigError([Problem(path, run, f"has published nothing in {store.url}", remedy) for run in missing])
    return found


def fetch_run(store: Store, run: str, scratch: Path) -> Files:
    """Verified copies of what pages show of the run, by step: numbers, words and images. Weights, which may be many
    GB, are not read."""
    files = {}
    for step in STEPS:
        try:
            files[step] = (store.fetch_files(f"{run}/{step}", scratch / step, _is_shown), scratch / step)
        except ArtifactNotFound:
            if step == "prepare":
                raise
    return files


def _is_shown(path: str) -> bool:
    """Of an artifact's files. A backbone's own JSON lies in folders of its own."""
    folder, _, name = path.rpartition("/")
    return folder in ("", "gallery") and name.endswith((".json", ".md", ".png"))


def read_json(artifact: tuple[Manifest, Path], name: str) -> Any:
    """What a JSON file of an artifact holds, in the shape that it must have. Raises IntegrityError."""
    manifest, folder = artifact
    try:
        return published.read(folder / name, f"{manifest.key}/{name}")
    except FileNotFoundError:
        raise IntegrityError(manifest.key, f"the artifact has no {name}", AGAIN) from None


def read_failure(store: Store, run: str, folder: Path, files: Files) -> Summary | None:
    """{step, exit_code, message} of the error that ended the run, unless its step was published since.

    folder: `<output>/<run>`. A step leaves the error there. The workers of a training on a cluster leave it in the
    store.
    """
    if (folder / ERROR_FILE).is_file():
        left = published.read(folder / ERROR_FILE, remedy="Remove it")
        found = {"step": left["task"], "exit_code": left["exit_code"], "message": left["message"]}
    elif (error := failures.last(store, run)) is not None:
        found = {"step": "train", "exit_code": error.exit_code, "message": str(error)}
    else:
        return None
    found["message"] = found["message"][:_MOST_TOLD]
    return None if found["step"] in files else found


def summarise(run: str, files: Files, timings: Mapping[str, Any], failure: Summary | None = None) -> Summary:
    """The content of summary.json; its schema is in the README. What is not a finite number becomes null and a note.

    failure: what `read_failure` found.
    """

    def read(step: str, name: str) -> Any:
        return read_json(files[step], name) if step in files else None

    settings, environment = read("prepare", "config.json"), read("prepare", "environment.json")
    evaluation, gate, deployment = (
        read(step, f"{name}.json")
        for step, name in (("evaluate", "evaluation"), ("gate", "gate"), ("deploy", "deployment"))
    )
    seconds, late = _seconds(files, timings)
    history = read("train", "history.json") or ()
    summary = {
        "run": run,
        "recipe": settings["recipe"],
        "seed": settings["seed"],
        "commit": environment.get("commit"),
        "created": files["prepare"][0].created,
        "machine": environment.get("machine"),
        "versions": environment.get("versions"),
        "settings": settings,
        "seconds": seconds,
        "failure": failure,
        "evaluation": evaluation and _evaluation(evaluation),
        "gallery": _gallery(files, settings["gate"]["reward"]),
        "critic": {
            "explained_variance": (read("pretrain-value", "metrics.json") or {}).get("explained_variance"),
            "explained_variance_trained": (evaluation or {}).get("critic", {}).get("explained_variance"),
        },
        "training": [{name: row.get(name) for name in _ITERATION} for row in history],
        "speed": _speed(history),
        "steering": [{name: row.get(name) for name in _STEERED} for row in read("steer", "steering.json") or ()],
        "steered": _steered(read("steer", "steering.json") or (), settings["gate"]["reward"]),
        "gate": gate
        and {**{name: gate.get(name) for name in _GATE}, **{name: gate.get(name) or [] for name in _CHANGED}},
        "serving": deployment and {name: deployment.get(name) for name in _SERVING},
    }
    dropped: Counter[str] = Counter()
    summary = _finite(summary, "", dropped)
    summary["notes"] = (
        late
        + _lenient(gate, settings["gate"])
        + [
            f"{path}: {f'{times} values were' if times > 1 else 'was'} not finite and became null"
            for path, times in sorted(dropped.items())
        ]
    )
    return summary


def _speed(history: Sequence[Mapping[str, Any]]) -> Summary | None:
    """Means over the iterations that as many workers did as the last one: of each number of `speed`, and in `phases`
    the seconds of each phase on each worker. Null where nothing was timed."""
    timed = [row["speed"] for row in history if PHASES.keys() <= ((row.get("speed") or {}).get("phases") or {}).keys()]
    if not timed:
        return None
    workers = len(timed[-1]["phases"]["rollout"])
    alike = [row for row in timed if len(row["phases"]["rollout"]) == workers]

    def mean(values: Sequence[Any]) -> float | None:
        return None if None in values else sum(values) / len(values)

    phases = {
        name: [mean(each) for each in zip(*(row["phases"][name] for row in alike), strict=True)] for name in PHASES
    }
    numbers = {name: mean([row.get(name) for row in alike]) for name in SPEED}
    return {"workers": workers, "iterations": len(alike), **numbers, "phases": phases}


def _lenient(gate: Mapping[str, Any] | None, bounds: Mapping[str, Any]) -> list[str]:
    """A note for a model that was promoted by bounds that a worse model meets too."""
    names = ("min_gain", "min_lower_bound")
    if not gate or gate["decision"] != "promote" or any(bounds.get(name, 0) >= 0 for name in names):
        return []
    allowed = " and ".join(f"gate.{name} = {bounds[name]:g}" for name in names)
    return [f"the gate also promotes a model that is worse than its base ({allowed}), so its decision proves no gain"]


def _steered(rows: Sequence[Mapping[str, Any]], reward: str) -> Summary | None:
    """The arm that the gallery shows and the endpoint uses by default."""
    best = best_steered(rows, reward)
    return None if best is None else {name: best[name] for name in ("method", "strength", "particles")}


def _gallery(files: Files, reward: str) -> Summary | None:
    """The index of evaluate's gallery, and what each image of each arm scored: {reward, binary, scores: {arm: [..]}}.

    binary: the reward was 0 or 1 for every image that was evaluated, so 1 is right and 0 is wrong.
    """
    if "evaluate" not in files:
        return None
    index = read_json(files["evaluate"], "gallery/gallery.json")
    found = dict(index.pop("rewards", None) or {})
    if "steer" in files:
        found |= read_json(files["steer"], "gallery/gallery.json").get("rewards") or {}
    every = [rows.get(reward) or [] for rows in (read_scores(files) or {"rewards": found})["rewards"].values()]
    binary = any(every) and all(value in (0, 1) for values in every for value in values)
    scores = {arm: rows[reward] for arm, rows in found.items() if reward in rows}
    return {**index, "reward": reward, "binary": binary, "scores": scores}


def read_scores(files: Files) -> Summary | None:
    """scores.json of `evaluate`: None before that, and where an earlier version evaluated."""
    if "evaluate" not in files or not (files["evaluate"][1] / "scores.json").exists():
        return None
    content: Summary = read_json(files["evaluate"], "scores.json")
    return content


def _evaluation(measured: Mapping[str, Any]) -> Summary:
    """What the README says of `evaluation`: what has not been measured is null, an arm without an incumbent too."""

    def rewards(name: str) -> Summary | None:
        rows = measured.get(name)
        return None if rows is None else {reward: _keep(row, "mean") for reward, row in rows.items()}

    def others(rows: Mapping[str, Any] | None, value: str) -> Summary:
        return {arm: _keep((rows or {}).get(arm), value) for arm in ("base", "incumbent")}

    production = measured.get("production") or {}
    spread, speed = measured.get("diversity") or {}, measured.get("latency") or {}
    kinds, present = measured.get("categories", {}), [arm for arm in _POLICIES if arm in measured]
    base = measured.get("base", {})
    return {
        **{arm: rewards(arm) or {} for arm in ("base", "trained", "difference")},
        "incumbent": rewards("incumbent"),
        "incumbent_difference": rewards("incumbent_difference"),
        "held_out_gap": rewards("held_out_gap"),
        "production": {name: production.get(name) or None for name in ("version", "problem")},
        "diversity": {
            **{arm: _keep(spread.get(arm), "mean") for arm in _POLICIES},
            "difference": others(spread.get("difference"), "mean"),
            "kept": others(spread.get("kept"), "ratio"),
        },
        "latency": {
            **{arm: _keep(speed.get(arm), "median") for arm in _POLICIES},
            "ratio": others(speed.get("ratio"), "median"),
            "block_images": speed.get("block_images"),
        },
        "definitions": measured.get("definitions") or {},
        "categories": {kind: {arm: row.get(arm) for arm in present} for kind, row in kinds.items()},
        "units": {name: measured.get("units", {}).get(name) for name in base},
    }


def _keep(row: Mapping[str, Any] | None, value: str) -> Summary | None:
    """{`value`, low, high, n}, or null where it was not measured."""
    return None if row is None else {name: row.get(name) for name in (value, *_INTERVAL[1:])}


def _seconds(files: Files, timings: Mapping[str, Any]) -> tuple[dict[str, float | None], list[str]]:
    """Seconds per step and in total, and a note where these do not fit.

    A step as the driver saw it, with the start of its process and with attempts that failed; as its manifest says
    where no driver ran it.
    """
    booked = dict(timings.get("steps") or {})
    own = {step: _known(manifest.metrics.get("seconds")) for step, (manifest, _) in files.items()}
    seconds: dict[str, float | None] = {step: booked.get(step, own.get(step)) for step in STEPS}
    seconds |= {step: value for step, value in booked.items() if step not in seconds}
    spent = sum(value for value in seconds.values() if value is not None)
    total = timings.get("total", spent)
    note = "seconds.total is less than the sum of the steps, because the driver has not measured all of them"
    return {**seconds, "total": total}, [note] if spent > 1.05 * total else []


def _known(seconds: Any) -> float | None:
    """Of a manifest, whose metrics may be anything."""
    sound = type(seconds) in (int, float) and 0 <= seconds <= MOST_SECONDS  # so NaN is not
    return seconds if sound else None


def _finite(value: Any, path: str, dropped: Counter[str]) -> Any:
    """`value` with None for every NaN and infinity, which are counted in `dropped` by their path."""
    if isinstance(value, dict):
        return {name: _finite(item, f"{path}.{name}".lstrip("."), dropped) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{path}[]", dropped) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        dropped[path] += 1
        return None
    return value


def read_timings(path: Path) -> Mapping[str, Any]:
    """What the driver wrote: {"steps": {step: seconds}, "total": seconds}, or nothing."""
    found: Mapping[str, Any] = published.read(path, remedy="Remove it") if path.exists() else {}
    return found

"""From the results of units to one file an experiment and recipe: means over seeds, paired differences, intervals.

Seeds are few and independent, so intervals over them are Student's, 95 %. Arms of one seed share held-out prompts and
noise, so their difference is taken seed by seed. What one unit measured keeps its bootstrap interval over images.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.plan import ARMS, EXPERIMENTS, FAILURE, FULL, RESULT, Scale, Unit, units
from latentac.system.errors import ResourceError

Record = dict[str, Any]
Interval = dict[str, Any]
Metric = tuple[str | int, ...]
"""Keys and places that lead to a number in a unit's record."""

_DROPPED = ("config", "history", "versions", "machine", "commit", "experiment", "recipe")
_DIGITS = 6


def t_interval(numbers: Iterable[float]) -> Interval:
    """{mean, low, high, n}: the mean of one number a seed and its 95 % interval; low and high are None for one seed."""
    values = np.array(list(numbers), float)
    count, mean = len(values), float(values.mean())
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "n": count}
    reach = float(stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "n": count}


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval | None:
    """first - second over the seeds that both have; None where there is none."""
    both = sorted(first.keys() & second.keys())
    return t_interval(first[seed] - second[seed] for seed in both) if both else None


def aggregate(scale: Scale, experiment: str, recipe: str) -> Path | None:
    """Write <results>/<experiment>-<recipe>.json from what units left here and from what is recorded already (it may
    come from another machine). Only units of the present plan count. None where there is nothing to compare yet."""
    planned = units(scale, [experiment], [recipe])
    path = scale.results / f"{experiment}-{recipe}.json"
    known = recorded(scale)
    records, environments, fresh = [], [], False
    for unit in planned:
        result = scale.folder / unit.name / RESULT
        if result.exists():
            known[unit.hash] = _compact(json.loads(result.read_text()))
            fresh = True
        if unit.hash in known:
            records.append({**known[unit.hash], "arm": unit.arm, "seed": unit.seed})
            environments.append(known[unit.hash]["environment"])
    summary = summarise(experiment, records)
    if not summary["differences"]:
        return None
    commits = sorted({environment["commit"] for environment in environments})
    if scale is FULL and fresh and len(commits) > 1:
        remedy = "Run all of its units at one commit: make evidence ANEW=1, in a worktree of that commit"
        raise ResourceError(str(path), f"would have units of several commits ({', '.join(commits)})", remedy)
    content = {
        "experiment": experiment,
        "recipe": recipe,
        "scale": scale.name,
        "command": scale.command,
        "commits": commits,
        "machines": _distinct(environment["machine"] for environment in environments),
        "versions": _distinct(environment["versions"] for environment in environments),
        "sources": sorted({record["sources"] for record in records}),
        **summary,
        "sheets": _sheets(scale, planned) if experiment == "hacking" else [],
        "failed": _failed(scale, planned),
        "missing": [[unit.arm, unit.seed] for unit in planned if unit.hash not in known],
        "units": records,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    part.write_text(dump(content))
    part.replace(path)
    return path


def summarise(experiment: str, records: Sequence[Record]) -> Record:
    """{arms: arm -> its numbers as intervals over seeds, differences: arm -> reference minus arm, by seed}."""
    plan = EXPERIMENTS[experiment]
    by_arm: dict[str, dict[int, Record]] = {}
    for record in records:
        whole = _with_gap(record, plan.judge) if plan.judge else record
        by_arm.setdefault(record["arm"], {})[record["seed"]] = whole
    differences: Record = {}
    for arm, own in by_arm.items():
        reference = plan.reference_of(arm)
        if reference != arm and reference in by_arm:
            found = {
                metric: paired(_by_seed(by_arm[reference], place), _by_seed(own, place))
                for metric, place in _metrics([*own.values(), *by_arm[reference].values()]).items()
            }
            differences[arm] = {"reference": reference, **{name: each for name, each in found.items() if each}}
    arms = {arm: _arm(arm, list(own.values())) for arm, own in by_arm.items()}
    gaps = {"gaps": _gaps(by_arm)} if experiment == "critic" else {}
    return {"arms": arms, "differences": differences, **gaps}


def dump(content: Record) -> str:
    """JSON that a person can read and a diff can show: a unit and an arm's number a line."""
    lines = []
    for name, value in _rounded(content).items():
        lines.append(f" {json.dumps(name)}: {_block(value, 1)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load(scale: Scale) -> dict[str, Record]:
    """<experiment>-<recipe> -> its aggregated file, for all that exist. An arm gets the plan's present label."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(scale.results.glob("*.json"))}
    for content in found.values():
        for name, arm in content.get("arms", {}).items():
            arm["label"] = ARMS[name].label if name in ARMS else arm["label"]
    return found


def recorded(scale: Scale) -> dict[str, Record]:
    """Hash -> record of every unit in the aggregated files; experiments share units."""
    return {record["hash"]: record for content in load(scale).values() for record in content.get("units", ())}


def _with_gap(record: Record, judge: str) -> Record:
    """The record with `gap`, what the main reward gained minus what the judge gained, at the end and at each point of
    the curve. It grows where a policy learns to please the reward and nothing else."""
    main, curve = record["reward"], record["curve"]
    base = curve[0]["rewards"]

    def gap(rewards: Mapping[str, float]) -> float:
        return (rewards[main] - base[main]) - (rewards[judge] - base[judge])

    points = [{**point, "rewards": {**point["rewards"], "gap": gap(point["rewards"])}} for point in curve]
    return {**record, "gap": record["gain"][main]["mean"] - record["gain"][judge]["mean"], "curve": points}


def _gaps(by_arm: Mapping[str, Mapping[int, Record]]) -> list[Interval]:
    """Of each step: explained variance of ten times the rollouts in its best pass, minus the pretrained critic's."""
    most, own = by_arm.get("ten_times", {}), by_arm.get("pretrained", {})
    found = []
    for step in range(len(next(iter(most.values()))["critic"]["best"]) if most else 0):
        gap = paired(
            _by_seed(most, ("critic", "best", step)),
            _by_seed(own, ("critic", "explained_variance", step)),
        )
        found += [gap] if gap else []
    return found


def _arm(arm: str, records: Sequence[Record]) -> Record:
    """What there is to say of one arm, over its seeds."""
    first = records[0]
    content: Record = {
        "label": ARMS[arm].label,
        "settings": first["overrides"],
        "seeds": sorted(record["seed"] for record in records),
        "images": first["images"],
        "updates": first["updates"],
    }
    content |= {
        name: t_interval(_at(record, metric) for record in records) for name, metric in _metrics(records).items()
    }
    if any(record.get("recoveries") for record in records):
        content["recoveries"] = {record["seed"]: record["recoveries"] for record in records if record["recoveries"]}
    if "curve" in first:
        content["curve"] = [_point(points) for points in zip(*(record["curve"] for record in records), strict=True)]
    return content


def _point(points: Sequence[Record]) -> Record:
    names = points[0]["rewards"].keys()
    return {
        "images": points[0]["images"],
        "seconds": float(np.mean([point["seconds"] for point in points])),
        "rewards": {name: t_interval(point["rewards"][name] for point in points) for name in names},
    }


def _metrics(records: Sequence[Record]) -> dict[str, Metric]:
    """Name -> where a unit has that number, for all that every one of `records` has."""
    first = records[0]
    found: dict[str, Metric] = {}
    for name in first.get("final", {}):
        found |= {f"{kind}.{name}": (kind, name, "mean") for kind in ("base", "final", "gain")}
        found[f"drift.{name}"] = ("drift", name)
    found |= {name: (name,) for name in ("score", "gap", "kl", "clip_share", "zero_std_share")}
    found |= {f"seconds.{part}": ("seconds", part) for part in ("pretraining", "training")}
    found["diversity_kept"] = ("diversity_kept", "ratio")
    for kind in ("explained_variance", "best", "pretrained", "rank_correlation"):
        found |= {f"{kind}.{step}": ("critic", kind, step) for step in range(len(_at(first, ("critic", kind)) or ()))}
    return {name: metric for name, metric in found.items() if all(_at(each, metric) is not None for each in records)}


def _by_seed(records: Mapping[int, Record], metric: Metric) -> dict[int, float]:
    return {seed: _at(record, metric) for seed, record in records.items()}


def _at(record: Record, metric: Metric) -> Any:
    """The value at that place, or None where there is no such place."""
    value: Any = record
    for key in metric:
        if isinstance(value, list) and isinstance(key, int):
            value = value[key]
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def _compact(result: Record) -> Record:
    """What of a unit's result goes into the aggregated file."""
    kept = {name: value for name, value in result.items() if name not in _DROPPED}
    return {**kept, "environment": {name: result[name] for name in ("commit", "machine", "versions")}}


def _failed(scale: Scale, planned: Sequence[Unit]) -> list[Record]:
    """Units that ended with an error and have no result."""
    found = []
    for unit in planned:
        failure = scale.folder / unit.name / FAILURE
        if failure.exists():
            found.append({name: value for name, value in json.loads(failure.read_text()).items() if name != "hash"})
    return found


def _sheets(scale: Scale, planned: Sequence[Unit]) -> list[list[str]]:
    """[what, file] of the images of seed 0 that lie beside the aggregated file: the same prompts and noise, a row
    each. Copied from where its units ran."""
    found = []
    first = [unit for unit in planned if unit.seed == 0]
    rows = [(unit, "base.png", "base", "base") for unit in first[:1]]
    rows += [(unit, "trained.png", unit.arm, ARMS[unit.arm].label) for unit in first]
    for unit, name, short, label in rows:
        target = scale.results / f"hacking-{unit.recipe}-{short}.png"
        if (scale.folder / unit.name / name).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(scale.folder / unit.name / name, target)
        found += [[label, target.name]] if target.exists() else []
    return found


def _distinct(items: Iterable[Record]) -> list[Record]:
    return [json.loads(text) for text in sorted({json.dumps(item, sort_keys=True) for item in items})]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def _block(value: Any, depth: int) -> str:
    """Containers of containers over several lines down to the third level, everything else on one."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    if depth > 3 or not any(isinstance(each, dict) for each in inner):
        return json.dumps(value)
    indent, end = " " * (depth + 1), " " * depth
    deeper = 4 if isinstance(value, list) else depth + 1
    if isinstance(value, dict):
        rows = [f"{indent}{json.dumps(name)}: {_block(each, deeper)}" for name, each in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{end}}}"
    return "[\n" + ",\n".join(f"{indent}{_block(each, deeper)}" for each in value) + f"\n{end}]"

"""What several runs have in common, where they differ, and what of them can be compared: one dictionary of plain JSON.

Runs are gathered into series: a series is one run, or the runs of one point of a sweep, which differ in their seed. The
numbers of a series of one run have intervals over its images, those of several runs intervals over their seeds.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentac.evaluation.measures import difference, interval, over_seeds
from latentac.runs.reporting.rendering import flat
from latentac.runs.reporting.summary import Files, Summary, read_json, read_scores
from latentac.system.steps import up_to

_STEPS = up_to("gate")
_FIGURES = {"base": "base", "trained": "trained", "gain": "difference"}
_RESAMPLING = 2000, 0  # bootstrap samples and their seed
_UNPAIRED = 1.96  # standard errors to an end of a 95 % interval, where only two intervals are known
_NO_SCORE = {"weight", "timeout_seconds", "retries"}
_NO_SETTINGS = {
    "recipe",
    "seed",
    "serving",
    "tracking",
}  # the first two have columns of their own, the others no effect


@dataclass(frozen=True)
class Read:
    """What one run has published. files: its artifacts; point: of a sweep, or the run's own name."""

    run: str
    files: Files
    summary: Summary
    point: str

    @property
    def reached(self) -> str:
        """The last step that it published; a held run ends with its gate."""
        return [step for step in _STEPS if step in self.files][-1]

    @property
    def held_out(self) -> str:
        """A mark of the held-out prompts: two runs with the same one are asked the same."""
        manifest, folder = self.files["prepare"]
        if not (folder / "prompts.json").exists():
            return manifest.key  # nothing is known of them
        prompts = read_json(self.files["prepare"], "prompts.json")["held_out"]
        texts = sorted(prompt["text"] if isinstance(prompt, dict) else prompt for prompt in prompts)
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    @property
    def base(self) -> dict[str, str]:
        """The files of the untrained model and their hashes."""
        files = self.files["prepare"][0].files
        return {file.path: file.sha256 for file in files if file.path.startswith("backbone/")}

    def reward(self, name: str) -> Mapping[str, Any] | None:
        """How the reward is configured, but for what changes no score of an image."""
        for entry in self.summary["settings"]["rewards"]:
            if entry.get("name", entry.get("use")) == name:
                return {field: value for field, value in entry.items() if field not in _NO_SCORE}
        return None

    def figure(self, reward: str, figure: str) -> Mapping[str, Any] | None:
        """{mean, low, high, n} of `base`, `trained` or `gain`, or None."""
        rows = (self.summary["evaluation"] or {}).get(_FIGURES[figure]) or {}
        row: Mapping[str, Any] | None = rows.get(reward)
        return row if row is not None and row["mean"] is not None else None


def compare(runs: Sequence[Read]) -> Summary:
    """The content of comparison.json; its schema is in the README beside this file. The others are compared with the
    first series."""
    points = list(dict.fromkeys(run.point for run in runs))
    series = [[run for run in runs if run.point == point] for point in points]
    names = list(dict.fromkeys(name for run in runs for name in _rewards(run)))
    return {
        "series": [
            {
                "letter": letter(place),
                "label": points[place],
                "runs": [_head(run) for run in group],
                "training": _curves(group, names),
                "critic": _critic(group),
                "gate": _gate(group),
            }
            for place, group in enumerate(series)
        ],
        "settings": _differing(runs),
        "rewards": [_reward(name, series) for name in names],
        "notes": list(_notes(series)),
    }


def letter(place: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (letter(place // 26 - 1) if place >= 26 else "") + chr(ord("A") + place % 26)


def _rewards(run: Read) -> list[str]:
    """The run's rewards, the one that it is gated by first."""
    settings = run.summary["settings"]
    listed = [entry.get("name", entry.get("use")) for entry in settings["rewards"]]
    return list(dict.fromkeys([settings["gate"]["reward"], *listed]))


def _head(run: Read) -> Summary:
    summary, done = run.summary, run.reached == _STEPS[-1]
    trained = summary["training"][-1]["images"] if summary["training"] else 0
    return {
        **{name: summary[name] for name in ("run", "recipe", "seed", "commit", "created")},
        "state": "complete" if done else f"stopped after {run.reached}",
        "decision": (summary["gate"] or {}).get("decision"),
        "images": trained,
        "seconds": summary["seconds"]["total"],
    }


def _differing(runs: Sequence[Read]) -> list[Summary]:
    """{path, values: one a run} of each setting that is not the same in all; seed and recipe stand with the runs."""
    leaves = [dict(flat(run.summary["settings"])) for run in runs]
    paths = dict.fromkeys(path for found in leaves for path in found if path.split(".")[0] not in _NO_SETTINGS)
    rows = [{"path": path, "values": [found.get(path) for found in leaves]} for path in paths]
    return [row for row in rows if len(set(row["values"])) > 1]


def _curves(group: Sequence[Read], rewards: Sequence[str]) -> list[list[Summary]]:
    """One list a run: {images, rewards, kl, explained_variance: mean over the steps} of each iteration."""

    def mean(values: Sequence[float | None] | None) -> float | None:
        known = [value for value in values or () if value is not None]
        return sum(known) / len(known) if known else None

    return [
        [
            {
                "images": row["images"],
                "rewards": {name: (row["rewards"] or {}).get(name) for name in rewards},
                "kl": row["kl"],
                "explained_variance": mean(row["explained_variance"]),
            }
            for row in run.summary["training"]
            if row["images"] is not None
        ]
        for run in group
    ]


def _critic(group: Sequence[Read]) -> list[float] | None:
    """Explained variance a step on held-out prompts, after training, mean over the runs; None where there is none."""
    found = [run.summary["critic"]["explained_variance_trained"] for run in group]
    whole = [values for values in found if values and None not in values]
    if not whole or len({len(values) for values in whole}) > 1:
        return None
    return [float(value) for value in np.mean(whole, 0)]


def _gate(group: Sequence[Read]) -> list[Summary | None]:
    """The decision of each run, and the reasons where it was held."""
    gates = [run.summary["gate"] for run in group]
    return [
        gate and {"decision": gate["decision"], "reasons": [] if gate["decision"] == "promote" else gate["reasons"]}
        for gate in gates
    ]


def _reward(name: str, series: Sequence[Sequence[Read]]) -> Summary:
    """{reward, unit, series: [{base, trained, gain, over}], differences: of each trained mean to that of the first}."""
    units = [((run.summary["evaluation"] or {}).get("units") or {}).get(name) for group in series for run in group]
    return {
        "reward": name,
        "unit": next((unit for unit in units if unit), None),
        "series": [
            {
                **{figure: _figure(group, name, figure) for figure in _FIGURES},
                "over": "seeds" if len(group) > 1 else "images",
            }
            for group in series
        ],
        "differences": [None, *(_difference(group, series[0], name) for group in series[1:])],
    }


def _figure(group: Sequence[Read], reward: str, figure: str) -> Summary | None:
    rows = [row for run in group if (row := run.figure(reward, figure)) is not None]
    if not rows:
        return None
    return dict(rows[0]) if len(group) == 1 else over_seeds([row["mean"] for row in rows])


def _difference(group: Sequence[Read], reference: Sequence[Read], reward: str) -> Summary | None:
    """{mean, low, high, n, how}: the trained mean minus that of the reference, where the two are of one kind."""
    if _obstacle(group[0], reference[0], reward) or not all(run.figure(reward, "trained") for run in reference[:1]):
        return None
    if len(group) == len(reference) == 1:
        return _of_images(group[0], reference[0], reward) if group[0].figure(reward, "trained") else None
    others = {run.summary["seed"]: run.figure(reward, "trained") for run in reference}
    pairs = [
        trained["mean"] - other["mean"]
        for run in group
        if (trained := run.figure(reward, "trained")) and (other := others.get(run.summary["seed"]))
    ]
    return {**over_seeds(pairs), "how": "seed by seed"} if pairs else None


def _of_images(run: Read, reference: Read, reward: str) -> Summary | None:
    scores = [read_scores(each.files) for each in (run, reference)]
    if None in scores:  # an earlier version published means alone
        return _of_intervals(run.figure(reward, "trained"), reference.figure(reward, "trained"))
    own, other = (each for each in scores if each is not None)
    listed = [each["rewards"].get("trained", {}).get(reward) for each in (own, other)]
    if None in listed:
        return None
    first, second = map(np.array, listed)
    if own["prompts"] == other["prompts"] and own["noise"] == other["noise"]:
        return {**interval(first - second, *_RESAMPLING), "how": "paired"}
    return {**difference(first, second, *_RESAMPLING), "how": "unpaired"}


def _of_intervals(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> Summary | None:
    """The difference of two independent means of which only the intervals are known."""
    if first is None or second is None:
        return None
    mean = first["mean"] - second["mean"]
    whole = [row for row in (first, second) if None not in (row["low"], row["high"])]
    errors = [(row["high"] - row["low"]) / (2 * _UNPAIRED) for row in whole]
    half = _UNPAIRED * sum(error**2 for error in errors) ** 0.5
    number = min((row["n"] for row in (first, second) if row["n"] is not None), default=None)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": number, "how": "unpaired"}


def _obstacle(run: Read, reference: Read, reward: str) -> str:
    """Why the two cannot be held against each other by this reward, or nothing."""
    own, other = run.reward(reward), reference.reward(reward)
    if own is None or other is None:
        return f"{(run if own is None else reference).point} has no reward {reward}"
    if own != other:
        return f"{reward} is configured differently"
    units = [((each.summary["evaluation"] or {}).get("units") or {}).get(reward) for each in (run, reference)]
    if None not in units and units[0] != units[1]:
        return f"{reward} has different units"
    return "" if run.held_out == reference.held_out else "they have different held-out prompts"


def _notes(series: Sequence[Sequence[Read]]) -> Iterator[str]:
    """What cannot be compared, and what to keep in mind where it can."""
    reference, names = series[0][0], _rewards(series[0][0])
    for place, group in enumerate(series):
        for run in group:
            if run.reached != _STEPS[-1]:
                yield f"{letter(place)} ({run.run}) stopped after {run.reached}; later steps are missing here"
        if place == 0:
            continue
        pair = f"{letter(place)} and A"
        every = list(dict.fromkeys([*names, *_rewards(group[0])]))
        obstacles = dict.fromkeys(filter(None, (_obstacle(group[0], reference, name) for name in every)))
        for obstacle in obstacles:
            yield f"the trained rewards of {pair} cannot be compared: {obstacle}"
        gated = [run.summary["settings"]["gate"]["reward"] for run in (group[0], reference)]
        if gated[0] != gated[1]:
            yield f"the gates of {pair} use different rewards: {gated[0]} and {gated[1]}"
        if group[0].base != reference.base:
            yield f"{pair} start from different base models, so their gains have different references"
        how = [_difference(group, series[0], name) for name in names]
        if any(row is not None and row["how"] == "unpaired" for row in how):
            yield f"{pair} were not evaluated on the same prompts and noise, so their difference is not paired"

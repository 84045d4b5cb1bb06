"""The result tables and their figures, from the aggregated files and from nothing else."""

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.aggregate import load
from benchmarks.claims import CLAIMS, MIN_SEEDS, MULTIPLES, Results, near, series
from benchmarks.plan import ARMS, EXPERIMENTS, Scale

BEGIN, END = "<!-- results -->", "<!-- /results -->"
NOTHING = "Nothing has been recorded yet: `make evidence` writes this section."

_TITLES = {
    "main": "ours and four baselines",
    "ablations": "ablations of ours",
    "hacking": "one learned reward, or three",
    "critic": "how good the pretrained critic is",
    "cost": "what the critic costs",
    "steering": "steering",
    "serving": "the endpoint",
}
_SHOWN = ("best_of_n", "resampling", "value_gradient", "fk_true", "best_of_n_cfg")
"""Ways to steer that the tables show. The file has all of them."""

File = Mapping[str, Any]


def write_report(scale: Scale) -> list[Path]:
    """Draw the figures and write the section between the markers of the scale's README. Returns what was written."""
    from benchmarks import figures  # matplotlib, which the section alone does without

    results = load(scale)
    written = figures.draw(results, scale.results)
    if not scale.readme.exists():
        scale.readme.parent.mkdir(parents=True, exist_ok=True)
        scale.readme.write_text(f"# Results of `{scale.command}`\n\n{BEGIN}\n{END}\n")
    text = scale.readme.read_text()
    scale.readme.write_text(replaced(text, section(results, os.path.relpath(scale.results, scale.readme.parent))))
    return [*written, scale.readme]


def replaced(text: str, content: str) -> str:
    """`text` with `content` between the markers. Raises ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{content}{END}{after}"


def section(results: Results, folder: str) -> str:
    """Markdown of all results. folder: of the figures, as the document links to it."""
    parts = []
    for recipe in dict.fromkeys(found["recipe"] for found in results.values()):
        for experiment in _TITLES:
            if found := results.get(f"{experiment}-{recipe}"):
                parts.append("\n".join(_part(experiment, found, results, folder)))
    return "\n\n".join(parts) + "\n" if parts else f"{NOTHING}\n"


def _part(experiment: str, found: File, results: Results, folder: str) -> Iterator[str]:
    recipe = found["recipe"]
    yield f"### {_TITLES[experiment][0].upper()}{_TITLES[experiment][1:]} (`{recipe}`)"
    yield ""
    tables = {
        "main": _arms,
        "ablations": _arms,
        "hacking": _rewards,
        "critic": _steps,
        "cost": _cost,
        "steering": steering,
        "serving": _serving,
    }
    yield from tables[experiment](found)
    yield ""
    if experiment not in ("cost", "serving"):
        yield f"![{_TITLES[experiment]}]({folder}/{experiment}-{recipe}.svg)"
        yield ""
    for label, picture in found.get("pictures", ()):
        yield f"{label}: ![{label}]({folder}/{picture})"
        yield ""
    for claim in CLAIMS:
        if claim.experiment == experiment:
            verdict = claim.verdict(results, recipe)
            yield f"- **{verdict.word}**: {claim.sentence}. ({verdict.reason})"
    yield ""
    yield from _provenance(found)


def _arms(found: File) -> Iterator[str]:
    """What was spent, then a table with a row an arm."""
    arms, reference = found["arms"], EXPERIMENTS[found["experiment"]].reference
    first = next(iter(arms.values()))
    against = ARMS[reference].label.partition(":")[0].capitalize()
    yield (
        f"Each arm: {first['images']:,} scored pictures and {first['updates']} actor updates, value pretraining "
        "included. Verifier: share of held-out pictures that show exactly what the caption says. Mean over seeds with "
        "its 95 % interval (Student's t); differences are taken seed by seed, on the same prompts and noise."
    )
    yield ""
    yield (
        f"| Arm | Seeds | Verifier | {against} minus it | Diversity kept | Explained variance, first and last step "
        "| Rank correlation | Processor minutes |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    if "base.shapes_verifier" in first:
        yield f"| base, untrained | {first['base.shapes_verifier']['n']} | {told(first['base.shapes_verifier'])} ||||||"
    for name, arm in arms.items():
        difference = found["differences"].get(name, {})
        own = difference.get("reference", reference) == reference
        explained, ranks = series(arm, "explained_variance"), series(arm, "rank_correlation")
        yield _row(
            arm["label"],
            arm["updates"] and len(arm["seeds"]),
            told(arm.get("final.shapes_verifier")),
            told(difference.get("final.shapes_verifier"), signed=True) if own else "",
            told(arm.get("diversity_kept")),
            f"{explained[0]['mean']:.2f}, {explained[-1]['mean']:.2f}" if explained else "",
            f"{ranks[-1]['mean']:.2f}" if ranks else "",
            _minutes(arm),
        )


def _rewards(found: File) -> Iterator[str]:
    """A row an arm, a column a reward, trained on or not."""
    arms = found["arms"]
    first = next(iter(arms.values()))
    names = [metric.removeprefix("final.") for metric in first if metric.startswith("final.")]
    yield (
        f"Each arm: {first['images']:,} scored pictures and {first['updates']} actor updates. Means over seeds on "
        "held-out prompts with 95 % intervals, and in the last line one arm minus the other, seed by seed."
    )
    yield ""
    yield _row("Trained on", "Seeds", *(f"`{name}`" for name in names), "Diversity kept")
    yield "|---" * (len(names) + 3) + "|"
    bases = (told(first[f"base.{name}"]) for name in names)
    yield _row("nothing (base)", len(first["seeds"]), *bases, "")
    for arm in arms.values():
        finals = (told(arm.get(f"final.{name}")) for name in names)
        yield _row(arm["label"], len(arm["seeds"]), *finals, told(arm.get("diversity_kept")))
    for name, difference in found["differences"].items():
        numbers = (told(difference.get(f"final.{reward}"), signed=True) for reward in names)
        label = f"{arms[difference['reference']]['label']} minus {arms[name]['label']}"
        yield _row(label, "", *numbers, told(difference.get("diversity_kept"), signed=True))


def _steps(found: File) -> Iterator[str]:
    """A column a denoising step."""
    steps = len(found["gaps"]) or len(series(next(iter(found["arms"].values())), "explained_variance"))
    budgets = ", ".join(f"{arm['label']}: {arm['images']:,}" for arm in found["arms"].values())
    yield (
        "Share of the reward's variance on held-out prompts that the critic explains at each denoising step of the "
        f"base model, from noise to picture; the larger one in its best pass at each step. Scored pictures: {budgets}."
    )
    yield ""
    yield _row("Step", *range(1, steps + 1))
    yield "|---" * (steps + 1) + "|"
    for name, arm in found["arms"].items():
        numbers = series(arm, "best" if name == "ten_times" else "explained_variance")
        yield _row(arm["label"], *(f"{each['mean']:.3f}" for each in numbers))
    if found["gaps"]:
        yield _row("gap", *(f"{each['mean']:+.3f}" for each in found["gaps"]))


def _cost(found: File) -> Iterator[str]:
    ratio, recipe = found["ratio"], found["recipe_ratio"]
    yield (
        f"The same process does iterations of DDPO and of ours in turns: {found['images']} pictures, {found['steps']} "
        f"denoising steps, {found['updates']} updates. Median of the ratios of {ratio['n']} turns to DDPO: with values "
        f"alone {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}], with what the recipe does "
        f"besides (their gradient, pictures if it remembers any) {recipe['median']:.3f} "
        f"[{recipe['low']:.3f}, {recipe['high']:.3f}]."
    )
    yield ""
    yield "| Seconds an iteration (median) | Rollout and scoring | Actor updates | Critic updates and credit | All |"
    yield "|---|---|---|---|---|"
    for name, parts in found["seconds"].items():
        yield _row(name, *(f"{parts[part]:.2f}" for part in ("rollout", "actor", "critic", "all")))


def _serving(found: File) -> Iterator[str]:
    """Pictures a second with and without batching, and what the way to one picture takes."""
    alone, overhead = found["alone"], found["overhead"]
    yield (
        f"Two servers of one model take turns, each with a worker a core; {found['callers']} callers, "
        f"{found['steps']} steps. One puts up to {found['batch_rows']} rollouts together, the other draws each by "
        f"itself. With one caller a plain picture takes {alone['served'] * 1000:.0f} ms through HTTP, "
        f"{alone['drawn'] * 1000:.0f} ms drawn in the same way within a process (ratio {overhead['median']:.2f} "
        f"[{overhead['low']:.2f}, {overhead['high']:.2f}]), and {alone['bare'] * 1000:.0f} ms in a batch of one "
        "without values: the rest is the price of a fixed batch, in which a picture's bytes do not depend on the load."
    )
    yield ""
    yield _row("Pictures a second", "batched", "one by one", "ratio")
    yield "|---" * 4 + "|"
    for method, rates in found["rates"].items():
        ratio = found["throughput"][method]
        told_ratio = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        yield _row(f"`{method}`", f"{rates['batched']:.1f}", f"{rates['single']:.1f}", told_ratio)


def steering(found: File, *, every: bool = False) -> Iterator[str]:
    """On each weights a row a way and choice, a column a number of evaluations; then all rewards at 4 K; then costs.

    every: all ways, instead of those that a reader asks for first.
    """
    points = [point for point in found["points"] if every or point["way"] in _SHOWN]
    found = {**found, "points": points}
    reward, steps = found["reward"], found["steps"]
    yield (
        f"`{reward}` on {found['prompts']} held-out prompts, the same noise for all; evaluations a picture, "
        f"K = {steps}: a backward pass counts 2 and CFG doubles; where a way has no such number of candidates, the "
        f"nearest below. Half of a 95 % interval is {_half(points[0]['rewards'][reward]):.3f}. Best-of-N by "
        "the true reward asks the reward itself N times."
    )
    yield ""
    yield _row("Weights", "Way", "Last choice by", *(f"{multiple} K" for multiple in MULTIPLES))
    yield "|---" * (len(MULTIPLES) + 3) + "|"
    cells: dict[tuple[str, str, str], dict[int, str]] = {}
    for weights, multiple in itertools.product(("base", "trained"), MULTIPLES):
        for point in near(found, weights, multiple):
            for choice in ("critic", "reward") if point["choice"] == "none" else (point["choice"],):
                way = weights, point["label"].partition(" x")[0], choice
                cells.setdefault(way, {})[multiple] = f"{point['rewards'][reward]['mean']:.3f}"
    for way, row in cells.items():
        yield _row(*way, *(row.get(multiple, "") for multiple in MULTIPLES))
    yield ""
    yield from _at_4k(found, every)
    yield ""
    cost = found["cost"]["base"]
    particle, gradient = (
        f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        for ratio in (cost["resampling"], cost["value_gradient"])
    )
    yield (
        f"Processor time of a rollout of {cost['rows']} rows over that of a plain one, median of "
        f"{cost['resampling']['n']} turns: with particles {particle}, with a gradient at every step {gradient}."
    )


def _at_4k(found: File, every: bool) -> Iterator[str]:
    """What else the pictures are: the other rewards, diversity, seconds."""
    points = [point for weights in ("base", "trained") for point in near(found, weights, 4)]
    names = list(points[0]["rewards"])
    yield _row("At 4 K", *(f"`{name}`" for name in names), "Diversity", "ms a picture")
    yield "|---" * (len(names) + 3) + "|"
    for point in points:
        if every or (point["way"] in _SHOWN[:3] and point["choice"] != "critic"):
            rewards = (f"{point['rewards'][name]['mean']:.3f}" for name in names)
            label = f"{point['weights']}: {point['label']}"
            yield _row(label, *rewards, f"{point['diversity']['mean']:.3f}", f"{1000 * point['seconds']:.0f}")


def _half(interval: Mapping[str, Any]) -> float:
    return float(interval["high"] - interval["low"]) / 2


def _provenance(found: File) -> Iterator[str]:
    machines = "; ".join(
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores" for machine in found["machines"]
    )
    commits = ", ".join(f"`{commit[:8]}{'-dirty' if commit.endswith('-dirty') else ''}`" for commit in found["commits"])
    yield f"`{found['command']}` at {commits} on {machines}."
    if len(found.get("sources", [""])) > 1:
        yield f"The units ran on {len(found['sources'])} states of the sources."
    if found.get("missing"):
        arms = ", ".join(f"{arm} (seed {seed})" for arm, seed in found["missing"])
        yield f"Not run yet: {arms}. A verdict needs {MIN_SEEDS} seeds."
    for failure in found.get("failed", []):
        yield f"Failed: {failure['arm']}, seed {failure['seed']}: {failure['problem']}"


def told(interval: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """`0.512 [0.480, 0.544]`, or without interval where there is one seed."""
    if interval is None:
        return ""
    sign = "+" if signed else ""
    mean = f"{interval['mean']:{sign}.3f}"
    return mean if interval["low"] is None else f"{mean} [{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def _minutes(arm: Mapping[str, Any]) -> str:
    parts = [arm[name]["mean"] for name in ("seconds.pretraining", "seconds.training") if name in arm]
    return f"{sum(parts) / 60:.1f}" if parts else ""


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"

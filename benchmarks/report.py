"""The result tables and their figures, made from the aggregated files alone."""

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
    "main": "ours and four other methods",
    "ablations": "ablations of ours",
    "hacking": "one learned reward against three rewards",
    "combination": "a weighted sum, a clipped reward, and a floor",
    "words": "training on one OCR engine, judged by another",
    "critic": "how good the pretrained critic is",
    "cost": "what the critic costs",
    "steering": "steering",
    "serving": "the endpoint",
    "scoring": "rollouts and scoring at the same time",
    "scaling": "two workers and one",
}
_SHOWN = ("best_of_n", "resampling", "value_gradient", "fk_true", "best_of_n_cfg")
"""Steering methods that the tables show. The file has all of them."""

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
        "combination": _rewards,
        "words": _rewards,
        "critic": _steps,
        "cost": _cost,
        "steering": steering,
        "serving": _serving,
        "scoring": _scoring,
        "scaling": _scaling,
    }
    yield from tables[experiment](found)
    yield ""
    if experiment not in ("cost", "serving", "scoring", "scaling"):
        yield f"![{_TITLES[experiment]}]({folder}/{experiment}-{recipe}.svg)"
        yield ""
    for label, sheet in found.get("sheets", ()):
        yield f"{label}: ![{label}]({folder}/{sheet})"
        yield ""
    for claim in CLAIMS:
        if claim.experiment == experiment:
            verdict = claim.verdict(results, recipe)
            yield f"- **{verdict.word}**: {claim.sentence}. ({verdict.reason})"
    yield ""
    yield from _provenance(found)


def _arms(found: File) -> Iterator[str]:
    """What was spent, then a table with one row per arm."""
    arms, reference = found["arms"], EXPERIMENTS[found["experiment"]].reference
    first = next(iter(arms.values()))
    against = ARMS[reference].label.partition(":")[0].capitalize()
    yield (
        f"Each arm: {first['images']:,} scored images and {first['updates']} policy updates, value pretraining "
        "included. Verifier: share of held-out images that show exactly what the prompt says. Numbers are means over "
        "seeds with 95 % intervals (Student's t). Differences are taken per seed, on the same prompts and noise."
    )
    yield ""
    yield (
        f"| Arm | Seeds | Verifier | {against} minus this arm | Diversity kept | Explained variance, first and last "
        "step | Rank correlation | Processor minutes |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    if "base.shapes_verifier" in first:
        base = first["base.shapes_verifier"]
        yield f"| base, untrained | {base['n']} | {ranged(base)} ||||||"
    for name, arm in arms.items():
        difference = found["differences"].get(name, {})
        own = difference.get("reference", reference) == reference
        explained, ranks = series(arm, "explained_variance"), series(arm, "rank_correlation")
        yield _row(
            arm["label"],
            arm["updates"] and len(arm["seeds"]),
            ranged(arm.get("final.shapes_verifier")),
            ranged(difference.get("final.shapes_verifier"), signed=True) if own else "",
            ranged(arm.get("diversity_kept")),
            f"{explained[0]['mean']:.2f}, {explained[-1]['mean']:.2f}" if explained else "",
            f"{ranks[-1]['mean']:.2f}" if ranks else "",
            _minutes(arm),
        )


def _rewards(found: File) -> Iterator[str]:
    """One row per arm, one column per reward, trained on or not."""
    arms = found["arms"]
    first = next(iter(arms.values()))
    names = [metric.removeprefix("final.") for metric in first if metric.startswith("final.")]
    yield (
        f"Each arm: {first['images']:,} scored images and {first['updates']} policy updates. Numbers are means over "
        "seeds on held-out prompts, with 95 % intervals. The last lines are differences of two arms per seed."
    )
    others = {"Diversity kept": "diversity_kept"}
    if judge := EXPERIMENTS[found["experiment"]].judge:
        yield f"The gap is the gain of the reward that is trained on, minus the gain of `{judge}`, the judge."
        others = {"Gap": "gap", **others}
    yield ""
    yield _row("Trained on", "Seeds", *(f"`{name}`" for name in names), *others)
    yield "|---" * (len(names) + 2 + len(others)) + "|"
    bases = (ranged(first[f"base.{name}"]) for name in names)
    yield _row("nothing (base)", len(first["seeds"]), *bases, *("" for _ in others))
    metrics = [*(f"final.{name}" for name in names), *others.values()]
    for arm in arms.values():
        yield _row(arm["label"], len(arm["seeds"]), *(ranged(arm.get(metric)) for metric in metrics))
    for name, difference in found["differences"].items():
        label = f"{arms[difference['reference']]['label']} minus {arms[name]['label']}"
        yield _row(label, "", *(ranged(difference.get(metric), signed=True) for metric in metrics))


def _steps(found: File) -> Iterator[str]:
    """One column per denoising step."""
    steps = len(found["gaps"]) or len(series(next(iter(found["arms"].values())), "explained_variance"))
    budgets = ", ".join(f"{arm['label']}: {arm['images']:,}" for arm in found["arms"].values())
    yield (
        "Explained variance of the reward on held-out prompts, at each denoising step of the base model, from noise to "
        "image. For the critic with ten times the rollouts, each step has the number of passes that is best there. "
        f"Scored images: {budgets}."
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
        "One process alternates between iterations of DDPO and of ours. An iteration has "
        f"{found['images']} images, {found['steps']} denoising steps, and {found['updates']} updates. The time of ours "
        f"divided by that of DDPO, median of {ratio['n']} pairs, is {ratio['median']:.3f} "
        f"[{ratio['low']:.3f}, {ratio['high']:.3f}] if the critic is only a baseline (row `values`). It is "
        f"{recipe['median']:.3f} [{recipe['low']:.3f}, {recipe['high']:.3f}] with all that the recipe does (row "
        "`recipe`: also the value gradient, and replay if the recipe has it)."
    )
    yield ""
    yield "| Seconds per iteration (median) | Rollout and scoring | Policy updates | Critic and advantages | All |"
    yield "|---|---|---|---|---|"
    for name, parts in found["seconds"].items():
        yield _row(name, *(f"{parts[part]:.2f}" for part in ("rollout", "actor", "critic", "all")))


def _scoring(found: File) -> Iterator[str]:
    """Seconds of an iteration by part, and ratios to the longer of rollout and scoring."""
    yield (
        f"One worker makes {found['images']} images per iteration, in blocks of {found['block_images']}. The reward "
        f"takes {found['seconds_per_image'] * 1000:.0f} ms per image in {found['processes']} processes, so scoring "
        f"takes at least {found['least_scoring']:.2f} s. A reward that waits leaves the cores to the rollouts, as one "
        "on a GPU or a server does. One that computes shares them. The ratios are to the longer of rollouts and "
        "scoring in the same iteration."
    )
    yield ""
    yield _row("The reward", "Rollouts", "Scoring", "Both", "Ratio", "Iteration, with updates", "Ratio")
    yield "|---" * 7 + "|"
    for kind in ("waits", "computes"):
        seconds = {part: f"{value:.2f} s" for part, value in found[kind]["seconds"].items()}
        ratios = [found[kind][name] for name in ("ratio", "iteration_ratio")]
        both, whole = (f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" for ratio in ratios)
        parts = seconds["rollout"], seconds["scoring"], seconds["both"]
        yield _row(kind, *parts, both, seconds["iteration"], whole)


def _scaling(found: File) -> Iterator[str]:
    """Seconds of an iteration of one worker and of two, and the ratio."""
    speedup, seconds = found["speedup"], found["seconds"]
    yield (
        f"One worker on one core, and two workers of another training on that core and a second one, do iterations of "
        f"{found['images']} images in turns: rollouts, rewards, and updates of policy and critic. The two exchange "
        f"gradients over gloo. An iteration takes {seconds['one']:.2f} s with one and {seconds['two']:.2f} s with two, "
        f"so two do {speedup['median']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}] times the images per second."
    )


def _serving(found: File) -> Iterator[str]:
    """Images per second with and without batching, and the time for one image."""
    alone, overhead = found["alone"], found["overhead"]
    yield (
        "Two servers of one model are measured in alternation, each with one worker per core, "
        f"{found['callers']} clients and {found['steps']} denoising steps. One server puts up to "
        f"{found['batch_rows']} rollouts into a batch; the other makes each image by itself. With one client, an image "
        f"without steering takes {alone['served'] * 1000:.0f} ms over HTTP and {alone['drawn'] * 1000:.0f} ms for the "
        f"same batch inside a process (ratio {overhead['median']:.2f} [{overhead['low']:.2f}, "
        f"{overhead['high']:.2f}]). In a batch of one without values it takes {alone['bare'] * 1000:.0f} ms. The "
        "difference is the cost of a fixed batch size, which makes the bytes of an image independent of the load."
    )
    yield ""
    yield _row("Images per second", "batched", "one by one", "ratio")
    yield "|---" * 4 + "|"
    for method, rates in found["rates"].items():
        ratio = found["throughput"][method]
        told_ratio = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        yield _row(f"`{method}`", f"{rates['batched']:.1f}", f"{rates['single']:.1f}", told_ratio)


def steering(found: File, *, every: bool = False) -> Iterator[str]:
    """One row per weights, method and choice, one column per number of evaluations; all rewards at 4 K; then times.

    every: all methods, instead of the most important ones.
    """
    points = [point for point in found["points"] if every or point["way"] in _SHOWN]
    found = {**found, "points": points}
    reward, steps = found["reward"], found["steps"]
    yield (
        f"Mean `{reward}` on {found['prompts']} held-out prompts, with the same noise for all methods, "
        f"± {_half(points[0]['rewards'][reward]):.3f} (95 % interval). The columns are numbers of network evaluations "
        f"per image, with K = {steps}. A backward pass counts 2, and CFG doubles the count. A method whose counts do "
        "not match a column appears with the largest number of particles that fits. Best-of-N by the true reward "
        "calls the reward N times."
    )
    yield ""
    yield _row("Weights", "Method", "Last choice by", *(f"{multiple} K" for multiple in MULTIPLES))
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
        f"Processor time of a steered rollout of {cost['rows']} rows divided by that of a plain one, median of "
        f"{cost['resampling']['n']} pairs: with particles {particle}, with a gradient at every step {gradient}."
    )


def _at_4k(found: File, every: bool) -> Iterator[str]:
    """The other rewards, diversity, and seconds per image."""
    points = [point for weights in ("base", "trained") for point in near(found, weights, 4)]
    names = list(points[0]["rewards"])
    yield _row("At 4 K", *(f"`{name}`" for name in names), "Diversity", "ms per image")
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
        yield f"The units ran on {len(found['sources'])} versions of the source code."
    if found.get("missing"):
        arms = ", ".join(f"{arm} (seed {seed})" for arm, seed in found["missing"])
        yield f"Not run yet: {arms}. A verdict needs {MIN_SEEDS} seeds."
    for failure in found.get("failed", []):
        yield f"Failed: {failure['arm']}, seed {failure['seed']}: {failure['problem']}"


def ranged(interval: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """`0.512 [0.480, 0.544]`, or without interval if there is only one seed."""
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

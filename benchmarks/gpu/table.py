"""The results as Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Record = dict[str, Any]
NOTHING = "–"
GIB = 2**30
RATIO, MEMORY, CRITIC = 1.5, 40 * GIB, 0.05
"""The goals on one H100: LoRA against the plain loop, its memory in bytes, and the critic's share."""
_NAMES = {"ours": "latentac", "grpo": "latentac, GRPO", "plain": "plain loop"}


def document(records: Iterable[Record]) -> str:
    """README.md of a folder of results: those of GPUs first, then dry runs."""
    ordered = sorted(records, key=lambda record: (record["dry_run"], _name(record)))
    head = (
        "# Models of real size\n\n`make bench-gpu` writes this file from the JSON files beside it, one per machine. "
        "[Benchmarks](../../README.md#models-of-real-size) explains each number.\n"
    )
    return "\n".join([head, *map(markdown, ordered)])


def markdown(found: Record) -> str:
    """All tables of a record of `benchmarks.gpu`."""
    dry = found["dry_run"]
    lines = [f"## {'Dry run on ' if dry else ''}{_name(found)}", ""]
    if dry:
        lines += [
            "**Dry run.** The script walked through miniatures of the same layouts. These numbers show that it works. "
            "They say nothing about speed.",
            "",
        ]
    lines += [
        f"`{found['command']}`, commit `{found['commit']}`, torch {found['versions']['torch']}, "
        f"{found['seconds']:.0f} s in all. Largest matrix product: {found['peak'] / 1e12:.3g} TFLOP/s "
        f"({found['peak_dtype']}).",
        "",
        *_training(found["cases"], found["peak"]),
        "",
        *_inference(found["inference"]),
    ]
    notes = list(_notes(found))
    lines += ["", "Notes:", "", *notes] if notes else []
    if not dry:
        lines += ["", "Goals on one H100:", "", *goals(found["cases"])]
    return "\n".join(lines).strip() + "\n"


def _name(found: Record) -> str:
    machine = found["machine"]
    return str(machine["gpu"] or machine["cpu"])


def _training(cases: Sequence[Record], peak: float) -> Iterator[str]:
    yield (
        "| Model | Adaptation | Loop | Images/s | Seconds: rollout, update | TFLOP/s | Share of peak | Memory, GiB "
        "| Rows | First ratio - 1 | Gradients below eps |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for case in cases:
        for name, arm in case["arms"].items():
            yield _cells(case["label"], case["adaptation"], _NAMES[name], *_arm(arm, peak, case["clip"]))
    yield ""
    yield "| Model | Adaptation | latentac / plain loop, images/s | Critic: time over GRPO | TFLOP per image |"
    yield "|---|---|---|---|---|"
    for case in cases:
        critic = case["critic"] and {**case["critic"], **{k: case["critic"][k] - 1 for k in ("median", "low", "high")}}
        operations = case["arms"]["ours"].get("flops_per_image")
        yield _cells(
            case["label"], case["adaptation"], _spread(case["ratio"], ".2f"), _spread(critic, "+.1%"),
            NOTHING if operations is None else f"{operations / 1e12:.3g}",
        )  # fmt: skip


def _arm(arm: Record, peak: float, clip: float) -> Iterator[str]:
    if not arm["turns"]:
        yield from [NOTHING] * 8
        return
    rate = arm["images"] / arm["seconds"]
    operations = rate * arm["flops_per_image"]
    yield f"{rate:.3g}"
    yield f"{arm['rollout']:.2f}, {arm['update']:.2f}"
    yield f"{operations / 1e12:.3g}"
    yield f"{operations / peak:.1%}"
    yield NOTHING if arm["memory"] is None else f"{arm['memory'] / GIB:.1f}"
    yield str(arm["rows"])
    deviation = arm.get("first_ratio_deviation")
    yield NOTHING if deviation is None else f"{deviation:.1e} ({deviation / clip:.1%} of the clip)"
    below = arm.get("gradient_below_eps")
    yield NOTHING if below is None else f"{below:.2f}"


def _inference(found: Sequence[Record]) -> Iterator[str]:
    yield "| Model | Endpoint, images/s: batched, single | Rows | A particle | A gradient step |"
    yield "|---|---|---|---|---|"
    for one in found:
        endpoint, steering = one.get("endpoint"), one.get("steering")
        yield _cells(
            one["label"],
            f"{endpoint['batched']:.3g}, {endpoint['single']:.3g}" if endpoint else NOTHING,
            str(one.get("rows", NOTHING)),
            f"{steering['particle']:.2f} plain rollouts" if steering else NOTHING,
            f"{steering['gradient_forwards']:.2f} forwards" if steering else NOTHING,
        )


def _notes(found: Record) -> Iterator[str]:
    for case in found["cases"]:
        where = f"{case['label']}, {case['adaptation']}"
        if case["note"]:
            yield f"- {where}: {case['note']}."
        for name, arm in case["arms"].items():
            if arm["note"]:
                yield f"- {where}, {_NAMES[name]}: {arm['note']}."
            if not arm["beside"] and arm["turns"]:
                yield f"- {where}, {_NAMES[name]}: measured after the others, as it does not fit beside them."
    for one in found["inference"]:
        if one["note"]:
            yield f"- {one['label']}, steering and endpoint: {one['note']}."
    if found["overrides"]:
        yield f"- latentac ran with `{' '.join(found['overrides'])}`."


def goals(cases: Sequence[Record]) -> Iterator[str]:
    """Each goal with what was measured."""
    for case in cases:
        ours, label = case["arms"]["ours"], f"{case['label']}, {case['adaptation']}"
        if case["adaptation"] == "lora":
            yield _goal(f"{label}: at least {RATIO} times the plain loop", _median(case["ratio"]), RATIO, least=True)
            yield _goal(f"{label}: within {MEMORY // GIB} GiB", ours["memory"], MEMORY, unit=GIB)
            yield _goal(f"{label}: the critic at most {CRITIC:.0%} over GRPO", _median(case["critic"]), 1 + CRITIC)
        else:
            yield f"- {label}: fits on one GPU: {'yes' if ours['turns'] else 'no'}"


def _goal(text: str, value: float | None, bound: float, *, least: bool = False, unit: float = 1) -> str:
    if value is None:
        return f"- {text}: not measured"
    met = value >= bound if least else value <= bound
    return f"- {text}: {'yes' if met else 'no'} ({value / unit:.3g})"


def _median(found: Record | None) -> float | None:
    return None if found is None else found["median"]


def _spread(found: Record | None, form: str) -> str:
    if found is None:
        return NOTHING
    return f"{found['median']:{form}} [{found['low']:{form}}, {found['high']:{form}}], n = {found['n']}"


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"

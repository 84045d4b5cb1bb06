"""The model card of a run: its summary in a page of Markdown, for a place that shows no HTML."""

from collections.abc import Iterator, Mapping
from typing import Any


def model_card(summary: Mapping[str, Any]) -> str:
    """Markdown of what summary.json holds: what was trained on what, what it gained, what the gate said."""
    return "\n\n".join(_paragraphs(summary)) + "\n"


def _paragraphs(summary: Mapping[str, Any]) -> Iterator[str]:
    backbone, prompts = summary["settings"]["backbone"], summary["settings"].get("prompts") or {}
    yield f"# {summary['run']}"
    yield _table(
        ("", ""),
        [
            ("recipe", f"{summary['recipe']}, seed {summary['seed']}"),
            ("backbone", f"{backbone['use']} from {backbone['source']}"),
            ("prompts", prompts.get("source", "")),
            ("code", summary["commit"] or "unknown"),
            ("images scored in training", sum(row["images"] or 0 for row in summary["training"]) or "none"),
        ],
    )
    yield from _rewards(summary["evaluation"])
    yield from _steering(summary["steering"])
    gate, serving = summary["gate"], summary["serving"]
    if gate is None:
        yield "Not judged: the run has not come to the gate."
    else:
        yield "\n".join([f"## Gate: {gate['decision']}", "", *(f"- {reason}" for reason in gate["reasons"] or ())])
        for bound in gate["overrides"]:
            yield f"Judged with another bound than the run's: `{bound['field']}` is {bound['new']}, not {bound['old']}."
    if serving is not None:
        yield f"Served as version `{serving['version']}`, {serving['endpoint']}."
        if serving["forced"]:
            reasons = [f"- {reason}" for reason in serving["forced"]["reasons"]]
            yield "\n".join(["Forced into production over the gate, which says:", "", *reasons])
    elif gate is not None and gate["decision"] == "promote":
        yield "Promoted, and not deployed."


def _rewards(evaluation: Mapping[str, Any] | None) -> Iterator[str]:
    if evaluation is None:
        yield "Not evaluated."
        return
    arms = ("base", "trained", "difference")
    rows = [
        (f"`{name}`", evaluation["units"].get(name) or "", *(_interval(evaluation[arm].get(name)) for arm in arms))
        for name in evaluation["base"]
    ]
    yield "## Rewards on held-out prompts\n\nMeans with 95 % intervals."
    yield _table(("reward", "unit", *arms), rows)


def _steering(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    if rows:
        yield "## Steering the trained model"
        table = [(f"`{row['method']}`", row["nfe"], f"`{row['reward']}`", _interval(row)) for row in rows]
        yield _table(("method", "evaluations", "reward", "mean"), table)


def _interval(row: Mapping[str, Any] | None) -> str:
    if row is None or row["mean"] is None:
        return "–"
    mean, low, high = (f"{row[name]:.3f}" if row[name] is not None else "–" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table; a bar in a cell would end it."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)

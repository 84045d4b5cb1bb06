"""One page about several runs: `latentac compare`, and what a sweep ends in.

It is made from the JSON and the galleries that the runs have published, complete or not; comparison.json beside the
page holds every number that it shows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentac.runs.reporting.charts import draw_comparison
from latentac.runs.reporting.comparison import Read, compare, letter
from latentac.runs.reporting.rendering import images_of, number, render, short
from latentac.runs.reporting.summary import Summary, fetch_run, prepared, read_timings, summarise
from latentac.store import Store, open_store
from latentac.system.errors import ConfigError, Problem
from latentac.system.scratch import hidden_folder, write_whole


@dataclass(frozen=True)
class Comparison:
    """The page, its numbers beside it as JSON, and the same numbers here."""

    page: Path
    numbers: Path
    content: Summary


def write_comparison(
    runs: Sequence[str], store: str, output: str, to: Path | None = None, points: Mapping[str, str] | None = None
) -> Comparison:
    """Compares `runs` with the first of them, on a page `to` (default: `<output>/compare.html`) and in the JSON beside.

    store: URL that all of them were published to; points: run -> the point of a sweep that it belongs to; the runs of
    one point are averaged. Raises ConfigError for a run that is not there and for fewer than two, IntegrityError for
    an artifact that is not what was published.
    """
    opened, wanted, points = open_store(store), list(dict.fromkeys(runs)), points or {}
    _check(opened, wanted)
    page = to or Path(output) / "compare.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    with hidden_folder(page.parent, "compare") as scratch:
        reads = []
        for run in wanted:
            files = fetch_run(opened, run, scratch / run)
            summary = summarise(run, files, read_timings(Path(output) / run / "timings.json"))
            reads.append(Read(run, files, summary, points.get(run, run)))
        content = compare(reads)
        content["gallery"], columns, note = _gallery(reads)
        content["notes"] += [note] if note else []
        text = _page(content, columns)
    numbers = page.with_suffix(".json")
    write_whole(numbers, json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_whole(page, text)
    return Comparison(page, numbers, content)


def table(content: Summary) -> list[str]:
    """The comparison in a few lines for a terminal: a line a series, by the reward that the first one is gated by."""
    reward = content["rewards"][0]
    rows = [("", "run", "base", "trained", "gain", "minus A", "gate")]
    for place, series in enumerate(content["series"]):
        figures, decisions = reward["series"][place], [gate["decision"] if gate else "-" for gate in series["gate"]]
        agreed = (
            decisions[0] if len(set(decisions)) == 1 else f"{decisions.count('promote')} of {len(decisions)} promoted"
        )
        count = f" ({len(series['runs'])} seeds)" if len(series["runs"]) > 1 else ""
        cells = [_plain(figures["base"]), _plain(figures["trained"]), _plain(figures["gain"], signed=True)]
        cells.append(_plain(reward["differences"][place], signed=True))
        rows.append((series["letter"], series["label"] + count, *cells, agreed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{reward['reward']}, held-out prompts, means with 95 % intervals"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, *(f"note: {note}" for note in content["notes"])]


def _plain(row: Mapping[str, Any] | None, signed: bool = False) -> str:
    if row is None:
        return "-"
    ends = "" if row["low"] is None else f" [{number(row['low'], 3, signed)}, {number(row['high'], 3, signed)}]"
    return (number(row["mean"], 3, signed) + ends).replace("\N{MINUS SIGN}", "-")


def _check(store: Store, runs: Sequence[str]) -> None:
    if len(runs) < 2:
        raise ConfigError([Problem("runs", list(runs), "a comparison needs two runs", "Name another one.")])
    prepared(store, runs, "runs")


def _gallery(reads: Sequence[Read]) -> tuple[Summary | None, list[dict[str, Any]], str]:
    """Which images stand side by side; the columns with their images; and a note about them, if any.

    Of a sweep's point its first run is shown. {same_seeds, rows: [{prompt, cells: [{place, seed}]}], columns}.
    """
    first = {read.point: read for read in reversed(reads)}
    letters = {point: letter(place) for place, point in enumerate(dict.fromkeys(read.point for read in reads))}
    shown = [read for point in letters if (read := first[point]).summary["gallery"] is not None]
    if not shown:
        return None, [], ""
    galleries = [read.summary["gallery"] for read in shown]
    keys = [list(zip(gallery["prompts"], gallery["seeds"], strict=True)) for gallery in galleries]
    common = [key for key in keys[0] if all(key in others for others in keys)]
    same_seeds = bool(common)
    if not common:
        prompts = dict.fromkeys(prompt for prompt, _ in keys[0])
        keys = [[(prompt, "") for prompt, _ in own] for own in keys]
        common = [(prompt, "") for prompt in prompts if all((prompt, "") in own for own in keys)]
    if not common:
        return (
            None,
            [],
            "The galleries have no prompt in common, so they are not shown. Each run's report shows its gallery",
        )
    bases = [read.base for read in shown]
    one_base = same_seeds and all(base == bases[0] for base in bases)
    columns = []
    for read, own in zip(shown, keys, strict=True):
        images = images_of(read.files, read.summary["gallery"])
        for arm in ("base", "trained"):
            if arm == "base" and one_base and read is not shown[0]:
                continue
            name = "base" if arm == "base" and one_base else f"{letters[read.point]} {arm}"
            column = {"name": name, "letter": letters[read.point], "arm": arm, "gallery": read.summary["gallery"]}
            columns.append({**column, "images": images[arm], "places": [own.index(key) for key in common]})
    rows = [
        {
            "prompt": prompt,
            "cells": [_cell(column, column["places"][row]) for column in columns],
        }
        for row, (prompt, _) in enumerate(common)
    ]
    note = "" if same_seeds else "The galleries show the same prompts with different noise, because the seeds differ"
    index = {"same_seeds": same_seeds, "columns": [column["name"] for column in columns], "rows": rows}
    return index, columns, note


def _cell(column: Mapping[str, Any], place: int) -> Summary:
    scores = column["gallery"]["scores"].get(column["arm"])
    return {"place": place, "seed": column["gallery"]["seeds"][place], "score": scores[place] if scores else None}


def _page(content: Summary, columns: Sequence[Mapping[str, Any]]) -> str:
    from markupsafe import Markup

    drawn = draw_comparison(content)
    charts = {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704 - our own SVG, its words escaped
    return render("compare.html.j2", comparison=content, columns=columns, charts=charts, short=short)

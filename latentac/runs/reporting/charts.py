"""The charts of a report, as SVG to stand inside a page: they take its fonts and its light or dark colours.

Only what summary.json holds is drawn. Every chart has a unit on each axis, and its words beside what they name.
"""

import io
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

from latentac.system.terminal import printable

# matplotlib draws in stand-in colours, which then become the page's CSS variables of these names.
_COLOURS = {
    "ink": "#010101",
    "faint": "#020202",
    "base": "#030303",
    "trained": "#040404",
    "steered": "#050505",
    "other": "#060606",
    **{f"series-{place}": f"#{place:02x}0707" for place in range(1, 7)},
}
_DASHES = ("-", "--", ":", "-.")  # with six colours: twelve series can be told apart, and four without colour
# Colour and mark of the steering methods, in their order.
_METHODS = (("steered", "o"), ("other", "s"), ("trained", "^"), ("base", "D"), ("ink", "v"))
_INCHES = (4.2, 2.75)  # at this width 9 point text is still 10 pixels on a telephone
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["ink"],
    "xtick.color": _COLOURS["ink"],
    "ytick.color": _COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _COLOURS["faint"],
    "grid.linewidth": 0.7,
}
_MOST_POINTS, _MOST_MARKS, _MOST_TICKS = 2_000, 200, 16
"""More than a chart of this size can show; what is drawn beyond that costs minutes."""

Row = Mapping[str, Any]
T = TypeVar("T")


def draw(summary: Row, kinds: Sequence[str] = ("reward", "critic", "steering", "health")) -> dict[str, str]:
    """SVG by name: `reward:<name>`, `critic`, `steering:<name>`, and as health `kl` and `clip_share`; of each of
    `kinds` that there is data for."""
    target, evaluation, charts = summary["settings"]["gate"]["reward"], summary["evaluation"] or {}, {}
    history = [row for row in summary["training"] if row["images"] is not None]
    if history and "reward" in kinds:
        for name in _first(target, history[0]["rewards"] or {}):
            charts[f"reward:{name}"] = _reward(name, history, evaluation)
    if history and "health" in kinds:
        charts["kl"] = _diagnostic("kl", "KL divergence a step", "nats", history)
        charts["clip_share"] = _diagnostic("clip_share", "Clipped ratios", "share of all", history)
    if summary["critic"]["explained_variance"] and "critic" in kinds:
        charts["critic"] = _critic(summary["critic"])
    steering = [row for row in summary["steering"] if row["nfe"] and row["mean"] is not None and "steering" in kinds]
    for name in _first(target, [row["reward"] for row in steering]):
        if rows := [row for row in steering if row["reward"] == name]:
            charts[f"steering:{name}"] = _steering(name, _unit(name, evaluation), rows)
    return charts


def draw_comparison(comparison: Row) -> dict[str, str]:
    """SVG by name, a line a run and a colour a series: `reward:<name>`, `kl`, `explained_variance` and `critic`."""
    series, charts = comparison["series"], {}
    runs = [(place, rows) for place, each in enumerate(series) for rows in each["training"] if rows]
    images, held_out = "images trained on", {row["reward"]: row["series"] for row in comparison["rewards"]}
    for reward in comparison["rewards"] if runs else ():
        name, unit = reward["reward"], str(reward["unit"] or "mean").partition(" (")[0]

        def value(row: Row, name: str = name) -> float | None:
            found: float | None = row["rewards"].get(name)
            return found

        if any(value(row) is not None for _, rows in runs for row in rows):
            charts[f"reward:{name}"] = _lines(
                f"reward:{name}", name, images, unit,
                series=series, runs=runs, value=value, held_out=held_out[name],
            )  # fmt: skip

    for name, title, unit in (
        ("kl", "KL divergence per step", "nats"),
        ("explained_variance", "Explained variance, mean over steps", "share"),
    ):
        if any(row[name] is not None for _, rows in runs for row in rows):
            charts[name] = _lines(name, title, images, unit, series=series, runs=runs, value=itemgetter(name))
    critics = [
        (place, [{"images": step, "value": share} for step, share in enumerate(each["critic"], 1)])
        for place, each in enumerate(series)
        if each["critic"]
    ]
    if critics:
        title, x = "Explained variance after training", "denoising step, from noise to image"
        charts["critic"] = _lines("critic", title, x, "share", series=series, runs=critics, value=itemgetter("value"))
    return charts


def _lines(
    name: str,
    title: str,
    x: str,
    y: str,
    *,
    series: Sequence[Row],
    runs: Sequence[tuple[int, Sequence[Row]]],
    value: Callable[[Row], float | None],
    held_out: Sequence[Row] = (),
) -> str:
    """A line a run of (place of its series, rows) with its letter; held_out: marks where the lines of a series end."""
    with _axes(f"compare-{name}", title, x, y) as (axes, svg):
        alone = Counter(place for place, _ in runs)
        words: list[tuple[float, float, str, str]] = []
        for place, rows in runs:
            colour, dash = f"series-{place % 6 + 1}", _DASHES[place % len(_DASHES)]
            points = [(row["images"], value(row)) for row in rows]
            ends = _line(axes, points, colour, dash, alpha=0.9 if alone[place] == 1 else 0.45)
            if ends and all(label[2] != series[place]["letter"] for label in words):
                words.append((*ends[0][:2], series[place]["letter"], colour))
        for place, figures in enumerate(held_out):
            last = [rows[-1]["images"] for at, rows in runs if at == place]
            if figures["trained"] is not None and last:
                _mark(axes, max(last), figures["trained"], f"series-{place % 6 + 1}")
        axes.margins(y=0.12)
        _beside(axes, words)
    return svg.getvalue()


def _first(target: str, names: Iterable[str]) -> list[str]:
    """Each name once, `target` first."""
    return list(dict.fromkeys([target, *names]))


def _unit(name: str, evaluation: Row) -> str:
    """The reward's unit, without what it explains in parentheses."""
    return str(evaluation.get("units", {}).get(name) or "mean").partition(" (")[0]


def _reward(name: str, history: Sequence[Row], evaluation: Row) -> str:
    """A training reward over images, and the held-out evaluation of base and trained at the two ends."""
    with _axes(f"reward-{name}", name, "images trained on", _unit(name, evaluation)) as (axes, svg):
        points = [(row["images"], (row["rewards"] or {}).get(name)) for row in history]
        words = [(x, y, "training prompts", colour) for x, y, colour in _line(axes, points, "trained", alpha=0.6)]
        base, trained = (evaluation.get(arm, {}).get(name, {}) for arm in ("base", "trained"))
        if trained.get("mean") is not None:
            _mark(axes, history[-1]["images"], trained, "trained")
            words.append((history[-1]["images"], trained["mean"], "trained, held out", "trained"))
        if base.get("mean") is not None:
            high = _mark(axes, 0, base, "base")
            # on the side that the curve turns away from
            rising = (words[-1][1] if words else base["mean"]) >= base["mean"]
            at, side = ((2 * base["mean"] - high, -11) if rising else (high, 5)) if words else (base["mean"], 0)
            axes.annotate("base, held out", (0, at), (-4, side), textcoords="offset points", color=_COLOURS["base"])
        axes.margins(y=0.12)
        _beside(axes, words)
    return svg.getvalue()


def _diagnostic(name: str, title: str, unit: str, history: Sequence[Row]) -> str:
    with _axes(name, title, "images trained on", unit) as (axes, svg):
        _line(axes, [(row["images"], row[name]) for row in history], "trained")
        axes.set_ylim(bottom=0)
    return svg.getvalue()


def _critic(critic: Row) -> str:
    with _axes("critic", "Explained variance", "denoising step, from noise to image", "share") as (axes, svg):
        before, after = critic["explained_variance"], critic["explained_variance_trained"] or ()
        words = [(x, y, "pretrained", colour) for x, y, colour in _line(axes, enumerate(before, 1), "base", "o-")]
        words += [
            (x, y, "after training", colour) for x, y, colour in _line(axes, enumerate(after, 1), "trained", "o-")
        ]
        axes.axhline(0, color=_COLOURS["ink"], linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _beside(axes, words)
    return svg.getvalue()


def _steering(name: str, unit: str, rows: Sequence[Row]) -> str:
    """Reward against NFE, a mark a row; marks at one NFE stand beside each other, the dotted line is the cheapest."""
    rows = _some(list(rows), _MOST_MARKS)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    marks = {method: _METHODS[place % len(_METHODS)] for place, method in enumerate(methods)}
    columns = 3
    above = 6 + 14 * math.ceil(len(marks) / columns)  # room for the legend below the title
    with _axes(f"steering-{name}", name, "NFE per image (log scale)", unit, above) as (axes, svg):
        axes.set_xscale("log", base=2)
        ordered = sorted(rows, key=lambda row: row["nfe"])
        axes.axhline(ordered[0]["mean"], color=_COLOURS["ink"], linewidth=0.9, linestyle=":")
        for nfe, group in groupby(ordered, key=lambda row: row["nfe"]):
            beside = list(group)
            for place, row in enumerate(beside):
                x = nfe * 2 ** (0.15 * (place - (len(beside) - 1) / 2))
                top = _mark(axes, x, row, *marks[row["method"]])
                if (row["particles"] or 1) == 1:
                    words = f"{row['strength'] or 0:g}"
                    axes.annotate(words, (x, top), (0, 3), textcoords="offset points", ha="center", va="bottom")
        for method, (colour, mark) in marks.items():
            axes.plot([], [], mark, color=_COLOURS[colour], label=method, markersize=4.5)
        ticks = _some(sorted({row["nfe"] for row in rows}), _MOST_TICKS)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.08, y=0.14)
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, handletextpad=0.1, columnspacing=1, borderpad=0
        )
    return svg.getvalue()


def _line(axes: Any, points: Any, colour: str, marks: str = "-", alpha: float = 1) -> list[tuple[float, float, str]]:
    """Draws the points that have a value; gives the last one and the colour, for its label."""
    known = _some([(x, y) for x, y in points if y is not None], _MOST_POINTS)
    if known:
        axes.plot(*zip(*known, strict=True), marks, color=_COLOURS[colour], markersize=3.5, linewidth=1.4, alpha=alpha)
    return [(*known[-1], colour)] if known else []


def _some(values: list[T], most: int) -> list[T]:
    """All of them, or of more than `most` so many at equal distances, the last one among them."""
    return values[:: -max(1, math.ceil(len(values) / most))][::-1]


def _mark(axes: Any, x: float, row: Row, colour: str, mark: str = "o") -> float:
    """A mean with its interval; gives the upper end."""
    low, high = (row["mean"] if row[end] is None else row[end] for end in ("low", "high"))
    reach = [[max(0.0, row["mean"] - low)], [max(0.0, high - row["mean"])]]
    axes.errorbar([x], [row["mean"]], reach, fmt=mark, color=_COLOURS[colour], markersize=4.5, capsize=3, linewidth=1.4)
    return float(high)


def _beside(axes: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Words to the right of (x, y) in a colour; those of one x are pushed apart."""
    low, high = axes.get_ylim()
    for x, group in groupby(sorted(labels), key=lambda label: label[0]):
        floor = -math.inf
        for _, y, words, colour in group:
            floor = max(y, floor + 0.085 * (high - low))
            axes.annotate(words, (x, floor), (7, 0), textcoords="offset points", va="center", color=_COLOURS[colour])


@contextmanager
def _axes(name: str, title: str, x: str, y: str, pad: float = 6) -> Iterator[tuple[Any, io.StringIO]]:
    """Axes to draw on, and a buffer that has their SVG afterwards."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    page, drawing = io.StringIO(), io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=textwrap.fill(y, 38, max_lines=2, placeholder="…"))
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=pad)
        yield axes, page
        with warnings.catch_warnings():  # about a letter that the font lacks, and about labels with little room
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    page.write(_inline(drawing.getvalue(), re.sub(r"\W", "-", name), title))


def _inline(svg: str, mark: str, title: str) -> str:
    """The SVG without what a page has itself: headers, fonts, a size in points, colours, the ids of other charts."""
    svg = re.sub(r"<metadata>.*?</metadata>| xmlns(:\w+)?=\"[^\"]*\"", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"(\bid=\"|url\(#|href=\"#)", rf"\g<1>{mark}-", svg.replace("xlink:href", "href"))
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r" (width|height)=\"[\d.]+pt\"", "", svg, count=2)
    for colour, stand_in in _COLOURS.items():
        svg = svg.replace(stand_in, f"var(--{colour})")
    return printable(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))

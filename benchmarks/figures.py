"""The figures of the results, as SVG: the same numbers give the same file."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.claims import MULTIPLES, Results, series

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
}
# Okabe and Ito's colours, which are told apart by colour-blind readers too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#f0e442")
_PANEL = (3.4, 2.8)  # inches

File = Mapping[str, Any]


def draw(results: Results, folder: Path) -> list[Path]:
    """<experiment>-<recipe>.svg of each aggregated file that has something to draw; their paths."""
    kinds = {"main": _main, "ablations": _ablations, "critic": _critic, "steering": _steering}
    kinds |= dict.fromkeys(("hacking", "combination", "words"), _hacking)
    written = []
    for name, found in results.items():
        if found["experiment"] in kinds:
            path = folder / f"{name}.svg"
            kinds[found["experiment"]](found, path)
            written.append(path)
    return written


def _main(found: File, path: Path) -> None:
    """Held-out reward over scored images and over time, and what each critic explains at the end."""
    with _panels(path, 3) as (scored, minutes, critic):
        for arm, colour in zip(found["arms"].values(), _COLOURS, strict=False):
            _curve(scored, arm, "images", colour, scale=1)
            _curve(minutes, arm, "seconds", colour, scale=60)
            steps = series(arm, "explained_variance")
            if steps:
                _band(critic, range(1, len(steps) + 1), steps, colour, arm["label"])
        scored.set(xlabel="scored images", ylabel="verifier, held out", title="over scored images")
        minutes.set(xlabel="processor minutes, training", ylabel="verifier, held out", title="over time")
        critic.set(xlabel="denoising step", ylabel="explained variance", title="critics after training, held out")
        critic.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(scored)


def _ablations(found: File, path: Path) -> None:
    """Each arm against its reference, with the interval that decides."""
    rows = [
        (arm["label"], found["differences"][name]["final.shapes_verifier"])
        for name, arm in found["arms"].items()
        if "final.shapes_verifier" in found["differences"].get(name, {})
    ]
    with _panels(path, 1, width=1.7) as (axes,):
        for place, (_, interval) in enumerate(rows):
            _dot(axes, interval, place)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [textwrap.fill(label, 34) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.set(xlabel="verifier, held out: reference minus this arm", title="right of 0: the reference is better")


def _hacking(found: File, path: Path) -> None:
    """Every reward of all arms over the images that they were trained on."""
    arms = found["arms"].values()
    names = list(next(iter(arms))["curve"][0]["rewards"])
    with _panels(path, len(names), width=0.85) as panels:
        for axes, name in zip(panels, names, strict=True):
            for arm, colour in zip(arms, _COLOURS, strict=False):
                _curve(axes, arm, "images", colour, scale=1, reward=name)
            axes.set(xlabel="scored images", title=name)
        panels[0].set_ylabel("mean on held-out prompts")
        _legend(panels[0])


def _critic(found: File, path: Path) -> None:
    with _panels(path, 1, width=1.3) as (axes,):
        for (name, arm), colour in zip(found["arms"].items(), _COLOURS, strict=False):
            steps = series(arm, "best" if name == "ten_times" else "explained_variance")
            _band(axes, range(1, len(steps) + 1), steps, colour, arm["label"])
        axes.set(xlabel="denoising step, from noise to image", ylabel="explained variance, held out")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower right")


# (way, who chooses) -> words and colour: few enough to be read at once.
_LINES = {
    ("best_of_n", "reward"): ("best of N, true reward", "#000000"),
    ("resampling", "reward"): ("resampling, then true reward", "#0072b2"),
    ("resampling", "critic"): ("resampling", "#56b4e9"),
    ("value_gradient", "critic"): ("value gradient", "#d55e00"),
    ("best_of_n", "critic"): ("best of N, critic", "#999999"),
}


def _steering(found: File, path: Path) -> None:
    """Reward over evaluations, on base and on trained weights; all methods begin at plain sampling."""
    reward, ticks = found["reward"], [multiple * found["steps"] for multiple in MULTIPLES]
    beside = []
    with _panels(path, 2, width=1.55) as panels:
        for axes, weights in zip(panels, ("base", "trained"), strict=True):
            own = [point for point in found["points"] if point["weights"] == weights]
            ends = []
            for (way, choice), (words, colour) in _LINES.items():
                points = sorted(
                    (point for point in own if point["way"] == way and point["choice"] in (choice, "none")),
                    key=lambda point: point["nfe"],
                )
                x, intervals = [point["nfe"] for point in points], [point["rewards"][reward] for point in points]
                _band(axes, x, intervals, colour, words)
                ends.append((intervals[-1]["mean"], words, colour))
            plain = next(point for point in own if point["way"] == "best_of_n" and point["particles"] == 1)
            level = plain["rewards"][reward]["mean"]
            axes.plot([ticks[0], ticks[-1]], [level, level], color="black", linewidth=0.8, linestyle=":")
            ends.append((level, "plain", "black"))
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_xlim(ticks[0] * 0.9, ticks[-1] * 7)
            axes.set(xlabel="network evaluations per image", title=f"{weights} weights")
            beside.append((axes, ends))
        low = min(axes.get_ylim()[0] for axes in panels)
        for axes, ends in beside:
            axes.set_ylim(low, 1.04)
            _beside(axes, ticks[-1], ends)
        panels[0].set_ylabel(f"{reward}, held out")


def _beside(axes: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Words to the right of x, each at its line's height, pushed apart."""
    low, high = axes.get_ylim()
    floor = low - (high - low)
    for y, words, colour in sorted(ends):
        floor = max(y, floor + 0.065 * (high - low))
        axes.annotate(
            words,
            (x, floor),
            (6, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            color=colour,
            fontsize=8,
        )


def _curve(axes: Axes, arm: File, key: str, colour: str, *, scale: float, reward: str = "shapes_verifier") -> None:
    points = [point for point in arm.get("curve", ()) if reward in point["rewards"]]
    if points:
        _band(
            axes,
            [point[key] / scale for point in points],
            [point["rewards"][reward] for point in points],
            colour,
            arm["label"],
        )


def _band(axes: Axes, x: Sequence[float] | range, intervals: Sequence[File], colour: str, label: str) -> None:
    """Means as a line, and the interval over seeds as a shade."""
    axes.plot(x, [each["mean"] for each in intervals], "o-", color=colour, label=label, markersize=3, linewidth=1.4)
    if all(each["low"] is not None for each in intervals):
        low, high = ([each[end] for each in intervals] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)


def _legend(axes: Axes) -> None:
    """The labels of these axes below the whole figure, where they cover nothing."""
    figure = axes.get_figure()
    if figure is not None:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _dot(axes: Axes, interval: File, place: int) -> None:
    reach = None
    if interval["low"] is not None:
        reach = [[interval["mean"] - interval["low"]], [interval["high"] - interval["mean"]]]
    axes.errorbar([interval["mean"]], [place], xerr=reach, fmt="o", color=_COLOURS[0], markersize=4.5, capsize=3)


@contextmanager
def _panels(path: Path, count: int, width: float = 1.0) -> Iterator[Sequence[Axes]]:
    """Axes beside each other, which are in `path` afterwards."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(count * width * _PANEL[0], _PANEL[1]), layout="constrained")
        yield list(figure.subplots(1, count, squeeze=False)[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})

"""The report of a run: summary.json holds every number, report.html shows them with the images, in one file.

Both are made from the published artifacts `<run>/<step>` alone, at any time after `prepare`: a step that has not run
is null in the summary and says so in the report. The page is rendered from the summary and the images and from
nothing else, so whatever number it shows can be read by a program too.
"""

import json
import math
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentac.runs.reporting.charts import draw
from latentac.runs.reporting.rendering import images_of, render
from latentac.runs.reporting.summary import Summary, fetch_run, prepared, read_failure, read_timings, summarise
from latentac.store import Manifest, open_store
from latentac.system.commands import program, typed
from latentac.system.lifetime import refuse_links
from latentac.system.scratch import hidden_folder, write_whole

_SECTIONS = {"evaluate": ("galleries", "rewards", "contrasts"), "steer": ("galleries", "steering")}
_CHARTS = {"galleries": (), "rewards": ("reward",), "contrasts": (), "steering": ("steering",)}


def write_report(run: str, store: str, output: str) -> tuple[Path, Path]:
    """Writes `<output>/<run>/report.html` and `summary.json` and returns their paths, in this order.

    `store` is the URL that the run's artifacts were published to. `<output>/<run>/timings.json`, which the driver
    writes, gives the wall seconds; without it they are those of the manifests. Raises ConfigError if not even
    `prepare` has finished, IntegrityError if an artifact is not what was published.
    """
    folder = Path(output) / run
    prepared(open_store(store), [run])  # before a folder is made for it
    refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with hidden_folder(folder, "report") as scratch:
        opened = open_store(store)
        files = fetch_run(opened, run, scratch)
        failure = read_failure(opened, run, folder, files)
        summary = summarise(run, files, read_timings(folder / "timings.json"), failure)
        page = _render(summary, images_of(files, summary["gallery"]), next_commands(run, store, output))
    report, numbers = folder / "report.html", folder / "summary.json"
    write_whole(numbers, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_whole(report, page)
    return report, numbers


def step_page(step: str, run: str, store: str) -> str:
    """The part of the report that `evaluate` or `steer` has to show, as a page of its own, once that step is published.

    Raises what `write_report` raises.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = fetch_run(open_store(store), run, Path(scratch))
        summary = summarise(run, files, {})
        return _render(summary, images_of(files, summary["gallery"]), {}, _SECTIONS[step])


def gate_reasons(run: str, store: str) -> str:
    """The gate's decision and checks, as the Markdown that `gate` published. Raises ArtifactNotFound before that."""
    return open_store(store).read(f"{run}/gate", "reasons.md").decode()


def numbers(manifest: Manifest) -> dict[str, float]:
    """The finite numbers among a manifest's metrics, by names of word characters; a list's places count from 1."""
    found: dict[str, float] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for part, item in value.items():
                collect(f"{name}_{part}" if name else str(part), item)
        elif isinstance(value, list):
            for place, item in enumerate(value, 1):
                collect(f"{name}_{place:02d}", item)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[re.sub(r"\W+", "_", name)] = float(value)

    collect("", manifest.metrics)
    return found


def next_commands(run: str, store: str, output: str) -> dict[str, str]:
    """What a person types next: `serve`, `tensorboard`, `compare` (with a run of their choice)."""
    board = program().removesuffix("latentac") + "tensorboard" if program().endswith("latentac") else "tensorboard"
    compare = typed("compare", "", store, output).replace(" compare", f" compare {shlex.quote(run)} ANOTHER-RUN", 1)
    return {
        "serve": typed("serve", run, store, output),
        "tensorboard": f"{board} --logdir {shlex.quote(str(Path(output) / run / 'tensorboard'))}",
        "compare": compare,
    }


def _render(
    summary: Summary,
    images: Mapping[str, Sequence[str]],
    commands: Mapping[str, str],
    sections: Sequence[str] | None = None,
) -> str:
    """The report, or only `sections` of it."""
    from markupsafe import Markup

    drawn = draw(summary) if sections is None else draw(summary, [kind for part in sections for kind in _CHARTS[part]])
    charts = {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704 - our own SVG, its words escaped
    return render("report.html.j2", summary=summary, images=images, charts=charts, commands=commands, sections=sections)

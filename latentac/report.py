"""The report of a run: summary.json holds every number, report.html shows them with the pictures, in one file.

Both are made from the published artifacts `<run>/<step>` alone, at any time after `prepare`: a step that has not run
is null in the summary and says so in the report. The page is rendered from the summary and the pictures and from
nothing else, so whatever number it shows can be read by a program too.
"""

import base64
import io
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from latentac.arms import best_steered
from latentac.charts import draw
from latentac.commands import typed
from latentac.errors import ArtifactNotFound, IntegrityError
from latentac.store import Manifest, Store, open_store

_STEPS = ("prepare", "pretrain-value", "train", "evaluate", "steer", "gate", "deploy")
_INTERVAL = ("mean", "low", "high", "n")
_STEERED = ("method", "strength", "candidates", "nfe", "reward", *_INTERVAL, "seconds", "diversity")
_ITERATION = ("iteration", "images", "reward_mean", "rewards", "kl", "clip_share", "explained_variance", "seconds")
_SERVING = ("version", "project", "forced", "picture_sha256", "seconds", "endpoint", "request")
_GATE, _CHANGED = ("decision", "reasons", "checks", "by"), ("overrides", "former")
_ARMS = {"base": "evaluate", "incumbent": "evaluate", "trained": "evaluate", "steered": "steer"}
_POLICIES = ("base", "trained", "incumbent")
_SECTIONS = {"evaluate": ("galleries", "rewards", "contrasts"), "steer": ("galleries", "steering")}
_CHARTS = {"galleries": (), "rewards": ("reward",), "contrasts": (), "steering": ("steering",)}
_AGAIN = "Run this step again with this version of latentac"
_MAX_PICTURE = 256  # pixels a side; larger pictures are reduced, so that a gallery stays within a few MB

Summary = dict[str, Any]
Files = dict[str, tuple[Manifest, Path]]


def write_report(run: str, store: str, output: str) -> tuple[Path, Path]:
    """Writes `<output>/<run>/report.html` and `summary.json` and returns their paths, in this order.

    `store` is the URL that the run's artifacts were published to. `<output>/<run>/timings.json`, which the driver
    writes, gives the wall seconds; without it they are those of the manifests. Raises ArtifactNotFound if not
    even `prepare` has finished, IntegrityError if an artifact is not what was published.
    """
    folder = Path(output) / run
    open_store(store).manifest(f"{run}/prepare")  # or there is nothing to report, and no folder to make for it
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as scratch:
        files = _fetch(open_store(store), run, Path(scratch))
        summary = _summarise(run, files, _timings(folder / "timings.json"))
        page = _render(summary, _pictures(files, summary["gallery"]), typed("serve", run, store, output))
    report, numbers = folder / "report.html", folder / "summary.json"
    _write(numbers, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    _write(report, page)
    return report, numbers


def step_page(step: str, run: str, store: str) -> str:
    """The part of the report that `evaluate` or `steer` has to show, as a page of its own, once that step is published.

    Raises what `write_report` raises.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = _fetch(open_store(store), run, Path(scratch))
        summary = _summarise(run, files, {})
        return _render(summary, _pictures(files, summary["gallery"]), "", _SECTIONS[step])


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


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _timings(path: Path) -> Mapping[str, Any]:
    """What the driver wrote: {"stages": {step: seconds}, "total": seconds}, or nothing."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise IntegrityError(str(path), f"is not the driver's JSON ({error})", "Remove it") from None


def _fetch(store: Store, run: str, scratch: Path) -> Files:
    """Verified copies of what the report shows of the run, by step: numbers, words and pictures. Weights, which may be
    many GB, are not read."""
    files = {}
    for step in _STEPS:
        try:
            files[step] = (store.fetch_files(f"{run}/{step}", scratch / step, _is_shown), scratch / step)
        except ArtifactNotFound:
            if step == "prepare":
                raise
    return files


def _is_shown(path: str) -> bool:
    """Of an artifact's files. A backbone's own JSON lies in folders of its own."""
    folder, _, name = path.rpartition("/")
    return folder in ("", "gallery") and name.endswith((".json", ".md", ".png"))


def _read(artifact: tuple[Manifest, Path], name: str) -> Any:
    return json.loads(_text(artifact, name))


def _text(artifact: tuple[Manifest, Path], name: str) -> str:
    manifest, folder = artifact
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise IntegrityError(manifest.key, f"the artifact has no {name}", _AGAIN) from None


def _summarise(run: str, files: Files, timings: Mapping[str, Any]) -> Summary:
    """The content of summary.json; its schema is in the README. What is not a finite number becomes null and a note."""

    def read(step: str, name: str) -> Any:
        return _read(files[step], name) if step in files else None

    settings, environment = read("prepare", "config.json"), read("prepare", "environment.json")
    evaluation, gate, deployment = (
        read(step, f"{name}.json")
        for step, name in (("evaluate", "evaluation"), ("gate", "gate"), ("deploy", "deployment"))
    )
    seconds, late = _seconds(files, timings)
    summary = {
        "run": run,
        "recipe": settings["recipe"],
        "seed": settings["seed"],
        "commit": environment.get("commit"),
        "created": files["prepare"][0].created,
        "machine": environment.get("machine"),
        "versions": environment.get("versions"),
        "settings": settings,
        "seconds": seconds,
        "evaluation": evaluation and _evaluation(evaluation),
        "gallery": read("evaluate", "gallery/gallery.json"),
        "critic": {
            "explained_variance": (read("pretrain-value", "metrics.json") or {}).get("explained_variance"),
            "explained_variance_trained": (evaluation or {}).get("critic", {}).get("explained_variance"),
        },
        "training": [{name: row.get(name) for name in _ITERATION} for row in read("train", "history.json") or ()],
        "steering": [{name: row.get(name) for name in _STEERED} for row in read("steer", "steering.json") or ()],
        "steered": _steered(read("steer", "steering.json") or (), settings["gate"]["reward"]),
        "gate": gate
        and {**{name: gate.get(name) for name in _GATE}, **{name: gate.get(name) or [] for name in _CHANGED}},
        "serving": deployment and {name: deployment.get(name) for name in _SERVING},
    }
    dropped: Counter[str] = Counter()
    summary = _finite(summary, "", dropped)
    summary["notes"] = late + [
        f"{path}: {f'{times} values were' if times > 1 else 'was'} not finite and became null"
        for path, times in sorted(dropped.items())
    ]
    return summary


def _steered(rows: Sequence[Mapping[str, Any]], reward: str) -> Summary | None:
    """The arm that the gallery shows and the endpoint uses by default."""
    best = best_steered(rows, reward)
    return None if best is None else {name: best[name] for name in ("method", "strength", "candidates")}


def _evaluation(measured: Mapping[str, Any]) -> Summary:
    """What the README says of `evaluation`: what has not been measured is null, an arm without an incumbent too."""

    def rewards(name: str) -> Summary | None:
        rows = measured.get(name)
        return None if rows is None else {reward: _keep(row, "mean") for reward, row in rows.items()}

    def others(rows: Mapping[str, Any] | None, value: str) -> Summary:
        return {arm: _keep((rows or {}).get(arm), value) for arm in ("base", "incumbent")}

    production = measured.get("production") or {}
    spread, speed = measured.get("diversity") or {}, measured.get("latency") or {}
    kinds, present = measured.get("categories", {}), [arm for arm in _POLICIES if arm in measured]
    base = measured.get("base", {})
    return {
        **{arm: rewards(arm) or {} for arm in ("base", "trained", "difference")},
        "incumbent": rewards("incumbent"),
        "incumbent_difference": rewards("incumbent_difference"),
        "held_out_gap": rewards("held_out_gap"),
        "production": {name: production.get(name) or None for name in ("version", "problem")},
        "diversity": {
            **{arm: _keep(spread.get(arm), "mean") for arm in _POLICIES},
            "difference": others(spread.get("difference"), "mean"),
            "kept": others(spread.get("kept"), "ratio"),
        },
        "latency": {
            **{arm: _keep(speed.get(arm), "median") for arm in _POLICIES},
            "ratio": others(speed.get("ratio"), "median"),
            "block_images": speed.get("block_images"),
        },
        "definitions": measured.get("definitions") or {},
        "categories": {kind: {arm: row.get(arm) for arm in present} for kind, row in kinds.items()},
        "units": {name: measured.get("units", {}).get(name) for name in base},
    }


def _keep(row: Mapping[str, Any] | None, value: str) -> Summary | None:
    """{`value`, low, high, n}, or null where it was not measured."""
    return None if row is None else {name: row.get(name) for name in (value, *_INTERVAL[1:])}


def _seconds(files: Files, timings: Mapping[str, Any]) -> tuple[dict[str, float | None], list[str]]:
    """Seconds a stage and in total, and a note where these do not fit.

    A stage as the driver saw it, with the start of its process and with attempts that failed; as its manifest says
    where no driver ran it.
    """
    stages = dict(timings.get("stages") or {})
    own = {step: manifest.metrics.get("seconds") for step, (manifest, _) in files.items()}
    seconds: dict[str, float | None] = {step: stages.get(step, own.get(step)) for step in _STEPS}
    seconds |= {stage: value for stage, value in stages.items() if stage not in seconds}
    spent = sum(value for value in seconds.values() if value is not None)
    total = timings.get("total", spent)
    note = "seconds.total is less than the stages together, for the driver has not seen them all"
    return {**seconds, "total": total}, [note] if spent > 1.05 * total else []


def _finite(value: Any, path: str, dropped: Counter[str]) -> Any:
    """`value` with None for every NaN and infinity, which are counted in `dropped` by their path."""
    if isinstance(value, dict):
        return {name: _finite(item, f"{path}.{name}".lstrip("."), dropped) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{path}[]", dropped) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        dropped[path] += 1
        return None
    return value


def _pictures(files: Files, gallery: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """data: URIs of PNGs: the gallery's pictures for each arm that there is, and `served`, at most one."""
    pictures: dict[str, list[str]] = {}
    if gallery is not None:
        for arm, step in _ARMS.items():
            if step in files:
                manifest, folder = files[step]
                if _read(files[step], "gallery/gallery.json") != gallery:
                    problem = "its gallery has other prompts, seeds or sizes than that of evaluate"
                    raise IntegrityError(manifest.key, problem, _AGAIN)
                if arm == "incumbent" and not (folder / "gallery" / "incumbent.png").exists():
                    continue
                pictures[arm] = _cut(folder / "gallery" / f"{arm}.png", manifest.key, gallery)
    if "deploy" in files:
        pictures["served"] = [_uri(files["deploy"][1] / "picture.png")]
    return pictures


def _cut(sheet: Path, key: str, gallery: Mapping[str, Any]) -> list[str]:
    """The pictures of a contact sheet, row by row."""
    from PIL import Image

    count, columns, side = len(gallery["prompts"]), gallery["columns"], gallery["image_size"]
    expected = (columns * side, math.ceil(count / columns) * side)
    with Image.open(sheet) as image:
        if image.size != expected:
            problem = f"gallery/{sheet.name} is {image.size} pixels, gallery.json says {expected}"
            raise IntegrityError(key, problem, _AGAIN)
        corners = [(index % columns * side, index // columns * side) for index in range(count)]
        cells = [image.convert("RGB").crop((x, y, x + side, y + side)) for x, y in corners]
    return [_uri(cell) for cell in cells]


def _uri(picture: Any) -> str:
    """A data: URI of a PIL picture or of a picture's file."""
    from PIL import Image

    if isinstance(picture, Path):
        with Image.open(picture) as image:
            return _uri(image.convert("RGB"))
    if max(picture.size) > _MAX_PICTURE:
        picture.thumbnail((_MAX_PICTURE, _MAX_PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _render(
    summary: Summary, pictures: Mapping[str, Sequence[str]], serve: str, sections: Sequence[str] | None = None
) -> str:
    """The report, or only `sections` of it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("latentac"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "short": _short, "flat": _flat, "json": partial(json.dumps, indent=2)}
    drawn = draw(summary) if sections is None else draw(summary, [kind for part in sections for kind in _CHARTS[part]])
    charts = {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704 - our own SVG, its words escaped
    template = environment.get_template("report.html.j2")
    return template.render(summary=summary, pictures=pictures, charts=charts, serve=serve, sections=sections) + "\n"


def _number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A number as the report writes it, with a real minus; a dash for none."""
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''}.{0 if isinstance(value, int) else digits}f}"
    return text.replace("-", "−")


def _short(value: Any) -> str:
    """A whole number in full, another with three significant digits, a string bare, anything else as JSON."""
    if isinstance(value, float) and math.isfinite(value):
        return (f"{value:.0f}" if value.is_integer() else f"{value:.3g}").replace("-", "−")
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _flat(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """`a.b.c` and the value as written, for every leaf of nested settings."""
    if isinstance(settings, list) and not any(isinstance(item, dict | list) for item in settings):
        settings = json.dumps(settings, ensure_ascii=False)
    if not isinstance(settings, dict | list):
        yield path, settings if isinstance(settings, str) else json.dumps(settings)
        return
    for name, item in settings.items() if isinstance(settings, dict) else enumerate(settings):
        yield from _flat(item, f"{path}.{name}".lstrip("."))

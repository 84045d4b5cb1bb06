"""The files that steps write into their artifacts."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentac.runs.workspace import Workspace
from latentac.store.published import metric


def write_report_artifact(run: str, store: str, output: str, folder: Path) -> None:
    """Report, summary and model card of the run, as `finish` publishes them, into a new `folder`."""
    from latentac.runs.reporting.card import model_card
    from latentac.runs.reporting.report import write_report
    from latentac.system.reading import read_json

    folder.mkdir()
    report, summary = write_report(run, store, output)
    for path in (report, summary):
        shutil.copyfile(path, folder / path.name)
    (folder / "card.md").write_text(model_card(read_json(summary)), encoding="utf-8")


def track(space: Workspace, scalars: Mapping[str, float]) -> None:
    """The numbers of the evaluation, to where those of the training are, at the last iteration."""
    from latentac.runs.hyperparameters import hyperparameters
    from latentac.runs.reporting.tracking import Tracker, make_trackers, tracking
    from latentac.runs.reporting.tracking.tensorboard import TensorBoard, all_but_evaluation

    folder, copies = space.folder / "tensorboard", f"tensorboard/{space.run}"
    if not folder.exists():  # another machine has trained
        space.store.read_files(copies, folder)
    board = TensorBoard(folder, all_but_evaluation)
    trackers: list[Tracker] = [board, *make_trackers(space.config.tracking, space.folder)]
    iteration = metric(space.store.manifest(f"{space.run}/train"), "iterations", int)
    with tracking(trackers, space.run, hyperparameters(space.config)):
        for tracker in trackers:
            tracker.log(iteration, scalars)
    space.store.write_files(folder, copies, exact=board.rewritten)


def write_json(path: Path, content: object) -> None:
    """`content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_gallery(folder: Path, sheets: dict[str, Any]) -> None:
    """`sheets`: arm -> contact sheet, "index" -> what gallery.json says of them, and "scores" -> scores.json."""
    (folder / "gallery").mkdir()
    for name, sheet in sheets.items():
        if name == "index":
            write_json(folder / "gallery" / "gallery.json", sheet)
        elif name == "scores":
            write_json(folder / "scores.json", sheet)
        else:
            sheet.save(folder / "gallery" / f"{name}.png")

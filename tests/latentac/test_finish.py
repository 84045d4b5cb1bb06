"""The step that ends a run: it reports what there is, complete or not, and only what is new."""

import json
from pathlib import Path

import pytest

from latentac.runs.cli import main
from latentac.runs.reporting.card import model_card
from latentac.runs.steps import finish
from latentac.store import Store
from tests.latentac.published import PROMPTS, STEPS, contents, publish

FILES = ["card.md", "report.html", "summary.json"]


def published(folder: Path, last: str) -> tuple[Store, str]:
    files = contents(PROMPTS)
    return publish(folder, {step: files[step] for step in STEPS[: STEPS.index(last) + 1]}, PROMPTS)


def test_a_complete_run_is_published_with_its_card(tmp_path: Path) -> None:
    """Page, numbers and card, in the store and in the run's folder; its parents are the steps."""
    store, url = published(tmp_path, "deploy")
    manifest = finish("run-1", url, str(tmp_path / "runs"))

    assert manifest is not None
    assert manifest == store.manifest("run-1/finish")
    assert [file.path for file in manifest.files] == FILES
    assert [parent.key for parent in manifest.parents] == [f"run-1/{step}" for step in STEPS]
    card = (tmp_path / "runs" / "run-1" / "card.md").read_text()
    assert card.startswith("# run-1\n")
    assert "| `shapes_verifier` | " in card
    assert "0.612 [0.582, 0.642]" in card
    assert "## Gate: promote" in card
    assert "Served as version `run-1-3f1c2a9d`" in card


@pytest.mark.parametrize("last", ["prepare", "train", "evaluate", "gate"])
def test_a_run_that_ended_early_is_reported_as_far_as_it_came(tmp_path: Path, last: str) -> None:
    """It never fails because a run is incomplete: it runs when something else has failed."""
    _, url = published(tmp_path, last)
    manifest = finish("run-1", url, str(tmp_path / "runs"))

    assert manifest is not None
    assert [file.path for file in manifest.files] == FILES
    card = (tmp_path / "runs" / "run-1" / "card.md").read_text()
    assert ("Not evaluated" in card) == (last in ("prepare", "train"))
    assert ("Not decided" in card) == (last != "gate")
    assert ("Promoted, but not deployed" in card) == (last == "gate")


def test_a_run_that_has_published_nothing_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first step has failed: there is nothing to tell, and that is not a failure of this one."""
    assert finish("run-1", f"file://{tmp_path}/store", str(tmp_path / "runs")) is None
    assert list(tmp_path.iterdir()) == []
    assert main(["finish", "--run", "run-1", "--output", str(tmp_path / "runs")]) == 0
    assert json.loads(capsys.readouterr().out) == {"key": None, "metrics": {}}


def test_nothing_new_is_not_reported_again_and_something_new_is(tmp_path: Path) -> None:
    """A resumed run that does nothing keeps its report; one that goes on gets a new one, and the old is replaced."""
    store, url = published(tmp_path, "gate")
    output = tmp_path / "runs"
    first = finish("run-1", url, str(output))
    (output / "run-1" / "report.html").unlink()

    assert finish("run-1", url, str(output)) == first
    assert (output / "run-1" / "report.html").stat().st_size > 10_000
    published(tmp_path, "deploy")
    second = finish("run-1", url, str(output))
    assert second is not None
    assert second != first
    assert store.manifest("run-1/finish") == second
    assert json.loads((output / "run-1" / "summary.json").read_text())["serving"] is not None
    assert list((output / "run-1").glob(".*")) == []


def test_a_card_holds_what_comes_from_outside_in_its_cells(tmp_path: Path) -> None:
    """A bar would end a Markdown cell."""
    _, url = published(tmp_path, "prepare")
    finish("run-1", url, str(tmp_path / "runs"))
    summary = json.loads((tmp_path / "runs" / "run-1" / "summary.json").read_text())
    summary["settings"]["backbone"]["source"] = "a|b"

    assert "| backbone | unet from a\\|b |" in model_card(summary)

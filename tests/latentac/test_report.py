"""The report: what it needs, what it shows, and that no number of it stays out of the summary."""

import base64
import io
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentac.evaluation.held_out import contact_sheet
from latentac.runs.reporting import charts, rendering
from latentac.runs.reporting.metrics import PHASES, SPEED
from latentac.runs.reporting.report import gate_reasons, next_commands, numbers, step_page, write_report
from latentac.store import open_store
from latentac.system.errors import ArtifactNotFound, ConfigError, IntegrityError, RewardError
from tests.latentac.published import (
    EVALUATION,
    PROMPTS,
    STEPS,
    VERSION,
    Page,
    contents,
    gallery,
    history,
    interval,
    leaves,
    make,
    publish,
    publish_until,
    steering,
    with_incumbent,
)

SECTIONS = (
    "galleries",
    "rewards",
    "contrasts",
    "critic",
    "steering",
    "training",
    "gate",
    "timings",
    "serving",
    "settings",
)
KEYS = (
    *("run", "recipe", "seed", "commit", "created", "machine", "versions", "settings", "seconds", "failure"),
    *("evaluation", "gallery", "critic", "training", "speed", "steering", "steered", "gate", "serving", "notes"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("complete")


@pytest.fixture(scope="module")
def complete(folder: Path) -> tuple[str, dict[str, Any]]:
    """Page and summary of a complete run, for the tests that only read them."""
    return make(folder)


def check_evaluation(evaluation: dict[str, Any]) -> None:
    """`evaluation` of summary.json: intervals everywhere, null for what has no incumbent."""

    def is_interval(row: Any, middle: str = "mean") -> bool:
        return row is None or set(row) == {middle, "low", "high", "n"}

    keys = {"base", "trained", "difference", "incumbent", "incumbent_difference", "production", "diversity", "latency"}
    assert set(evaluation) == keys | {"held_out_gap", "definitions", "categories", "units"}
    for arm in ("base", "trained", "difference", "incumbent", "incumbent_difference", "held_out_gap"):
        assert all(row is not None and is_interval(row) for row in (evaluation[arm] or {}).values())
    arms = {"base", "trained", "incumbent"}
    assert set(evaluation["production"]) == {"version", "problem"}
    diversity, latency = evaluation["diversity"], evaluation["latency"]
    assert set(diversity) == {*arms, "difference", "kept"}
    assert set(latency) == {*arms, "ratio", "block_images"}
    for arm in arms:
        assert is_interval(diversity[arm])
        assert is_interval(latency[arm], "median")
    for rows, middle in ((diversity["difference"], "mean"), (diversity["kept"], "ratio"), (latency["ratio"], "median")):
        assert set(rows) == {"base", "incumbent"}
        assert all(is_interval(row, middle) for row in rows.values())


def check_schema(summary: dict[str, Any]) -> None:
    """summary.json as the README describes it; a part whose step has not run is null, or empty if it is a list."""
    number = (int, float, type(None))

    def is_interval(row: Any, *more: str) -> bool:
        return set(row) == {"mean", "low", "high", "n", *more} and all(
            isinstance(row[k], number) for k in row.keys() - {*more}
        )

    assert tuple(summary) == KEYS
    assert all(isinstance(summary[name], str) for name in ("run", "recipe", "commit", "created"))
    assert isinstance(summary["seed"], int)
    assert {"cpu", "cores", "memory_gib", "gpu", "platform"} <= set(summary["machine"])
    assert {*STEPS, "total"} <= set(summary["seconds"])
    assert all(isinstance(value, number) for value in summary["seconds"].values())
    if summary["evaluation"] is not None:
        check_evaluation(summary["evaluation"])
        assert set(summary["gallery"]) == {"prompts", "seeds", "image_size", "columns", "reward", "binary", "scores"}
    assert set(summary["critic"]) == {"explained_variance", "explained_variance_trained"}
    for values in summary["critic"].values():
        assert values is None or all(isinstance(value, number) for value in values)
    keys = {"iteration", "images", "reward_mean", "rewards", "kl", "clip_share", "explained_variance", "seconds"}
    assert all(set(row) == keys for row in summary["training"])
    if summary["speed"] is not None:
        assert set(summary["speed"]) == {"workers", "iterations", "phases", *SPEED}
        assert set(summary["speed"]["phases"]) == set(PHASES)
        assert all(len(each) == summary["speed"]["workers"] for each in summary["speed"]["phases"].values())
    more = ("method", "strength", "particles", "nfe", "reward", "seconds", "diversity")
    assert all(is_interval(row, *more) for row in summary["steering"])
    if summary["gate"] is not None:
        assert set(summary["gate"]) == {"decision", "reasons", "checks", "overrides", "by", "former"}
        assert summary["gate"]["decision"] in ("promote", "hold")
        fields = {"name", "value", "relation", "bound", "passed"}
        assert all(set(check) == fields for check in summary["gate"]["checks"])
    if summary["serving"] is not None:
        keys = {"version", "image_sha256", "seconds", "endpoint", "request", "project", "forced"}
        assert set(summary["serving"]) == keys
    assert all(isinstance(note, str) for note in summary["notes"])


def test_a_complete_run_gives_a_complete_self_contained_page(complete: tuple[str, dict[str, Any]]) -> None:
    """Every section, every chart, an image per arm and prompt with words for it; nothing is loaded from elsewhere."""
    text, summary = complete
    check_schema(summary)
    page = Page(text)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert len(page.ids) == len(set(page.ids))
    assert page.charts == 7
    assert len(page.images) == 3 * len(PROMPTS) + 1
    assert all(image["alt"] and (image["src"] or "").startswith("data:image/png;base64,") for image in page.images)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|https?://(?!127\.0\.0\.1)", text)
    assert "not run" not in page.text
    assert "Promoted" in page.text
    assert (
        "from 0.391 to 0.612: a change of +0.222 (95 % interval +0.185 to +0.259, 1024 images per model)" in page.text
    )
    assert "Training prompts minus held-out prompts: +0.019 (-0.036 to +0.073)." in page.text.replace(
        "\N{MINUS SIGN}", "-"
    )


def test_every_number_that_the_page_shows_is_in_the_summary(complete: tuple[str, dict[str, Any]]) -> None:
    """Without the summary's strings, each number of the page is one of the summary's, rounded or as it is."""
    text, summary = complete
    known = {*leaves(summary), summary["created"].replace("T", " ").removesuffix("+00:00")}
    rest = re.sub(r"--(output|store|logdir) \S+", " ", Page(text).text)  # where this test's folder is
    for words in sorted((leaf for leaf in known if isinstance(leaf, str)), key=len, reverse=True):
        rest = rest.replace(words, " ")
    values = [abs(leaf) for leaf in known if isinstance(leaf, int | float)]
    own = {"0", "1", "95", "256", *map(str, range(1, 11))}  # 95 % interval, sha256, the critic's steps
    shown = set(re.findall(r"\d[\d.]*(?:e-?\d+)?(?<!\.)", rest)) - own
    assert len(shown) > 90
    for number in shown:
        digits = len(number.partition(".")[2])
        assert number in {f"{value:.{digits}f}" for value in values} | {f"{value:.3g}" for value in values} | {
            repr(value) for value in values
        }


def test_charts_are_drawn_from_the_summary_alone(complete: tuple[str, dict[str, Any]]) -> None:
    """They can be drawn again from summary.json, to the same bytes, and follow the page's colours."""
    from latentac.runs.reporting.charts import draw

    text, summary = complete
    charts = draw(summary)
    assert sorted(charts) == sorted(
        [
            "reward:shapes_verifier",
            "reward:jpeg_compressibility",
            "critic",
            "steering:shapes_verifier",
            "steering:jpeg_compressibility",
            "kl",
            "clip_share",
        ]
    )
    for svg in charts.values():
        assert svg in text
        assert "var(--ink)" in svg
        assert not re.search(r"#[0-9a-f]{6}|http|<metadata|DejaVu", svg)


def test_images_stand_under_their_prompt(complete: tuple[str, dict[str, Any]], folder: Path) -> None:
    """Cell i of every sheet is cut out exactly and shown, base, trained, steered, under prompt i."""
    text, _ = complete
    images = Page(text).images
    for place in range(len(PROMPTS)):
        for column, (arm, step) in enumerate((("base", "evaluate"), ("trained", "evaluate"), ("steered", "steer"))):
            shown = images[3 * place + column]
            right = "right" if place % (3 if arm == "base" else 2) == 0 else "wrong"
            assert shown["alt"] == f"{PROMPTS[place]}, by the {arm} model: {right}"
            data = base64.b64decode((shown["src"] or "").partition(",")[2])
            left, top = place % 4 * 32, place // 4 * 32
            sheet = Image.open(folder / "work" / step / "gallery" / f"{arm}.png")
            assert Image.open(io.BytesIO(data)).tobytes() == sheet.crop((left, top, left + 32, top + 32)).tobytes()


def test_each_image_is_marked_right_or_wrong(complete: tuple[str, dict[str, Any]]) -> None:
    """A 0/1 reward gives a tick or a cross and the word, for every arm; the words do without colour and sign."""
    text, summary = complete
    assert summary["gallery"]["binary"] is True
    assert summary["gallery"]["reward"] == "shapes_verifier"
    assert set(summary["gallery"]["scores"]) == {"base", "trained", "steered"}
    marks = re.findall(r"<figcaption>(\w+) <span class=\"mark (good|bad)\">(.*?)</figcaption>", text)
    assert len(marks) == 3 * len(PROMPTS)
    assert marks[0] == ("base", "good", '<span aria-hidden="true">✓</span> right</span>')
    assert marks[3] == ("base", "bad", '<span aria-hidden="true">✗</span> wrong</span>')
    assert all(("right" in shown) == (colour == "good") for _, colour, shown in marks)
    assert "Each image is marked ✓ right or ✗ wrong by shapes_verifier" in Page(text).text


def test_a_reward_that_is_no_yes_or_no_shows_its_value(tmp_path: Path) -> None:
    """One score between 0 and 1 among all that were evaluated, and none of the images is called right or wrong."""

    def rate(files: dict[str, Any]) -> None:
        files["evaluate"]["scores.json"]["rewards"]["base"]["shapes_verifier"][-1] = 0.25

    text, summary = make(tmp_path, "evaluate", rate)
    assert summary["gallery"]["binary"] is False
    assert '<figcaption>base <span class="mark">1</span></figcaption>' in text
    assert 'alt="a red circle, by the base model: shapes_verifier 1"' in text
    assert "right" not in Page(text).text


def test_a_gallery_without_scores_has_no_marks(tmp_path: Path) -> None:
    """Artifacts of an earlier version show their images as before."""

    def forget(files: dict[str, Any]) -> None:
        del files["evaluate"]["scores.json"], files["steer"]
        del files["evaluate"]["gallery/gallery.json"]["rewards"]

    text, summary = make(tmp_path, "evaluate", forget)
    assert summary["gallery"]["scores"] == {}
    assert 'class="mark' not in text
    assert 'alt="a red circle, by the base model"' in text


@pytest.mark.parametrize("last", ["prepare", "train", "evaluate", "gate"])
def test_a_run_that_ended_early_is_reported_as_far_as_it_came(tmp_path: Path, last: str) -> None:
    """After each step there is a valid report, which says of the others that they have not run."""
    text, summary = make(tmp_path, last)
    check_schema(summary)
    page = Page(text)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert "not run" in page.text
    assert ("Not finished" in page.text) == (last != "gate")
    assert [step for step in STEPS if summary["seconds"][step] is None] == list(STEPS[STEPS.index(last) + 1 :])


@pytest.mark.parametrize("left_in", ["the folder of the run", "the store"])
def test_a_run_that_failed_says_where_and_why(tmp_path: Path, left_in: str) -> None:
    """The error of the step is in the headline and in the summary, until that step is published."""
    url = publish_until(tmp_path, "pretrain-value")
    error = RewardError("reward <mine>", "it returned NaN", "Return finite numbers")
    if left_in == "the store":
        open_store(url).write_json("failures/run-1.json", {"attempt": "1", "starts": [], "error": error.to_dict()})
    else:
        left = {"task": "train", "exit_code": error.exit_code, "message": str(error)}
        (tmp_path / "runs/run-1/error.json").write_text(json.dumps(left))
    report, numbers = write_report("run-1", url, str(tmp_path / "runs"))
    summary = json.loads(numbers.read_text())
    assert summary["failure"] == {"step": "train", "exit_code": error.exit_code, "message": str(error)}
    check_schema(summary)
    text = Page(report.read_text()).text
    assert "Failed in train" in text
    assert "Not finished" not in text
    assert str(error) in text

    publish_until(tmp_path, "train")
    report, numbers = write_report("run-1", url, str(tmp_path / "runs"))
    assert json.loads(numbers.read_text())["failure"] is None
    assert "Failed in train" not in Page(report.read_text()).text


@pytest.mark.parametrize("content", ["a folder", "a huge message", "a huge code"])
def test_what_is_left_of_a_failure_is_bounded(tmp_path: Path, content: str) -> None:
    """The file may be of anybody who can write to the folder of the run."""
    url, file = publish_until(tmp_path, "prepare"), tmp_path / "runs/run-1/error.json"
    if content == "a folder":
        file.mkdir()
    else:
        code, message = (5, "<" * 4_000_000) if content == "a huge message" else (10**4000, "short")
        file.write_text(json.dumps({"task": "train", "exit_code": code, "message": message}))
    if content == "a huge code":
        with pytest.raises(IntegrityError, match="exit_code"):
            write_report("run-1", url, str(tmp_path / "runs"))
        return
    report, numbers = write_report("run-1", url, str(tmp_path / "runs"))
    assert report.stat().st_size < 500_000
    assert (json.loads(numbers.read_text())["failure"] is None) == (content == "a folder")


def test_a_gate_that_allows_a_loss_is_noted(tmp_path: Path) -> None:
    """As that of the smoke recipes, which only try the pipeline. One bound that demands a gain is enough."""

    def allow(bounds: dict[str, float]) -> list[str]:
        def change(files: dict[str, Any]) -> None:
            settings = files["prepare"]["config.json"]
            files["prepare"]["config.json"] = settings | {"gate": settings["gate"] | bounds}

        name = f"run-{len(bounds)}"
        page, summary = make(tmp_path, change=change, run=name)
        assert all(note in page for note in summary["notes"])
        return [note for note in summary["notes"] if "proves no gain" in note]

    assert len(allow({"min_gain": -1.0, "min_lower_bound": -0.5})) == 1
    assert allow({"min_gain": -1.0}) == []


def test_a_held_run_says_so_with_the_reasons(tmp_path: Path) -> None:
    """The gate's hold is the headline; nothing was deployed, and the page says why."""

    def hold(files: dict[str, Any]) -> None:
        reasons = ["shapes_verifier gained 0.012, less than 0.05"]
        checks = [{"name": "gain", "value": 0.012, "relation": "at least", "bound": 0.05, "passed": False}]
        files["gate"]["gate.json"] = {"decision": "hold", "reasons": reasons, "checks": checks}
        gain = {"mean": 0.012, "low": -0.02, "high": 0.044, "n": 1024}
        files["evaluate"]["evaluation.json"] = EVALUATION | {"difference": {"shapes_verifier": gain}}

    text, summary = make(tmp_path, "gate", hold)
    check_schema(summary)
    shown = Page(text).text
    assert "Held back by the gate" in shown
    assert "gained 0.012, less than 0.05" in shown
    assert "went from 0.391 to 0.612" in shown
    assert "The interval contains 0, so this may be chance" in shown
    assert "nothing was deployed" in shown
    assert summary["serving"] is None


def test_the_time_of_each_worker_is_shown(complete: tuple[str, dict[str, Any]]) -> None:
    """Images and operations per second, their share of the peak, the slowest worker, and each worker's seconds."""
    text, summary = complete
    assert summary["speed"]["images_per_second"] == pytest.approx(30.5)
    assert summary["speed"]["phases"]["policy"] == pytest.approx([4.0, 4.5])
    shown = Page(text).text
    assert "30.50 images per second with 2 workers, 148.4 TFLOP/s, which is 7.5 % of the data-sheet peak." in shown
    assert "The slowest worker's own time is 1.25 times the mean." in shown
    assert "Each worker sent 12500000 bytes per iteration." in shown


def test_workers_of_other_numbers_are_not_averaged(tmp_path: Path) -> None:
    """An elastic job that lost a worker: the means are over the iterations since; a history without times has none."""

    def lose(files: dict[str, Any]) -> None:
        rows = history(40)
        for row in rows[30:]:
            row["speed"] |= {"images_per_second": 20.0, "phases": {name: [1.0] for name in PHASES}}
            del row["speed"]["tflops"]
        files["train"]["history.json"] = rows

    summary = make(tmp_path / "lost", change=lose)[1]
    assert (summary["speed"]["workers"], summary["speed"]["iterations"]) == (1, 10)
    assert (summary["speed"]["images_per_second"], summary["speed"]["tflops"]) == (20.0, None)

    def forget(files: dict[str, Any]) -> None:
        files["train"]["history.json"] = [{**row, "speed": None} for row in history(40)]

    assert make(tmp_path / "untimed", change=forget)[1]["speed"] is None

    def tear(files: dict[str, Any]) -> None:
        rows = history(40)
        rows[3]["speed"]["phases"]["policy"] = [1.0]
        files["train"]["history.json"] = rows

    with pytest.raises(IntegrityError, match="a number per worker"):
        make(tmp_path / "torn", change=tear)


def test_nan_becomes_null_and_a_note(tmp_path: Path) -> None:
    """Neither file ever holds NaN or infinity: there is null, a dash on the page, and a note of what was dropped."""

    def spoil(files: dict[str, Any]) -> None:
        rows = history(40)
        rows[3]["kl"] = rows[4]["kl"] = math.nan
        rows[5]["rewards"]["shapes_verifier"] = math.inf
        files["train"]["history.json"] = rows
        trained = {"shapes_verifier": interval(0.6, 0.03) | {"low": math.nan, "high": math.nan}}
        files["evaluate"]["evaluation.json"] = EVALUATION | {"trained": trained, "critic": {}}
        files["pretrain-value"]["metrics.json"] = {"explained_variance": [math.nan] * 10}
        files["steer"]["steering.json"] = [row | {"mean": math.nan} for row in steering()]

    text, summary = make(tmp_path, change=spoil)
    check_schema(summary)
    assert summary["training"][3]["kl"] is None
    assert summary["evaluation"]["trained"]["shapes_verifier"]["low"] is None
    assert summary["critic"]["explained_variance"] == [None] * 10
    assert summary["critic"]["explained_variance_trained"] is None
    assert "training[].kl: 2 values were not finite and became null" in summary["notes"]
    shown = Page(text).text
    assert "training[].kl: 2 values were not finite" in shown
    assert not re.search(r"\bnan\b|\binf\b", shown, re.IGNORECASE)


def test_the_model_in_production_stands_beside_the_others(tmp_path: Path) -> None:
    """Where a run met an incumbent, each table has its column, the gallery its images, the head the comparison."""
    text, summary = make(tmp_path, change=with_incumbent)
    check_schema(summary)
    page = Page(text)
    assert len(page.images) == 4 * len(PROMPTS) + 1
    assert [image["alt"] for image in page.images[:4]] == [
        f"{PROMPTS[0]}, by the {arm} model{mark}"
        for arm, mark in (("base", ": right"), ("incumbent", ""), ("trained", ": right"), ("steered", ": right"))
    ]
    assert f"Against the model in production, {VERSION} , the change is +0.041 (+0.008 to +0.075)" in page.text
    assert "0.571 0.541 to 0.602" in page.text
    assert "0.98 0.96 to 1.01" in page.text
    assert summary["evaluation"]["categories"]["counting"] == {"base": 0.502, "trained": 0.747, "incumbent": 0.345}


def test_a_model_in_production_that_could_not_be_compared_is_reported(tmp_path: Path) -> None:
    """The page says why, and shows no column for it."""

    def unfit(files: dict[str, Any]) -> None:
        production = {"version": VERSION, "sha256": None, "problem": "models/x: its backbone is dit."}
        files["evaluate"]["evaluation.json"] = EVALUATION | {"production": production}

    text, summary = make(tmp_path, change=unfit)
    check_schema(summary)
    assert summary["evaluation"]["incumbent"] is None
    assert "The model in production could not be compared. models/x: its backbone is dit." in Page(text).text
    assert "trained − incumbent" not in text


@pytest.mark.parametrize(
    ("step", "sections", "charts"),
    [("evaluate", ["galleries", "rewards", "contrasts"], 2), ("steer", ["galleries", "steering"], 2)],
)
def test_a_step_has_a_page_of_its_own(tmp_path: Path, step: str, sections: list[str], charts: int) -> None:
    """As soon as it is published: a part of the report, as self-contained as the whole, without a decision."""
    make(tmp_path, step)
    text = step_page(step, "run-1", f"file://{tmp_path}/runs/store")
    page = Page(text)
    assert [name for name in page.ids if name in SECTIONS] == sections
    assert page.charts == charts
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "Not finished" not in page.text


def test_the_gates_reasons_are_the_published_ones(tmp_path: Path) -> None:
    """Markdown for a user interface; before the gate there is none, and the error says so."""
    make(tmp_path, "steer")
    url = f"file://{tmp_path}/runs/store"
    with pytest.raises(ArtifactNotFound, match="run-1/gate"):
        gate_reasons("run-1", url)
    publish(tmp_path, contents(PROMPTS), PROMPTS)
    assert gate_reasons("run-1", url) == "# Promoted"


def test_no_weights_are_read(tmp_path: Path) -> None:
    """A backbone of many GB stays where it is: report, a step's page and the gate's reasons come from a store that has
    lost every other file than those that they show."""

    def add_weights(files: dict[str, Any]) -> None:
        files["prepare"]["backbone/unet/config.json"] = {"sample_size": 8}
        files["train"] |= {"policy/model_index.json": {}, "critic/config.json": {}}
        files["pretrain-value"]["critic/config.json"] = {}

    page, summary = make(tmp_path, change=add_weights)
    lost = [
        path
        for path in (tmp_path / "runs" / "store" / "run-1").rglob("*.json")
        if path.parent.name in ("unet", "policy", "critic")
    ]
    assert len(lost) == 4
    for path in lost:
        path.unlink()
    url, output = f"file://{tmp_path}/runs/store", str(tmp_path / "runs")
    again, numbers = write_report("run-1", url, output)
    assert (again.read_text(), json.loads(numbers.read_text())) == (page, summary)
    assert "<html" in step_page("evaluate", "run-1", url)
    assert gate_reasons("run-1", url)


def test_numbers_of_a_manifest_are_flat_and_finite(tmp_path: Path) -> None:
    """What a user interface can plot: nested names are joined, places count from 1, words and truths are left out."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "history.json").write_text("[]")
    metrics = {"decision": "promote", "gain": 0.25, "arms": 6, "fine": True, "ev": [0.1, 0.2], "last": {"a:b": 1.5}}
    manifest = open_store(f"file://{tmp_path}/store").publish(
        "r/train", tmp_path / "work", run="r", step="train", config_hash="c", metrics=metrics
    )
    assert numbers(manifest) == {"gain": 0.25, "arms": 6.0, "ev_01": 0.1, "ev_02": 0.2, "last_a_b": 1.5}


def test_words_from_outside_are_escaped(tmp_path: Path) -> None:
    """A prompt, a reward's name or a reason is text, whatever it looks like."""
    evil = "<script>alert(\"x\")</script> & 'quotes' $x$"

    def poison(files: dict[str, Any]) -> None:
        files["gate"]["gate.json"] |= {"decision": "hold", "reasons": [evil]}
        files["train"]["history.json"] = [row | {"rewards": row["rewards"] | {evil: 0.1}} for row in history(3)]

    text, _ = make(tmp_path, change=poison, prompts=[evil, *PROMPTS[1:]])
    assert "<script" not in text
    page = Page(text)
    assert page.text.count('<script>alert("x")</script>') == 2
    assert page.images[0]["alt"] == f"{evil}, by the base model: right"


def test_seconds_are_the_drivers_or_the_manifests(tmp_path: Path) -> None:
    """The driver's wall clock counts; without a driver the manifests' own seconds do, and the total is their sum."""

    def seconds_with(timings: str | None) -> tuple[dict[str, float | None], list[str]]:
        path = tmp_path / "runs" / "run-1" / "timings.json"
        path.unlink() if timings is None else path.write_text(timings)
        _, report = write_report("run-1", f"file://{tmp_path}/runs/store", str(tmp_path / "runs"))
        summary = json.loads(report.read_text())
        return {name: value for name, value in summary["seconds"].items() if value is not None}, summary["notes"]

    make(tmp_path, "pretrain-value")
    booked = '{"steps": {"prepare": 9.0, "pretrain-value": 44.0, "train": 12.0}, "total": 66.0}'
    expected = {"prepare": 9.0, "pretrain-value": 44.0, "train": 12.0, "total": 66.0}  # train was tried
    assert seconds_with(booked) == (expected, [])
    found, notes = seconds_with('{"steps": {}, "total": 30.0}')
    assert found == {"prepare": 4.2, "pretrain-value": 38.5, "total": 30.0}
    assert "less than the sum of the steps" in notes[0]
    assert seconds_with(None) == ({"prepare": 4.2, "pretrain-value": 38.5, "total": pytest.approx(42.7)}, [])
    with pytest.raises(IntegrityError, match=r"timings.json: .* Remove it"):
        seconds_with('{"steps"')
    for damaged in (
        "[1]",
        '{"total": "x"}',
        '{"total": 1e999}',
        '{"steps": [1]}',
        '{"steps": {"a": null}}',
        "[" * 10**5,
    ):
        with pytest.raises(IntegrityError, match=r"timings\.json: "):
            seconds_with(damaged)


def test_the_way_to_serve_names_what_is_not_default(complete: tuple[str, dict[str, Any]], folder: Path) -> None:
    """The command as printed finds the run again, wherever it was written."""
    text, _ = complete
    assert f" serve --run run-1 --output {folder}/runs</pre>" in text


def test_tensorboard_and_the_comparison_are_named_as_they_are_typed(tmp_path: Path) -> None:
    """In the report and in what the terminal tells: with the folder, and with a store that is not the folder's own."""
    page, _ = make(tmp_path, "train")
    assert f"tensorboard --logdir {tmp_path}/runs/run-1/tensorboard" in page
    assert f" compare run-1 ANOTHER-RUN --output {tmp_path}/runs</pre>" in page
    commands = next_commands("run-1", "s3://bucket/prefix", "runs")
    assert commands["tensorboard"].endswith("tensorboard --logdir runs/run-1/tensorboard")
    documented = Path(__file__).resolve().parents[2] / "latentac" / "runs" / "reporting" / "tracking" / "README.md"
    assert "tensorboard --logdir runs/<run>/tensorboard" in documented.read_text()
    assert commands["compare"].endswith(" compare run-1 ANOTHER-RUN --store s3://bucket/prefix")


def test_a_run_without_artifacts_is_refused(tmp_path: Path) -> None:
    """Nothing was prepared: the error names the run, and no report is left behind."""
    with pytest.raises(ConfigError, match=r"run = 'run-9': has published nothing in .* Known there: none"):
        write_report("run-9", f"file://{tmp_path}/store", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["evaluate", "steer"], r"evaluate: gallery/base.png is \(128, 64\) pixels, gallery.json says \(96, 96\)"),
        (["steer"], "steer: its gallery has other prompts, seeds or sizes than that of evaluate"),
    ],
)
def test_a_gallery_that_does_not_fit_its_captions_is_refused(tmp_path: Path, steps: list[str], message: str) -> None:
    """Images under a wrong prompt, or beside one of another seed, would be worse than no report."""

    def shift(files: dict[str, Any]) -> None:
        for step in steps:
            files[step]["gallery/gallery.json"] = gallery(PROMPTS) | {"columns": 3}

    with pytest.raises(IntegrityError, match=message):
        make(tmp_path, change=shift)


@pytest.mark.parametrize(("shape", "size"), [((16, 48), [16, 48]), ((48, 16), [48, 16]), ((16, 16), 16)])
def test_images_of_any_shape_are_cut_as_they_were_put(tmp_path: Path, shape: tuple[int, int], size: Any) -> None:
    """Wide, tall, and square ones; a number alone, as older runs have it, is a square's."""
    images = np.random.default_rng(0).integers(0, 256, (6, *shape, 3)).astype(np.uint8)
    contact_sheet(images, 4).save(tmp_path / "base.png")
    index = gallery(PROMPTS[:1] * 6) | {"image_size": size}
    cells = rendering._cut(tmp_path / "base.png", "a run", index)
    for cell, image in zip(cells, images, strict=True):
        data = base64.b64decode(cell.partition(",")[2])
        assert (np.asarray(Image.open(io.BytesIO(data))) == image).all()


def test_charts_of_many_numbers_are_drawn_of_some(tmp_path: Path) -> None:
    """A run's artifacts may be somebody else's: what no chart can show takes no minutes to draw. The last point of a
    curve stays."""
    rows = [
        {"method": f"m{number}", "strength": 1.0, "particles": 1, "nfe": number + 1, "reward": "shapes_verifier"}
        | interval(0.5, 0.1)
        for number in range(1000)
    ]
    points = [{"images": number, "kl": 0.1} for number in range(50_000)]
    started = time.process_time()
    steering, curve = charts._steering("r", "u", rows), charts._diagnostic("kl", "KL", "nats", points)
    assert time.process_time() - started < 30
    assert max(map(len, (steering, curve))) < 500_000
    assert ">m999</text>" in steering
    assert charts._some([(1, 2.0), (2, 3.0)], 2) == [(1, 2.0), (2, 3.0)]
    assert charts._some(list(range(50_000)), 2_000)[-1] == 49_999

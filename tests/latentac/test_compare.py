"""The page about several runs: what it compares, what it refuses to compare and says so, and who may be in it."""

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentac.runs.cli import main
from latentac.runs.reporting.charts import draw_comparison
from latentac.runs.reporting.compare import Comparison, table, write_comparison
from latentac.runs.reporting.comparison import letter
from latentac.system.errors import ConfigError
from tests.latentac.published import EVALUATION, PROMPTS, SETTINGS, Page, history, interval, leaves, publish_until

SECTIONS = ["runs", "settings", "rewards", "curves", "galleries"]
Change = Callable[[dict[str, Any]], None]


def settings(**sections: Any) -> dict[str, Any]:
    """The fixture's settings with fields of sections replaced; what is not a dictionary is replaced itself."""
    changed: dict[str, Any] = copy.deepcopy(SETTINGS)
    for name, fields in sections.items():
        changed[name] = changed[name] | fields if isinstance(fields, dict) else fields
    return changed


def better(files: dict[str, Any]) -> None:
    """A run with another learning rate, whose every second image is right where the first run's is wrong too."""
    files["prepare"]["config.json"] = settings(policy={"learning_rate": 1e-4})
    measured = copy.deepcopy(EVALUATION)
    measured["trained"]["shapes_verifier"] = interval(0.75, 0.03)
    measured["difference"]["shapes_verifier"] = interval(0.36, 0.03)
    files["evaluate"]["evaluation.json"] = measured
    files["evaluate"]["scores.json"]["rewards"]["trained"]["shapes_verifier"] = [1.0, 0.0, 1.0, 1.0] * 32
    files["train"]["history.json"] = history(30)


def compared(
    folder: Path, *changes: Change, last: str = "gate", points: dict[str, str] | None = None, to: Path | None = None
) -> Comparison:
    """`first` as it is, then a run for each change, up to the step `last`, compared."""
    publish_until(folder, run="first")
    names = ["first"]
    for place, change in enumerate(changes, 2):
        names.append(f"run-{place}")
        publish_until(folder, last, change, run=names[-1])
    return write_comparison(names, f"file://{folder}/runs/store", str(folder / "runs"), to, points)


def reward(made: Comparison, name: str = "shapes_verifier") -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in made.content["rewards"] if row["reward"] == name)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two complete runs that differ in one setting and in their results."""
    return compared(tmp_path_factory.mktemp("pair"), better)


def test_one_self_contained_page_has_everything(pair: Comparison) -> None:
    """Sections, charts, images with words for each; nothing is loaded from elsewhere; the JSON lies beside it."""
    text = pair.page.read_text()
    page = Page(text)
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert page.charts == 5  # two rewards, KL, explained variance twice
    assert len(page.images) == 3 * len(PROMPTS)  # the base, which both have, and each one's trained
    assert all(image["alt"] and (image["src"] or "").startswith("data:image/png;base64,") for image in page.images)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert json.loads(pair.numbers.read_text(), parse_constant=pytest.fail) == pair.content
    assert pair.numbers == pair.page.with_suffix(".json")


def test_the_curves_of_all_runs_share_their_axes(pair: Comparison) -> None:
    """In each chart a line for each run, with its letter."""
    charts = draw_comparison(pair.content)
    assert len(charts) == 5
    for name, svg in charts.items():
        assert set(re.findall(r"<text\b[^>]*>\s*([A-Z])\s*</text>", svg)) == {"A", "B"}, name


def test_every_number_of_the_page_is_in_its_json(pair: Comparison) -> None:
    """Each number that is shown is one of comparison.json's, rounded or as it is."""
    known = set(leaves(pair.content))
    rest = Page(pair.page.read_text()).text
    for words in sorted((leaf for leaf in known if isinstance(leaf, str)), key=len, reverse=True):
        rest = rest.replace(words[:8] if re.fullmatch(r"[0-9a-f]{40}", words) else words, " ")
    values = [abs(leaf) for leaf in known if isinstance(leaf, int | float)]
    shown = set(re.findall(r"\d[\d.]*(?:e-?\d+)?(?<!\.)", rest)) - {"2", "95", "8"}
    assert len(shown) > 25
    for number in shown:
        digits = len(number.partition(".")[2])
        assert number in {f"{value:.{digits}f}" for value in values} | {repr(value) for value in values}, number


def test_only_settings_that_differ_are_listed(pair: Comparison) -> None:
    """One learning rate, of all."""
    assert pair.content["settings"] == [{"path": "policy.learning_rate", "values": ["6e-05", "0.0001"]}]
    text = Page(pair.page.read_text()).text
    assert "policy.learning_rate" in text
    assert "warmup_updates" not in text


def test_runs_with_the_same_prompts_and_noise_are_compared_image_by_image(pair: Comparison) -> None:
    """The paired difference of what each image scored, and its interval, narrower than an unpaired one."""
    row = reward(pair)["differences"][1]
    own = np.array([1.0, 0.0, 1.0, 1.0] * 32)
    other = np.array([1.0, 0.0] * 64)
    assert row["how"] == "paired"
    assert row["mean"] == pytest.approx((own - other).mean())
    assert row["n"] == 128
    half = 1.96 * (own - other).std() / math.sqrt(128)
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.15)
    assert reward(pair)["differences"][0] is None
    assert "paired" in Page(pair.page.read_text()).text


def test_the_terminal_gets_a_short_table(pair: Comparison) -> None:
    """A line a run with its gain, the difference and the gate's word, no wider than what is in it."""
    title, head, first, second = table(pair.content)
    assert title == "shapes_verifier, held-out prompts, means with 95 % intervals"
    assert head.split() == ["run", "base", "trained", "gain", "minus", "A", "gate"]
    assert first.startswith("A  first")
    assert re.search(r" -  +promote$", first)
    assert "+0.360 [+0.330, +0.390]  +0.250 [" in second


def test_galleries_stand_side_by_side_with_marks(pair: Comparison) -> None:
    """Prompt by prompt: the common base, then each trained model, right or wrong by its reward."""
    images = Page(pair.page.read_text()).images
    assert [image["alt"] for image in images[3:6]] == [
        f"{PROMPTS[1]}, by the {name} model: wrong" for name in ("base", "A trained", "B trained")
    ]
    gallery = pair.content["gallery"]
    assert gallery["same_seeds"] is True
    assert gallery["columns"] == ["base", "A trained", "B trained"]
    assert gallery["rows"][0]["cells"][1] == {"place": 0, "seed": "7/0", "score": 1.0}


@pytest.mark.parametrize("last", ["prepare", "pretrain-value", "train", "evaluate"])
def test_a_run_that_stopped_early_is_shown_as_far_as_it_came(tmp_path: Path, last: str) -> None:
    """Its curves and tables have what there is, the rest is a dash, and a note says where it stopped."""
    made = compared(tmp_path, lambda files: None, last=last)
    assert f"B (run-2) stopped after {last}; later steps are missing here" in made.content["notes"]
    second = made.content["series"][1]
    assert second["runs"][0]["state"] == f"stopped after {last}"
    assert bool(second["training"][0]) == (last in ("train", "evaluate"))
    assert (reward(made)["series"][1]["trained"] is not None) == (last == "evaluate")
    Page(made.page.read_text())
    assert f"stopped after {last}" in "\n".join(table(made.content))


def test_runs_of_other_noise_are_compared_unpaired_and_it_says_so(tmp_path: Path) -> None:
    """Another seed: the interval is that of two independent samples, the galleries show prompts, not pairs."""

    def other_seed(files: dict[str, Any]) -> None:
        better(files)
        files["prepare"]["config.json"] = settings() | {"seed": 8}
        files["evaluate"]["scores.json"]["noise"]["seed"] = 8
        for step in ("evaluate", "steer"):
            files[step]["gallery/gallery.json"]["seeds"] = [f"8/{place}" for place in range(len(PROMPTS))]

    made = compared(tmp_path, other_seed)
    row = reward(made)["differences"][1]
    assert row["how"] == "unpaired"
    assert row["mean"] == pytest.approx(0.25)
    assert "not evaluated on the same prompts and noise, so their difference is not paired" in made.content["notes"][0]
    assert made.content["gallery"]["same_seeds"] is False
    assert made.content["settings"] == []
    text = Page(made.page.read_text()).text
    assert "compare how many images are right, not single images" in text
    assert "None: the runs differ only in their seeds." in text


def test_runs_of_an_earlier_version_are_compared_by_their_intervals(tmp_path: Path) -> None:
    """Without scores of images the two intervals give that of the difference: the root of their squares."""

    def earlier(files: dict[str, Any]) -> None:
        better(files)
        del files["evaluate"]["scores.json"], files["evaluate"]["gallery/gallery.json"]["rewards"]

    made = compared(tmp_path, earlier)
    row = reward(made)["differences"][1]
    assert row["how"] == "unpaired"
    assert row["mean"] == pytest.approx(0.75 - 0.6123)
    assert row["high"] - row["mean"] == pytest.approx(math.hypot(0.03, 0.0301))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("prompts", "they have different held-out prompts"),
        ("reward", "shapes_verifier is configured differently"),
        ("unit", "shapes_verifier has different units"),
        ("missing", "run-2 has no reward jpeg_compressibility"),
        ("base", "start from different base models, so their gains have different references"),
        ("gate", "use different rewards: jpeg_compressibility and shapes_verifier"),
        ("gallery", "The galleries have no prompt in common"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, name: str, reason: str) -> None:
    """The numbers of each run are shown, and where they mean different things no difference is taken."""

    def change(files: dict[str, Any]) -> None:
        first, second = settings()["rewards"]
        if name == "prompts":
            files["prepare"]["prompts.json"]["held_out"].pop()
        elif name == "reward":
            files["prepare"]["config.json"] = settings(rewards=[first | {"options": {"size": 3}}, second])
        elif name == "unit":
            files["evaluate"]["evaluation.json"] = EVALUATION | {"units": {"shapes_verifier": "points"}}
        elif name == "missing":
            files["prepare"]["config.json"] = settings(rewards=[first])
        elif name == "base":
            files["prepare"]["backbone/model_index.json"] = {"_class_name": "Other"}
        elif name == "gate":
            files["prepare"]["config.json"] = settings(gate={"reward": "jpeg_compressibility"})
        else:
            for step in ("evaluate", "steer"):
                files[step]["gallery/gallery.json"]["prompts"] = [f"other {place}" for place in range(len(PROMPTS))]

    made = compared(tmp_path, change)
    assert reason in " ".join(made.content["notes"])
    compared_at_all = name in ("missing", "base", "gate", "gallery")
    assert (reward(made)["differences"][1] is not None) == compared_at_all
    if name == "missing":
        assert reward(made, "jpeg_compressibility")["differences"][1] is None
    if name == "base":
        assert made.content["gallery"]["columns"] == ["A base", "A trained", "B base", "B trained"]
    assert (made.content["gallery"] is None) == (name == "gallery")
    assert reason in Page(made.page.read_text()).text


def test_a_point_of_a_sweep_is_the_mean_over_its_seeds(tmp_path: Path) -> None:
    """Two points of two seeds: Student's t over the seeds, the difference seed by seed, and one colour a point."""
    means = {"first": 0.6, "run-2": 0.7, "run-3": 0.71, "run-4": 0.79}

    def at(run: str, seed: int) -> Change:
        def change(files: dict[str, Any]) -> None:
            measured = copy.deepcopy(EVALUATION)
            measured["trained"]["shapes_verifier"] = interval(means[run], 0.03)
            files["evaluate"]["evaluation.json"] = measured
            files["prepare"]["config.json"] = settings() | {"seed": seed}

        return change

    for run, seed in zip(means, (0, 1, 0, 1), strict=True):
        publish_until(tmp_path, change=at(run, seed), run=run)
    points = dict(zip(means, ("rate=1", "rate=1", "rate=2", "rate=2"), strict=True))
    made = write_comparison(list(means), f"file://{tmp_path}/runs/store", str(tmp_path / "runs"), points=points)
    assert [series["label"] for series in made.content["series"]] == ["rate=1", "rate=2"]
    rows = reward(made)
    half = 12.706 * np.std([0.6, 0.7], ddof=1) / math.sqrt(2)
    assert rows["series"][0]["trained"] == {
        "mean": pytest.approx(0.65),
        "low": pytest.approx(0.65 - half, abs=1e-3),
        "high": pytest.approx(0.65 + half, abs=1e-3),
        "n": 2,
    }
    assert rows["series"][0]["over"] == "seeds"
    assert rows["differences"][1]["mean"] == pytest.approx(0.1)
    assert rows["differences"][1]["how"] == "seed by seed"
    assert rows["differences"][1]["high"] == pytest.approx(
        0.1 + 12.706 * np.std([0.11, 0.09], ddof=1) / 2**0.5, abs=1e-3
    )
    text = Page(made.page.read_text()).text
    assert "2 points of a sweep, side by side" in text
    assert "Student's t over the seeds of a point" in text
    assert "rate=1 (2 seeds)" in table(made.content)[2]


def test_words_of_runs_are_escaped(tmp_path: Path) -> None:
    """A prompt and a reason are text, whatever they look like."""
    evil = "<script>alert(1)</script>"

    def poison(files: dict[str, Any]) -> None:
        files["gate"]["gate.json"] = {"decision": "hold", "reasons": [evil], "checks": []}

    text = compared(tmp_path, poison).page.read_text()
    assert "<script" not in text
    assert f"B (run-2) was held: {evil}." in Page(text).text


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    """One message for all of them, with the known runs and where else to look; one run alone is not a comparison."""
    publish_until(tmp_path, "prepare", run="first")
    url, output = f"file://{tmp_path}/runs/store", str(tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"(?s)second.*third.*Known there: first") as caught:
        write_comparison(["first", "second", "third"], url, output)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="a comparison needs two runs"):
        write_comparison(["first", "first"], url, output)
    assert list((tmp_path / "runs").glob("compare*")) == []


def test_the_command_writes_where_it_should(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`latentac compare A B --to FILE`: the table, and the two files; without torch, for it only reads JSON."""
    publish_until(tmp_path, run="first")
    publish_until(tmp_path, "train", run="second")
    words = ["compare", "first", "second", "--output", str(tmp_path / "runs")]
    assert main([*words, "--to", str(tmp_path / "new" / "two.html")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == [str(tmp_path / "new" / name) for name in ("two.html", "two.json")]
    assert main([*words[:2], "--output", str(tmp_path / "runs")]) == 2
    script = f"import sys; from latentac.runs.cli import main; main({words!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert (tmp_path / "runs" / "compare.html").exists()


def test_letters_go_on_after_z() -> None:
    """A sweep may have more points than the alphabet has letters."""
    assert [letter(place) for place in (0, 25, 26, 27, 52)] == ["A", "Z", "AA", "AB", "BA"]

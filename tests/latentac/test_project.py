"""A run that its gate holds, as a person meets it: decided again, looked at, forced. And what is served of whom."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentac.runs import steps
from latentac.runs.cli import main
from latentac.runs.release.deploy import Candidate, model_to_use
from latentac.runs.release.incumbent import pointer, production, put_in_production
from latentac.runs.reporting.report import write_report
from latentac.runs.workspace import Workspace, open_run
from latentac.serving.deployment import Deployment
from tests.latentac import test_release
from tests.latentac.test_incumbent import start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MIN_GAIN = "gate.min_gain=0.02"
CHECK = "shapes_verifier: gain: 0.000 is not at least 0.020"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def held_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that is evaluated and held, for it is not a bit better than its base."""
    output = tmp_path_factory.mktemp("runs")
    start(output, "held", MIN_GAIN)
    for each in (steps.evaluate, steps.steer, steps.gate):
        each("held", "", str(output))
    return output


@pytest.fixture
def held(held_once: Path, tmp_path: Path) -> Path:
    shutil.copytree(held_once, tmp_path / "runs")
    return tmp_path / "runs"


def proved(candidate: Candidate) -> Deployment:
    """As if a server had answered with an image."""
    image = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(image, "PNG")
    return dataclasses.replace(test_release.proved(candidate), image=image.getvalue())


def command(output: Path, name: str, *words: str, run: str = "held") -> int:
    return main([name, *(["--run", run] if run else []), "--output", str(output), *words])


def published(output: Path, step: str, name: str) -> Any:
    space = open_run("held", "", str(output))
    folder = output / f"looked-at-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    space.store.fetch(f"held/{step}", folder)
    text = (folder / name).read_text()
    return json.loads(text) if name.endswith(".json") else text


def workspace(output: Path) -> Workspace:
    return open_run("held", "", str(output))


def test_a_run_is_judged_again_with_other_bounds(held: Path) -> None:
    """Without training: the decision is new, says which bound was changed and by whom, and names the one before it;
    deploy follows it, and so does the report. The gate without other bounds changes nothing any more."""
    steps.finish("held", "", str(held))
    before = published(held, "gate", "gate.json")
    assert (before["decision"], before["overrides"], before["former"]) == ("hold", [], [])
    assert command(held, "gate", "--set", "gate.min_gain=-0.5") == 0
    decision = published(held, "gate", "gate.json")
    assert decision["decision"] == "promote"
    assert decision["overrides"] == [{"field": "gate.min_gain", "old": 0.02, "new": -0.5}]
    assert decision["by"]
    (former,) = decision["former"]
    assert (former["decision"], former["reasons"]) == ("hold", [CHECK])
    reasons = published(held, "gate", "reasons.md")
    assert reasons.startswith("# Promoted: run held")
    assert f"- promote, now by {decision['by']}: gate.min\\_gain is -0.5, not 0.02" in reasons
    assert f"- hold, {former['decided']}: the bounds of the run's configuration" in reasons

    assert steps.gate("held", "", str(held)).metrics["decision"] == "promote"
    assert published(held, "gate", "gate.json") == decision
    version = steps.deploy("held", "", str(held), prove=proved).metrics["version"]
    assert workspace(held).store.read_json(pointer("shapes-unet-smoke"))["version"] == version
    assert command(held, "deploy") == 0  # which is done; the report that was there says so now
    summary = json.loads((held / "held" / "summary.json").read_text())
    assert summary["gate"]["overrides"] == decision["overrides"]
    assert summary["gate"]["former"][0]["decision"] == "hold"
    page = re.sub(r"\s+", " ", (held / "held" / "report.html").read_text())
    assert "<code>gate.min_gain</code> is −0.5, not 0.02" in page
    assert "Decided before:" in page
    assert "`gate.min_gain` is -0.5, not 0.02" in (held / "held" / "card.md").read_text()

    assert command(held, "gate", "--set", "gate.min_gain=0.9") == 0  # and back
    decision = published(held, "gate", "gate.json")
    assert decision["decision"] == "hold"
    assert [each["decision"] for each in decision["former"]] == ["hold", "promote"]
    assert command(held, "deploy") == 2  # what was deployed by a decision that stands no more is not an excuse


def test_a_dry_run_of_the_gate_only_prints(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checks with the bounds that were asked about; the published decision stays."""
    manifest = workspace(held).store.manifest("held/gate")
    assert command(held, "gate", "--dry-run", "--set", "gate.min_gain=-0.5") == 0
    assert capsys.readouterr().out.startswith("# Promoted: run held")
    assert workspace(held).store.manifest("held/gate") == manifest


def test_only_bounds_can_be_changed_and_all_problems_are_shown(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another section, no field, a field that is not there, a wrong value, no assignment: one message, nothing new."""
    manifest = workspace(held).store.manifest("held/gate")
    words = ("seed=1", "gate=3", "gate.min_gian=1", "gate.max_latency_ratio=-1", "gate.floors={beauty: 1}", "gate")
    assert command(held, "gate", *(part for word in words for part in ("--set", word))) == 2
    output = capsys.readouterr().err
    for expected in (
        "--set = 'seed=1': was fixed when the run began. Only fields of gate can be overridden.",
        "--set = 'gate=3': names no field",
        'gate.min_gian = 1: unknown field. Did you mean "min_gain"?',
        "gate.max_latency_ratio = -1",
        "--set = 'gate': is not path=value",
    ):
        assert expected in output
    assert workspace(held).store.manifest("held/gate") == manifest
    assert command(held, "gate", "--set", "gate.floors={beauty: 1}") == 2
    assert "gate.floors.beauty = 1" in capsys.readouterr().err


def test_a_held_run_is_not_deployed_unless_it_is_forced(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal lists the failed checks and both ways on; by force it is in production, and everything says so."""
    assert command(held, "deploy") == 2
    output = capsys.readouterr().err
    assert f"run = 'held': is not to be deployed: {CHECK}. Decide again" in output
    again, forced = re.findall(r"\((\S*latentac [^)]+)\)", output)
    assert shlex.split(again)[1:] == ["gate", "--run", "held", "--output", str(held), "--set", "gate.FIELD=VALUE"]
    assert shlex.split(forced)[1:] == ["deploy", "--run", "held", "--output", str(held), "--force"]
    store = workspace(held).store
    assert production(store, "shapes-unet-smoke") is None
    assert store.keys("models") == []

    steps.deploy("held", "", str(held), prove=proved, force=True)
    now = production(store, "shapes-unet-smoke")
    assert now is not None
    assert now.forced == (CHECK,)
    deployment = published(held, "deploy", "deployment.json")
    assert deployment["project"] == "shapes-unet-smoke"
    assert deployment["forced"]["reasons"] == [CHECK]
    assert deployment["forced"]["by"]
    steps.finish("held", "", str(held))
    assert (
        f"Forced into production against the gate's decision. The gate's reasons:\n\n- {CHECK}"
        in (held / "held" / "card.md").read_text()
    )
    page = re.sub(r"\s+", " ", (held / "held" / "report.html").read_text())
    assert "Held back by the gate, and in production by force" in page
    assert "Forced against the gate's decision by" in page
    with model_to_use("", "", "", str(held)) as (_, output):
        assert output == f"{now.version}, in production in project shapes-unet-smoke, forced over its gate ({CHECK})"


def test_a_deployed_run_follows_a_decision_that_was_given_since(held: Path) -> None:
    """By force at first, then promoted by other bounds: it is deployed again, and nothing says `forced` any more. What
    was fetched of the decision before stands in nobody's way."""
    steps.deploy("held", "", str(held), prove=proved, force=True)
    steps.gate("held", "", str(held), overrides=["gate.min_gain=-0.5"])
    steps.deploy("held", "", str(held), prove=proved)
    now = production(workspace(held).store, "shapes-unet-smoke")
    assert now is not None
    assert now.forced == ()


def test_a_model_that_was_promoted_since_the_decision_is_not_replaced_silently(
    held: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decision is about the model in production of its time."""
    assert command(held, "gate", "--set", "gate.min_gain=-0.5") == 0
    put_in_production(start(held, "other", "seed=5"), "other-1")
    assert command(held, "deploy") == 2
    output = capsys.readouterr().err
    assert "is not to be deployed: it was decided against nothing, and other-1 serves now. Decide again" in output
    steps.deploy("held", "", str(held), prove=proved, force=True)
    now = production(workspace(held).store, "shapes-unet-smoke")
    assert now is not None
    assert (now.previous, now.forced) == ("other-1", ("it was decided against nothing, and other-1 serves now",))


def test_what_was_deployed_last_is_served_or_a_projects_own(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two projects the one that was deployed to last, said with how to choose; a held run that is newer does not
    count, and a pointer that is damaged hides nobody else's."""
    assert command(held, "serve", run="") == 2
    assert "--project = None: nothing is in production" in capsys.readouterr().err
    steps.deploy("held", "", str(held), prove=proved, force=True)
    start(held, "other", "project=mine", "seed=5")
    store = workspace(held).store
    for each in (steps.evaluate, steps.steer, steps.gate):
        each("other", "", str(held))
    steps.deploy("other", "", str(held), prove=proved)
    write_report("held", store.url, str(held))  # the newest summary is that of another run
    with model_to_use("", "", "", str(held)) as (folder, found):
        assert folder == held / "other" / "model"
        assert "in production in project mine. It was deployed last" in found
        assert "--project with one of shapes-unet-smoke" in found
    with model_to_use("", "shapes-unet-smoke", "", str(held)) as (folder, found):
        assert folder == held / "held" / "model"
    store.write_json(pointer("broken"), {"version": 3})
    with model_to_use("", "", "", str(held)) as (folder, _):
        assert folder == held / "other" / "model"
    for words, problem in (
        (["--project", "nobody"], "Projects with a model in production: mine, shapes-unet-smoke."),
        (["--project", "../x"], "is not a project name"),
        (["--project", "mine", "--run", "held"], "--run names held already"),
        (["--project", "broken"], "it names no version and run"),
    ):
        assert command(held, "serve", *words, run="") in (2, 4)
        assert problem in capsys.readouterr().err


@contextlib.contextmanager
def serving(output: Path, *words: str) -> Iterator[tuple["subprocess.Popen[str]", str, str]]:
    """`latentac serve`: the process, what it said, and its address."""
    call = [sys.executable, "-m", "latentac.runs.cli", "serve", "--output", str(output), "--port", "0", *words]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = ""
    try:
        while "| python3" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield process, said, re.findall(r"http://[\d.:]+", said)[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def snapshot(output: Path) -> set[str]:
    return {str(path) for path in (output / "store").rglob("*")}


def test_a_held_run_is_looked_at_without_touching_production(held: Path) -> None:
    """Served by its name: nothing new in the store; terminal, options and model folder say what it is, the command that
    is printed draws an image, and the folder goes when the server goes."""
    before = snapshot(held)
    with serving(held, "--run", "held") as (process, said, address):
        assert said.count("held: for inspection only, not in production") == 2
        with urllib.request.urlopen(f"{address}/v1/images/options", timeout=30) as answer:
            options = json.load(answer)
        assert options["notice"] == "held: for inspection only, not in production"
        assert options["version"].startswith("held-")
        script = said[said.index("  curl") :]
        subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=held, check=True, timeout=120)
        assert (held / "image.png").read_bytes().startswith(b"\x89PNG")
    assert process.returncode == 0
    assert snapshot(held) == before
    assert not list((held / "held").glob(".latentac-*"))
    assert not (held / "held" / "model").exists()


def test_images_of_a_run_that_is_not_judged_yet(held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate` takes the same models; one that has not trained is told."""
    start(held, "young", "seed=9")
    words = ["--prompt", "a red circle", "--image", str(held / "young.png")]
    before = snapshot(held)
    assert command(held, "generate", *words, run="young") == 0
    assert "not decided yet: for inspection only, not in production" in capsys.readouterr().err
    assert (held / "young.png").exists()
    assert snapshot(held) == before
    steps.prepare("new", "", str(held), "shapes-unet-smoke")
    assert command(held, "generate", *words, run="new") == 3
    assert "new/train" in capsys.readouterr().err
    assert command(held, "generate", *words, run="../x") == 2


def test_make_serves_what_was_deployed_last(held: Path) -> None:
    """`make serve` is `latentac serve`: a held run with the newest summary is not a model to serve."""
    write_report("held", workspace(held).store.url, str(held))
    call = ["make", "-C", str(ROOT), "serve", f"OUTPUT={held}"]
    output = subprocess.run(call, capture_output=True, text=True, check=False, env=os.environ | {"MAKEFLAGS": ""})
    assert output.returncode != 0
    assert f"nothing is in production in file://{held}/store" in output.stderr
    output = subprocess.run([*call, "PROJECT=mine"], capture_output=True, text=True, check=False)
    assert "--project = 'mine'" in output.stderr

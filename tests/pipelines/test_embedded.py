"""The driver `python -m latentac.pipelines run` as a person calls it: wrong input, a busy run, the help."""

import fcntl
import io
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from latentac.pipelines.console import Console
from latentac.pipelines.driver import _conclude, _done_already
from latentac.pipelines.embedded import processes
from latentac.pipelines.request import Request, create_run, load_run
from latentac.pipelines.ways import Way
from latentac.runs.configuration import resolve_recipe
from latentac.runs.steps import FUNCTIONS, prepare
from latentac.store import Manifest, open_store
from latentac.system.steps import NAMES as STEPS
from tests.latentac.test_finish import published


def pipelines(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "latentac.pipelines", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["run-containers", "--help"], ["compile", "--help"]]
)
def test_help_has_examples_and_comes_at_once(arguments: list[str]) -> None:
    """Half a second of work: neither kfp nor torch is imported for it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    helped = pipelines(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    assert helped.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    assert arguments[0] == "compile" or "python -m latentac.pipelines run --recipe shapes-unet-smoke" in helped.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "shapes-unte"], "recipe = 'shapes-unte': does not exist."),
        (["--seed", "1", "--set", "train.num_iteration=3"], "train.num_iteration = 3: unknown field. Did you mean"),
        (["--recipe", ""], "recipe = '': does not exist."),
        (["--project", "../x"], "project = '../x': is not a valid name. Use letters"),
        (["--project", ""], "project = '': is not a valid name. Use letters"),
        (["--config", "x" * 300], "--config"),
        (["--config", "missing.yaml"], "--config = 'missing.yaml': cannot be read"),
    ],
)
def test_wrong_configuration_is_one_message_and_leaves_nothing(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    """Exit code 2, no traceback, and no folder of a run that never was."""
    failed = pipelines("run", "--output", str(tmp_path), *arguments)

    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.startswith(message)
    assert len(failed.stderr.splitlines()) == 1
    assert "Traceback" not in failed.stdout
    assert message not in failed.stdout
    assert [path.name for path in tmp_path.iterdir()] == []


def test_output_that_is_no_folder_is_one_message(tmp_path: Path) -> None:
    """Exit code 6 before anything begins."""
    (tmp_path / "file").touch()
    failed = pipelines("run", "--output", str(tmp_path / "file"))

    assert failed.returncode == 6
    assert failed.stderr.startswith(f"{tmp_path / 'file'}: no folder can be made in it")
    assert len(failed.stderr.splitlines()) == 1


def test_store_without_access_fails_in_prepare_and_says_how_to_go_on(tmp_path: Path) -> None:
    """The documented code of the error is the driver's, and the message is told once."""
    (tmp_path / "file").touch()
    failed = pipelines("run", "--output", str(tmp_path / "runs"), "--store", f"file://{tmp_path / 'file'}")

    run = next((tmp_path / "runs").iterdir()).name
    error, resume = failed.stderr.splitlines()
    left = json.loads((tmp_path / "runs" / run / "error.json").read_text())
    assert error == f"prepare: {left['message']}"
    assert failed.returncode == left["exit_code"]
    assert failed.returncode in (3, 6)
    assert resume.startswith("resume with: ")
    assert resume.endswith(f"latentac run --resume {run} --output {tmp_path / 'runs'}")
    assert "[1/8] prepare failed" in failed.stdout


@pytest.mark.parametrize("run", ["shapes-unet-19990101-000000", "../runs", "store", "", "x" * 300, "a\nb"])
def test_resume_of_a_run_that_is_not_there_lists_those_that_are(tmp_path: Path, run: str) -> None:
    """A folder without a request is not a run."""
    (tmp_path / "store").mkdir()
    known, _ = create_run(Request("shapes-unet"), tmp_path)
    failed = pipelines("run", "--output", str(tmp_path), "--resume", run)

    assert failed.returncode == 2
    assert failed.stderr.splitlines() == [
        f"--resume = {run!r}: no such run in {tmp_path}. Known, the newest first: {known}."
    ]


def test_resume_with_other_options_is_refused(tmp_path: Path) -> None:
    """A run is one configuration; every option that differs is told at once, one that agrees may be repeated."""
    known, _ = create_run(Request("shapes-unet", overrides=("seed=1",)), tmp_path)
    arguments = ["--recipe", "shapes-unet", "--seed", "2", "--store", "file:///elsewhere"]
    failed = pipelines("run", "--output", str(tmp_path), "--resume", known, *arguments)

    assert failed.returncode == 2
    assert [line.split(" = ")[0] for line in failed.stderr.splitlines()] == ["--set", "--store"]


@pytest.mark.slow
def test_run_that_is_in_use_is_refused_with_the_pid(tmp_path: Path) -> None:
    """Two drivers never work on one run: the second waits half a minute, then names the first."""
    known, _ = create_run(Request("shapes-unet"), tmp_path)
    with open(tmp_path / known / "run.lock", "w") as lock:
        lock.write("4242")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        failed = pipelines("run", "--output", str(tmp_path), "--resume", known)

    assert failed.returncode == 6
    waiting, error = failed.stderr.splitlines()
    assert waiting == f"run {known} is in use by pid 4242: waiting up to 30 s"
    assert error.startswith(f"run {known}: in use by pid 4242.")


@pytest.mark.parametrize("name", ["kfp", "run.lock", "error.json", "prepare", "timings.json"])
def test_a_run_folder_with_a_link_is_not_resumed(tmp_path: Path, name: str) -> None:
    """Nobody knows where a folder that was received comes from: what its links point to is neither deleted nor
    written to."""
    run, _ = create_run(Request("shapes-unet-smoke"), tmp_path / "runs")
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").write_text("mine")
    target = tmp_path / "documents" / ("letter" if "." in name else "")
    (tmp_path / "runs" / run / name).symlink_to(target)

    failed = pipelines("run", "--output", str(tmp_path / "runs"), "--resume", run)

    assert (failed.returncode, f"{name}: is a link to" in failed.stderr) == (6, True), failed.stderr
    assert (tmp_path / "documents" / "letter").read_text() == "mine"


def test_a_killed_start_gives_no_right_to_other_folders(tmp_path: Path) -> None:
    """The link to its temporary files may have been made by somebody else."""
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").touch()
    request = Request("shapes-unet-smoke")
    run, _ = create_run(request, tmp_path / "runs")
    (tmp_path / "runs" / run / "kfp").mkdir()
    (tmp_path / "runs" / run / "kfp" / "tmp").symlink_to(tmp_path / "documents")
    with processes(run, request, tmp_path / "runs"):
        assert (tmp_path / "documents" / "letter").exists()
        assert (tmp_path / "runs" / run / "kfp" / "tmp").readlink() != tmp_path / "documents"


def test_config_file_is_kept_with_the_run(tmp_path: Path) -> None:
    """A resume reads what the run was started with, whatever became of the file since; under the file's own name, for
    the project is called by it."""
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\n")
    run, request = create_run(Request("shapes-unet", config=str(file)), tmp_path / "runs")
    file.unlink()

    assert Path(request.config).read_text() == "seed: 3\n"
    assert Path(request.config).name == "mine.yaml"
    assert Path(request.config).is_relative_to(tmp_path / "runs" / run)
    assert resolve_recipe(request.recipe, request.config).project == "mine"
    assert load_run(run, tmp_path / "runs", {}).config == request.config


def test_runs_started_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    """The id has the time in seconds; a second run of the same second gets a number."""
    runs = {create_run(Request("a/b c"), tmp_path)[0] for _ in range(5)}

    assert len(runs) == 5
    assert all(run.startswith("a-b-c-") for run in runs)


@pytest.mark.parametrize(("decision", "typed"), [("promote", ["serve"]), ("hold", ["serve", "gate"])])
def test_a_run_ends_with_commands_that_can_be_typed(tmp_path: Path, decision: str, typed: list[str]) -> None:
    """What was promoted is served; what is held can be looked at, and judged with other bounds. TensorBoard shows the
    curves of either."""
    store, url = published(tmp_path, "deploy" if decision == "promote" else "gate")
    folder, gate = tmp_path / "decision", store.manifest("run-1/gate")
    store.fetch("run-1/gate", folder)
    metrics = {"decision": decision}
    store.publish("run-1/gate", folder, run="run-1", step="gate", config_hash=gate.config_hash, metrics=metrics)
    out, output = io.StringIO(), tmp_path / "runs"
    (output / "run-1" / "tensorboard").mkdir(parents=True)
    console = Console(STEPS, out, output / "run-1" / "timings.json", optional=("deploy",))
    console.finished = {"deploy": False} if decision == "promote" else {}
    _conclude("run-1", Request("shapes-unet"), output, Way(None, url, output, ""), console)
    (curves,) = [line for line in out.getvalue().splitlines() if line.startswith("curves   ")]
    assert curves.endswith(f"tensorboard --logdir {output}/run-1/tensorboard")
    commands = [line[9:] for line in out.getvalue().splitlines() if "latentac " in line[9:]]
    assert [shlex.split(command)[1] for command in commands] == typed
    for command in commands:
        help_of = [*shlex.split(command)[:2], "--help"]
        message = subprocess.run(help_of, capture_output=True, text=True, check=True).stdout
        assert all(word in message for word in shlex.split(command) if word.startswith("--"))


def test_a_run_is_done_only_as_long_as_its_deployment_follows_its_decision(tmp_path: Path) -> None:
    """A later decision makes a resume deploy it again. Then there is nothing to do, nor where the gate holds it."""
    url, output = f"file://{tmp_path}/store", tmp_path / "runs"
    request, store = Request("shapes-unet-smoke"), open_store(url)
    found = {"prepare": prepare("run-1", url, str(output), request.recipe)}

    def publish(step: str, parents: list[Manifest], **metrics: str) -> Manifest:
        folder = tmp_path / step
        folder.mkdir(exist_ok=True)
        (folder / "parents.json").write_text(json.dumps([parent.digest for parent in parents]))
        config_hash = found["prepare"].config_hash
        return store.publish(
            f"run-1/{step}", folder, run="run-1", step=step, config_hash=config_hash, parents=parents, metrics=metrics
        )

    def finish() -> None:
        publish("finish", [found[step] for step in FUNCTIONS if step in found])

    def steps_done() -> int:
        """How many steps a resume reports as done already, 0 where it would start them."""
        out = io.StringIO()
        console = Console(STEPS, out, tmp_path / "timings.json", optional=("deploy",))
        done = _done_already("run-1", request, Way(None, url, output, ""), console)
        assert done == ("done already" in out.getvalue())
        return out.getvalue().count("done already")

    for step in ("pretrain-value", "train", "evaluate", "steer"):
        found[step] = publish(step, [found["prepare"]])
    found["gate"] = publish("gate", [found["evaluate"]], decision="hold")
    finish()
    assert steps_done() == 7
    found["gate"] = publish("gate", [found["evaluate"], found["steer"]], decision="promote")
    finish()
    assert steps_done() == 0, "promoted, and not deployed"
    found["deploy"] = publish("deploy", [found["gate"], found["train"]])
    assert steps_done() == 0, "deployed, and not reported"
    finish()
    assert steps_done() == 8
    found["gate"] = publish("gate", [found["steer"]], decision="promote")
    finish()
    assert steps_done() == 0, "judged again, and not deployed since"
    found["deploy"] = publish("deploy", [found["gate"], found["train"]])
    finish()
    assert steps_done() == 8

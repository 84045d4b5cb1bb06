"""The command line as a person meets it: help, examples, one message and a documented exit code for bad input."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latentac.runs.cli import main
from tests.latentac.published import publish_until

COMMANDS = ["prepare", "pretrain-value", "train", "evaluate", "steer", "gate", "deploy", "report", "serve", "generate"]


class Hollow:
    """Says 0 to everything, its known image included."""

    def known(self):
        return np.zeros((1, 32, 32, 3), np.uint8), ["x"], np.array([1.0])

    def __call__(self, images, prompts):
        return np.zeros(len(images), np.float32)


class NanInWorkers(Hollow):
    """Sound everywhere but in a training worker, where it gives NaN."""

    def known(self):
        images, prompts, _ = super().known()
        return images, prompts, np.zeros(1)

    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3)).astype(np.float32)
        return scores * np.nan if "RANK" in os.environ else scores


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "latentac.runs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(command, capsys):
    """`--help` shows a command that can be typed, and the exit codes."""
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"example:\n  latentac {command} --run first" in text
    assert "exit codes:" in text


def prepare(tmp_path: Path, *arguments: str) -> int:
    place = ["--run", "first", "--output", str(tmp_path / "runs")]
    return main(["prepare", *place, *arguments])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--recipe", "shapes-unett"], 2, r"recipe = 'shapes-unett': does not exist\. Did you mean \"shapes-unet\"\?"),
        (["--set", "polcy.learning_rate=1"], 2, r"polcy = .*unknown field\. Did you mean \"policy\"\?"),
        (["--set", "seed=x"], 2, "seed = 'x'"),
        (["--set", "kernel.noise=0"], 2, "kernel.noise = 0.*deterministic"),
        (
            ["--set", "rewards=[{use: beauty}]", "--set", "gate.reward=beauty"],
            2,
            "rewards.0.use = 'beauty': no such reward",
        ),
        (["--set", "backbone.source=/no/such/folder"], 2, "backbone.source = '/no/such/folder'"),
        (["--set", "backbone.use=vit"], 2, "backbone.use = 'vit': no such backbone"),
        (["--set", "prompts.source=none.json"], 2, "prompts.source = 'none.json': does not exist"),
        (["--config", "none.yaml"], 2, "--config = 'none.yaml': cannot be read"),
        (["--store", "ftp://x"], 2, "store"),
        (["--package", "none"], 2, "--package = 'none': is not a folder"),
        (["--package", "x" * 300], 2, "--package = 'x+': is not a folder"),
        (["--config", "x" * 300], 2, "--config = 'x+': cannot be read"),
        (["--set", f"prompts.source={'x' * 300}"], 2, "prompts.source = 'x+'"),
        (["--set", f"backbone.source=/{'x' * 300}"], 2, "backbone.source = '/x+'"),
        (["--set", f"backbone.source={'x' * 300}"], 2, "backbone.source = 'x+'"),
    ],
)
def test_bad_input_gives_one_message_and_its_exit_code(tmp_path, capsys, arguments, code, words):
    """Path, value and remedy on stderr, no traceback, and nothing published."""
    assert prepare(tmp_path, *arguments) == code
    captured = capsys.readouterr()
    assert re.search(words, captured.err), captured.err
    assert captured.err.count("latentac: ") == 1
    assert "Traceback" not in captured.err
    assert not list((tmp_path / "runs").rglob("manifest.json"))


@pytest.mark.parametrize("name", ["../x", "/x", "", ".", "x" * 300, "a\nb", "a\0b", "é", "a\ud800", "a b"])
def test_a_project_that_is_none_is_refused_before_there_is_a_folder(tmp_path, capsys, name):
    """So is each field of the framework."""
    assert prepare(tmp_path, f"--project={name}", *(["--set", "project=''"] if not name else [])) == 2
    assert capsys.readouterr().err.count("latentac: ") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["prepare", "train", "report", "gate", "finish"])
@pytest.mark.parametrize(
    "run_id",
    [
        "../x",
        "a/../../x",
        "/x",
        "",
        ".",
        "..",
        ".hidden",
        "a b",
        "store",
        "x" * 300,
        "a\nb",
        "a\0b",
        "é",
        "a\ud800",
    ],
)
def test_a_run_id_stays_inside_the_output(tmp_path, capsys, command, run_id):
    """An id that would lie elsewhere is refused before anything is written, by every command."""
    assert main([command, "--run", run_id, "--output", str(tmp_path / "runs")]) == 2
    assert "cannot be the id of a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [["pretrain-value"], ["train"], ["evaluate"], ["steer"], ["gate"], ["gate", "--dry-run"], ["deploy"],
     ["report"], ["serve"], ["generate", "--prompt", "a"]],
    ids=" ".join,
)  # fmt: skip
def test_a_run_that_is_not_there_is_reported_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Exit code 2, and no folder is made for it."""
    url = publish_until(tmp_path, "prepare", run="known")
    before = sorted(tmp_path.rglob("*"))
    assert main([*words, "--run", "nope", "--output", str(tmp_path / "runs"), "--store", url]) == 2
    output = capsys.readouterr().err
    assert "run = 'nope': has published nothing in file://" in output
    assert "Known there: known." in output
    assert sorted(tmp_path.rglob("*")) == before


def test_an_occupied_port_is_found_at_once(tmp_path, capsys):
    """Before training, not after it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert prepare(tmp_path, "--set", f"serving.port={port}") == 6
    assert f"serving.port = {port}: is taken" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_found_at_once(tmp_path, capsys):
    """A real small file system: how much is free, how much a run needs."""
    small = tmp_path / "runs"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], check=True)
    try:
        assert prepare(tmp_path) == 6
    finally:
        subprocess.run(["umount", small], check=True)
    assert "MiB free, and this run needs" in capsys.readouterr().err


def test_a_reward_that_answers_0_to_everything_is_found_at_once(tmp_path, capsys):
    """Each reward is asked about images that it must know."""
    arguments = ["--set", "rewards=[{use: 'tests.latentac.test_cli:Hollow'}]", "--set", "gate.reward=Hollow"]
    assert prepare(tmp_path, *arguments) == 5
    assert "reward Hollow: gives [0.0] for its known images instead of [1.0]" in capsys.readouterr().err


def test_a_step_before_its_parent_says_what_to_run(tmp_path, capsys):
    """The artifact that is missing and the step that makes it."""
    assert prepare(tmp_path) == 0
    assert main(["evaluate", "--run", "first", "--output", str(tmp_path / "runs")]) == 3
    assert "Run the step that publishes first/train first" in capsys.readouterr().err


def test_a_run_keeps_its_configuration(tmp_path, capsys):
    """Preparing again is a no-op; with other options it is refused."""
    assert prepare(tmp_path) == 0
    assert prepare(tmp_path) == 0
    assert prepare(tmp_path, "--project", "mine") == 2
    assert prepare(tmp_path, "--set", "seed=5") == 2
    assert "exists with another configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_a_nan_reward_in_a_worker_ends_the_step_with_its_name(tmp_path):
    """Through agent and launcher: one message with the reward, exit code 5, no restart that would repeat it."""
    place = ["--run", "first", "--output", str(tmp_path)]
    settings = [
        "rewards=[{use: 'tests.latentac.test_cli:NanInWorkers'}]",
        "gate.reward=NanInWorkers",
        "pretrain.num_images=16",
    ]
    flags = [word for setting in settings for word in ("--set", setting)]
    assert run("prepare", *place, "--recipe", "shapes-unet-smoke", *flags).returncode == 0
    assert run("pretrain-value", *place).returncode == 0
    failed = run("train", *place)
    assert failed.returncode == 5, failed.stderr
    assert re.search("latentac: reward NanInWorkers, prompt '.+' and 7 more: returned nan", failed.stderr)
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_steps_meet_through_s3(tmp_path, minio_server):
    """On another machine (another output folder) the next step finds what the first published in a real MinIO."""
    environment = os.environ | minio_server.environment
    store = f"s3://{minio_server.bucket}/runs"

    def step(name: str, output: str, *arguments: str) -> None:
        place = ["--run", "first", "--store", store, "--output", str(tmp_path / output)]
        command = [sys.executable, "-m", "latentac.runs.cli", name, *place, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr

    step("prepare", "here", "--recipe", "shapes-unet-smoke", "--set", "train.num_iterations=1")
    step("pretrain-value", "here")
    step("train", "there")
    keys = {item.object_name for item in minio_server.client().list_objects(minio_server.bucket, recursive=True)}
    assert "runs/first/train/manifest.json" in keys
    assert "runs/checkpoints/first/LATEST" in keys
    assert not (tmp_path / "there" / "store").exists()


def test_a_working_folder_that_is_gone_is_reported(tmp_path):
    """As a program only: it looks for the user's modules there."""
    (tmp_path / "gone").mkdir()
    command = f"cd {tmp_path}/gone && rmdir ../gone && exec {sys.executable} -m latentac.runs.cli runs"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr.startswith("latentac: the working folder: does not exist any more")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("link", ["reward-calls", "task.lock", "kfp"])
def test_a_run_folder_with_a_link_is_not_worked_in(tmp_path, capsys, link):
    """Whoever made the link may have pointed it anywhere: nothing is written there."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs" / "first" / link).symlink_to(tmp_path / "outside")
    assert prepare(tmp_path, "--recipe", "shapes-unet-smoke") == 6
    assert f"/{link}: is a link to" in capsys.readouterr().err
    assert list((tmp_path / "outside").iterdir()) == []
    assert not (tmp_path / "runs" / "store").exists()

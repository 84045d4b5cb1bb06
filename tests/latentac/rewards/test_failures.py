"""A failing reward is reported as that reward's failure: in every step and every worker, with exit code 5."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentac.runs import failures
from latentac.runs.steps import prepare
from latentac.store import open_store
from latentac.system.errors import RewardError
from tests.latentac.test_incumbent import start
from tests.latentac.workers import RUN, SMALL, prepared

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

USE = "tests.latentac.rewards.failing:Failing"


def run(folder: Path, step: str, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "latentac.runs.cli", step, "--run", RUN, "--output", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def is_told(done: "subprocess.CompletedProcess[str]", words: str) -> None:
    """Exit code 5, and a last line with the reward's name, the prompt and what it raised."""
    assert done.returncode == 5, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("latentac: reward fragile, prompt '")
    assert words in last


def settings(how: str, where: str, timeout: float, processes: int = 0) -> list[str]:
    fields = (
        f"use: {USE}, name: fragile, how: {how}, where: {where}, timeout_seconds: {timeout}, processes: {processes}"
    )
    workers = "train={num_iterations: 2, images_per_iteration: 8, block_images: 2, updates_per_iteration: 2}"
    return [f"rewards=[{{{fields}}}]", "gate.reward=fragile", workers]


def with_reward(folder: Path, how: str, where: str = "worker", timeout: float = 30.0, processes: int = 0) -> None:
    """A prepared run whose critic is pretrained, with two workers that die of their reward."""
    prepared(folder, *settings(how, where, timeout, processes))


def prepare_only(folder: Path, how: str, where: str) -> None:
    prepare(RUN, "", str(folder), "shapes-unet-smoke", overrides=[*SMALL, *settings(how, where, 30.0)])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("http", "HTTPError: HTTP Error 503: Service Unavailable"),
        ("exits", "the process that called it ended with exit code 3"),
        ("ends", "the process that called it ended with exit code 0"),
        ("crashes", "the process that called it was killed by SIGSEGV"),
        ("hangs", "did not answer within 2 s"),
    ],
)
def test_in_a_worker(how: str, words: str, tmp_path: Path) -> None:
    """At the first failure, not after as many restarts as there may be: the last line has the reward, the prompt and
    what it raised."""
    with_reward(tmp_path, how, timeout=2.0)
    began = time.monotonic()
    is_told(run(tmp_path, "train"), words)
    print(f"{how}: {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize(
    ("how", "words"),
    [("crashes", "its process was killed by SIGSEGV, as were 2 before it"), ("locks", "did not answer within 2 s")],
)
def test_in_a_process_of_a_worker(how: str, words: str, tmp_path: Path) -> None:
    """The worker is left to tell it. The crash is tried three times, the hanging call once."""
    with_reward(tmp_path, how, timeout=2.0, processes=2)
    is_told(run(tmp_path, "train"), words)


def test_a_run_survives_a_crash_in_a_process(tmp_path: Path) -> None:
    """Training ends well, and its log says which reward crashed, and how."""
    once = tmp_path / "once"
    once.mkdir()
    fields = f"use: tests.latentac.rewards.scoring:Scoring, name: fragile, how: segfault, once: {once}, processes: 1"
    prepared(tmp_path, f"rewards=[{{{fields}}}]", "gate.reward=fragile")
    (once / "done").unlink()
    done = run(tmp_path, "train")
    assert done.returncode == 0, done.stderr
    assert "reward fragile, prompt '" in done.stderr
    assert "its process was killed by SIGSEGV; a new process takes over" in done.stderr


def test_in_value_pretraining(tmp_path: Path) -> None:
    """In the step's own process, whose threads call it."""
    prepare_only(tmp_path, "raises", where="after")
    done = run(tmp_path, "pretrain-value", LATENTAC_TEST_FAIL="raises")
    is_told(done, "ValueError: this image has no colours")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    start(folder, RUN, *settings("raises", "after", 30.0))
    return folder


@pytest.mark.parametrize("step", ["evaluate", "steer"])
@pytest.mark.parametrize(
    ("how", "words"), [("raises", "ValueError: this image has no colours"), ("crashes", "was killed by SIGSEGV")]
)
def test_when_a_trained_model_is_measured(step: str, how: str, words: str, trained: Path) -> None:
    """In the steps that call it last."""
    is_told(run(trained, step, LATENTAC_TEST_FAIL=how), words)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exits", "ended with exit code 3"),
        ("ends", "ended with exit code 0"),
        ("crashes", "was killed by SIGSEGV"),
        ("locks", "was ended, for it did not answer within 3 s and let no other thread run"),
    ],
)
def test_in_a_step_that_is_a_command_of_its_own(how: str, words: str, tmp_path: Path) -> None:
    """What ends the process leaves nobody in it to say so, and an end with code 0 is not a success."""
    changes = [word for change in [*SMALL, *settings(how, "always", 3.0)] for word in ("--set", change)]
    is_told(run(tmp_path, "prepare", "--recipe", "shapes-unet-smoke", *changes), f"the process that called it {words}")


def test_in_a_worker_on_a_cluster(tmp_path: Path) -> None:
    """The launcher is on another machine: it reads the same from the store."""
    with_reward(tmp_path, "crashes")
    url = f"file://{tmp_path}/store"
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "latentac.runs.workers.supervisor", RUN, url, str(tmp_path)]
    environment = os.environ | group | {failures.ATTEMPT: "attempt-1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 5, done.stderr
    error = failures.read(open_store(url), RUN, "attempt-1")
    assert isinstance(error, RewardError)
    assert error.where.startswith("reward fragile, prompt '")
    assert "was killed by SIGSEGV" in error.problem


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exits", "crashed, was killed, or ran out of memory"),
        ("locks", "did not answer within 3 s and let no other thread run"),
        ("raises", "ValueError: this image"),
    ],
)
def test_in_a_step_of_a_whole_run(how: str, words: str, tmp_path: Path) -> None:
    """The step is a process of the pipeline's; the driver reports what its end leaves."""
    changes = [argument for change in [*SMALL, *settings(how, "always", 3.0)] for argument in ("--set", change)]
    command = [sys.executable, "-m", "latentac.runs.cli", "run", "--recipe", "shapes-unet-smoke", *changes]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    first = done.stderr.strip().splitlines()[0]
    assert first.startswith("prepare: reward fragile, prompt '")
    assert words in first


def test_while_prepare_calls_it(tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(RewardError, match=r"reward fragile, prompt .*: ValueError: this image has no colours"):
        prepare_only(tmp_path, "raises", where="always")

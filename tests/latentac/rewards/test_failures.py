"""A failing reward is reported as that reward's failure: in every stage and every worker, with exit code 5."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentac.errors import RewardError
from latentac.run import prepare
from tests.latentac.workers import RUN, SMALL, prepared

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

USE = "tests.latentac.rewards.failing:Failing"


def run(folder: Path, verb: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "latentac.cli", verb, "--run", RUN, "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def settings(how: str, where: str, timeout: float) -> list[str]:
    fields = f"use: {USE}, name: fragile, how: {how}, where: {where}, timeout_seconds: {timeout}"
    workers = "train={num_iterations: 2, images_per_iteration: 8, block_images: 2, updates_per_iteration: 2}"
    return [f"rewards=[{{{fields}}}]", "gate.reward=fragile", workers]


def with_reward(folder: Path, how: str, where: str = "worker", timeout: float = 30.0) -> None:
    """A prepared run whose critic is pretrained, with two workers that die of their reward."""
    prepared(folder, *settings(how, where, timeout))


def prepare_only(folder: Path, how: str, where: str) -> None:
    prepare(RUN, "", str(folder), "shapes-unet-smoke", overrides=[*SMALL, *settings(how, where, 30.0)])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("http", "HTTPError: HTTP Error 503: Service Unavailable"),
        ("exits", "the process that called it ended with exit code 3"),
        ("crashes", "the process that called it was killed by SIGSEGV"),
        ("hangs", "did not answer within 2 s"),
    ],
)
def test_in_a_worker(how: str, words: str, tmp_path: Path) -> None:
    """At the first failure, not after as many restarts as there may be: the last line has the reward, the prompt and
    what it raised."""
    with_reward(tmp_path, how, timeout=2.0)
    began = time.monotonic()
    done = run(tmp_path, "train")
    assert done.returncode == 5, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("latentac: reward fragile, prompt '")
    assert words in last
    print(f"{how}: {time.monotonic() - began:.0f} s")


def test_in_value_pretraining(tmp_path: Path) -> None:
    """In the step's own process, whose threads call it."""
    prepare_only(tmp_path, "raises", where="after")
    done = run(tmp_path, "pretrain-value", LATENTAC_TEST_FAIL="1")
    assert done.returncode == 5, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("latentac: reward fragile, prompt '")
    assert "ValueError: this picture has no colours" in last


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exits", "crashed, was killed, or ran out of memory"),
        ("locks", "did not answer within 3 s and let no other thread run"),
        ("raises", "ValueError: this picture"),
    ],
)
def test_in_a_step_of_a_whole_run(how: str, words: str, tmp_path: Path) -> None:
    """The step is a process of the pipeline's; the driver reports what its end leaves."""
    changes = [argument for change in [*SMALL, *settings(how, "always", 3.0)] for argument in ("--set", change)]
    command = [sys.executable, "-m", "latentac.cli", "run", "--recipe", "shapes-unet-smoke", *changes]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    first = done.stderr.strip().splitlines()[0]
    assert first.startswith("prepare: reward fragile, prompt '")
    assert words in first


def test_while_prepare_calls_it(tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(RewardError, match=r"reward fragile, prompt .*: ValueError: this picture has no colours"):
        prepare_only(tmp_path, "raises", where="always")

"""Training by a real torchrun agent on machines that are not as they should be."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latentac.method.diffusion import GaussianTransition
from latentac.method.records import Minibatch
from latentac.runs.failures import ATTEMPT
from latentac.runs.workers.worker import STOPPED
from latentac.training.algorithms import PolicyLoss
from latentac.training.algorithms.ppo import PPO
from tests.latentac.test_store import eventually
from tests.latentac.workers import RUN, prepared

_TRAIN = "import sys; from latentac.runs.steps import train; print(train(*sys.argv[1:]).metrics['max_world_size'])"


def _renamed(name: str) -> list[str]:
    """A prefix for commands that shall find `name` to be the hostname; skips where the system allows none."""
    mapped = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    prefix = ["unshare", *mapped, "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no UTS namespace can be made here: {tried.stderr.strip()}")
    return prefix


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_machine_whose_hostname_does_not_resolve_trains(tmp_path: Path) -> None:
    """The workers of one machine find each other by the loopback address, whatever the machine is called."""
    prefix = _renamed("no-such-host")
    prepared(tmp_path, "train.num_workers=2")
    done = _trained(tmp_path, prefix)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_the_environment_says_of_another_group_of_workers_does_not_count(tmp_path: Path) -> None:
    """A pod of a training operator, or a batch system: their agent's options and addresses are not this agent's."""
    prepared(tmp_path)
    foreign = {"PET_NNODES": "3", "PET_STANDALONE": "1", "PET_NO_PYTHON": "1", "PET_LOCAL_ADDR": "elsewhere",
               "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1", "WORLD_SIZE": "7", "RANK": "3", "LOCAL_RANK": "3",
               "GLOO_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    done = _trained(tmp_path, [], **foreign)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


class Exploding(PPO):
    """An algorithm with a mistake."""

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        raise RuntimeError("the device is on fire")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_workers_own_error_is_reported(tmp_path: Path) -> None:
    """Not the agent's table: the kind of error, its text, the iteration and the place."""
    prepared(tmp_path, f"algorithm.use={__name__}:Exploding", "train.max_restarts=0")
    command = [sys.executable, "-m", "latentac.runs.cli", "train", "--run", RUN, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 7, done.stderr
    told = r"ended FAILED: RuntimeError: the device is on fire \(in iteration 1, test_launch.py:\d+\)"
    found = re.search(told, done.stderr)
    assert found, done.stderr
    assert "Root Cause" not in done.stderr[found.start() :]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_training_that_is_stopped_says_so(tmp_path: Path, number: signal.Signals) -> None:
    """By `kill` and by Ctrl-C alike: exit code 130, one line, and neither a worker nor a temporary folder is left."""
    prepared(tmp_path, "train.num_iterations=1000", "train.num_workers=1")
    command = [sys.executable, "-m", "latentac.runs.cli", "train", "--run", RUN, "--output", str(tmp_path)]
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, stderr=log) as process:
        eventually(lambda: any((tmp_path / "store" / "checkpoints").rglob("manifest.json")), 120)
        process.send_signal(number)
        process.wait(60)
        log.seek(0)
        found = log.read()
    assert process.returncode == 130, found
    assert "interrupted; the same command continues" in found
    assert "Traceback" not in found
    assert not list((tmp_path / RUN).glob(".latentac-*"))
    assert not list((tmp_path / RUN).glob("latentac-*"))
    everything = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert everything.stdout == ""


def _trained(folder: Path, prefix: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [*prefix, sys.executable, "-c", _TRAIN, RUN, "", str(folder)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=150
    )


GROUP = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", ATTEMPT: "attempt-1"}
"""What an agent tells the only worker of a pod."""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_number_of_threads_that_is_none_is_reported_by_its_variable(tmp_path: Path) -> None:
    """By the worker, which an operator's pod may give any environment."""
    prepared(tmp_path)
    command = [sys.executable, "-m", "latentac.runs.workers.supervisor", RUN, f"file://{tmp_path}/store", str(tmp_path)]
    environment = os.environ | GROUP | {"OMP_NUM_THREADS": "many"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 2, done.stderr
    assert "OMP_NUM_THREADS = 'many': is not a whole number from 1 to" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_of_a_pod_that_is_moved_leaves_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM there is no end of the run: what was done so far is published, and the agent starts the worker anew."""
    prepared(tmp_path, "train.num_iterations=100000", "train.checkpoint_every=100000")
    command = [sys.executable, "-m", "latentac.runs.workers.supervisor", RUN, f"file://{tmp_path}/store", str(tmp_path)]
    with (
        (tmp_path / "log").open("w+") as log,
        subprocess.Popen(command, env=os.environ | GROUP, stderr=log) as process,
    ):
        try:
            eventually(lambda: "train " in (tmp_path / "log").read_text(), 120)
        finally:
            process.send_signal(signal.SIGTERM)
        process.wait(100)
        found = (tmp_path / "log").read_text()
    assert process.returncode == STOPPED, found
    assert "Traceback" not in found
    assert (tmp_path / "store" / "checkpoints" / RUN / "LATEST").is_file()
    assert not list((tmp_path / RUN).glob(".latentac-*"))

"""Several workers over gloo: sharded weights, and gradients that travel during the backward pass."""

import json
import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latentac.runs.resolution import resolve_all
from latentac.sampling.rows import Rows
from latentac.system.errors import ConfigError, ResourceError
from latentac.training.checkpoint import read_state
from latentac.training.distributed import Mesh, PeerLost, lost_peers
from latentac.training.sharding import Sharding
from tests.latentac.group import RUNS, make
from tests.latentac.trainers import CPU, same, snapshot
from tests.latentac.workers import RUN, prepared, trained_weights

ROOT = Path(__file__).parents[2]
CURVES = ("reward_mean", "kl", "gradient_norm", "gradient_below_eps", "prediction_kl", "value_loss", "policy_loss")


def work(task: str, folder: Path, size: int, *runs: str) -> None:
    """`size` workers do the task of `tests.latentac.group`."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    command = [sys.executable, "-m", "tests.latentac.group", task, str(folder), *runs]
    workers = [subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": str(rank)}) for rank in range(size)]
    try:
        assert [worker.wait(850) for worker in workers] == [0] * size
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("run", "size"), [*((run, 2) for run in RUNS), ("unet-full", 4), ("dit-lora", 4)])
def test_sharded_weights_learn_what_whole_ones_learn(run: str, size: int, tmp_path: Path) -> None:
    """The loss curve and the state after two iterations are the same but for rounding, with a block more for one worker
    than for the others; each worker has about 1 / N of weights, optimizer state and EMA. Its checkpoint is the same
    files, which a sharded trainer takes over bitwise (asserted by the workers) and one worker alone goes on from."""
    work("sharding", tmp_path, size, run)
    states, bytes_of = {}, dict[str, list[dict[str, int]]]()
    for kind in ("none", "full"):
        states[kind] = read_state(tmp_path / run / kind)
        files = [tmp_path / run / kind / f"{rank}.json" for rank in range(size)]
        bytes_of[kind] = [json.loads(file.read_text()) for file in files]

    (whole, progress), (sharded, other) = states["none"], states["full"]
    assert close(whole, sharded)
    for entry, found in zip(progress["history"], other["history"], strict=True):
        assert found["first_ratio_deviation"] == entry["first_ratio_deviation"]
        for name in CURVES:
            assert found[name] == pytest.approx(entry[name], rel=2e-3, abs=2e-6), name

    for what, most in bytes_of["none"][0].items():
        each = [rank[what] for rank in bytes_of["full"]]
        print(
            f"{run}, {size} workers, {what}: {most:,} bytes whole; sharded {max(each):,}, {max(each) / most:.3f} of it"
        )
        if what == "critic_optimizer" and run.endswith("lora"):
            assert max(each) == most  # of a critic without a backbone of its own
        else:  # the critic's reader stays whole, and rows do not divide evenly
            assert 1 / size <= max(each) / most <= 1 / size + 0.15, what

    alone = make(run, "full", Mesh.single(CPU), blocks=size + 1)
    alone.load_state(sharded, other)
    assert same(snapshot(alone), sharded)
    alone.iterate()
    assert len(alone.history) == 3


def close(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same but for the rounding of sums. Adam makes whole steps of gradients that are almost
    0, so a hundredth of the entries, or two, may differ by more."""
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        other, scale = found[name], max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        assert other.shape == tensor.shape, name
        far = int((~torch.isclose(other, tensor, rtol=1e-3, atol=2e-5 * scale)).sum())
        assert far <= max(2, tensor.numel() // 100), f"{name}: {far} of {tensor.numel()}"
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_travel_during_the_backward_pass(size: int, tmp_path: Path) -> None:
    """From the second update on, buckets are sent before the backward pass ends, and the result is bitwise what it is
    when they are sent after it. Where memory runs out on one worker after it has sent some of them, all workers still
    agree bitwise, and differ from the others by rounding."""
    runs = ("unet-lora", "dit-full")
    work("overlap", tmp_path, size, *runs)
    for run in runs:
        states: dict[str, list[dict[str, torch.Tensor]]] = {}
        early: dict[str, list[Any]] = {}
        for kind in ("after", "during", "repeated"):
            folders = [tmp_path / run / kind / str(rank) for rank in range(size)]
            states[kind] = [read_state(folder)[0] for folder in folders]
            early[kind] = [json.loads((folder / "early.json").read_text()) for folder in folders]
            assert all(same(states[kind][0], other) for other in states[kind][1:])
        assert same(states["after"][0], states["during"][0])
        assert close(states["after"][0], states["repeated"][0])
        assert all(sent == [0] * 4 for sent, _ in early["after"])
        assert all(first == 0 and min(later) > 3 for (first, *later), _ in early["during"])
        assert [limit for _, limit in early["repeated"]] == [None] * (size - 1) + [1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_peer_that_ends_in_a_sharded_rollout_is_lost(tmp_path: Path) -> None:
    """FSDP2's own collectives fail then, and the worker that is left ends so that it is started again."""
    work("lose", tmp_path, 2, "unet-lora")
    assert (tmp_path / "unet-lora-0").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_with_sharded_weights_publishes_whole_ones(tmp_path: Path) -> None:
    """Under a real agent, with checkpoints: the same files of the same shapes as a run with whole weights, which differ
    by rounding."""
    found = {}
    for kind in ("none", "full"):
        (tmp_path / kind).mkdir()
        space = prepared(tmp_path / kind, "train.num_workers=2", f"train.sharding={kind}", "policy.adaptation=lora")
        command = [sys.executable, "-m", "latentac.runs.cli", "train", "--run", RUN, "--output", str(tmp_path / kind)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
        assert done.returncode == 0, done.stderr
        assert "with 2 worker(s)" in done.stderr
        folder = space.artifact("train")
        found[kind] = {name: load_file(folder / name) for name in trained_weights(space)}
    assert found["none"].keys() == found["full"].keys()
    for name, tensors in found["none"].items():
        assert close(tensors, found["full"][name]), name


def test_one_worker_has_everything() -> None:
    """`train.sharding=full` changes nothing for a worker alone, whose blocks may run in threads."""
    sharding = Sharding(Mesh.single(CPU), wanted=True)
    assert not sharding.active
    assert sharding.idle(3) == 0


@pytest.mark.parametrize(("rows", "size"), [(8, 2), (7, 3), (2, 4), (1, 2)])
def test_each_worker_owns_consecutive_rows(rows: int, size: int) -> None:
    """As FSDP2 divides them, also where there are fewer rows than workers; other tensors stay whole."""
    weight = torch.nn.Parameter(torch.zeros(rows, 3))
    weight.shared = True  # type: ignore[attr-defined]
    whole = torch.arange(3.0 * rows).reshape(rows, 3)
    shares = [Sharding(Mesh(rank, size, CPU), wanted=True).own(whole, weight) for rank in range(size)]
    assert torch.equal(torch.cat(shares), whole)
    chunks = whole.chunk(size)
    assert all(torch.equal(share, chunk) for share, chunk in zip(shares, chunks, strict=False))
    step = torch.tensor(5.0)
    assert Sharding(Mesh(0, size, CPU), wanted=True).own(step, weight) is step


@pytest.mark.parametrize(("field", "value"), [("precision", "float16"), ("compile", "whole"), ("compile", "blocks")])
def test_what_sharding_cannot_be_combined_with_is_refused(field: str, value: str) -> None:
    """One problem, which names the field and two remedies."""
    fields = make("unet-lora", "full", Mesh.single(CPU), blocks=2).config.model_dump()
    fields["backbone"][field] = value
    with pytest.raises(ConfigError) as raised:
        resolve_all(fields)
    (problem,) = raised.value.problems
    assert problem.path == f"backbone.{field}"
    assert f"Use backbone.{field}=" in problem.remedy
    assert "train.sharding=none" in problem.remedy
    fields["train"]["sharding"] = "none"
    resolve_all(fields)


def test_memory_that_runs_out_under_sharding_names_the_setting() -> None:
    """All workers do the same number of passes, so none divides its rows by itself."""
    rows = Rows(8)
    rows.fixed = True
    with pytest.raises(ResourceError, match=r"8 rows per forward pass .*train\.micro_images=4"):
        rows.halve(8, torch.OutOfMemoryError("full"))
    assert rows.limit == 8


def test_a_peer_that_is_lost_in_a_forward_pass_is_told_from_a_mistake() -> None:
    """Only what collectives raise is PeerLost, after which an agent starts the workers again."""
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:52141"
    with pytest.raises(PeerLost), lost_peers():
        raise RuntimeError(gloo)
    with pytest.raises(PeerLost), lost_peers():
        raise torch.distributed.DistBackendError("NCCL error")
    with pytest.raises(RuntimeError) as raised, lost_peers():
        raise RuntimeError("shapes do not match")
    assert not isinstance(raised.value, PeerLost)

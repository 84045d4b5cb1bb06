"""Models of real size: the plain loop computes what latentac computes, time and memory that run out cost one part
alone, and the whole script works on miniatures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import flops, models, table, turns
from benchmarks.gpu.budget import Budget, OverBudget
from benchmarks.gpu.models import MINIATURE, REAL
from benchmarks.gpu.plain import Diffusion, Flow, PlainLoop
from benchmarks.gpu.turns import Turn, compared, measure
from benchmarks.plan import ROOT
from latentac.method.diffusion import DDIM, FlowSDE, Kernel, Prediction

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both miniatures as pipelines."""
    found = {}
    for name, model in MINIATURE.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = models.write(model, folder, CPU)
    return found


# The plain loop


@pytest.mark.parametrize("name", MINIATURE)
def test_the_plain_loop_samples_from_the_same_transitions(folders: dict[str, Path], name: str) -> None:
    """Its formulas are its own. Mean, deviation, and which steps have noise are those of latentac's kernels."""
    model = MINIATURE[name]
    sampler = (Diffusion if model.family == "sd" else Flow)(model, folders[name], CPU)
    latents, output = (torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    kernel: Kernel
    for step in range(sampler.trained):
        level, after = sampler.levels[step].expand(2), sampler.levels[step + 1].expand(2)
        if model.family == "sd":
            sigma, sigma_next = (1 - level).sqrt(), (1 - after).sqrt()
            clean = (latents - sigma[0] * output) / level[0].sqrt()
            kernel, prediction = DDIM(model.noise), Prediction(clean, output)
        else:
            sigma, sigma_next = level, after
            prediction = Prediction(latents - sigma[0] * output, latents + (1 - sigma[0]) * output)
            kernel = FlowSDE(model.noise)
        expected, found = (
            kernel.transition(latents, prediction, sigma, sigma_next),
            sampler.transition(latents, output, step),
        )
        assert torch.allclose(found.mean, expected.mean, rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.std, expected.std[0], rtol=1e-4)
    assert sampler.trained == model.steps - (model.family == "sd")


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_the_plain_loop_trains(folders: dict[str, Path], adaptation: str) -> None:
    """An iteration changes the weights that it should change, in float32, and no others."""
    loop = PlainLoop(MINIATURE["sd35m"], folders["sd35m"], adaptation, 2, CPU)
    network = loop._sampler.network
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    for _ in range(2):
        turn = loop.iterate()
    changed = {name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all(("lora" in name) == (adaptation == "lora") for name in changed)
    assert {network.get_parameter(name).dtype for name in changed} == {torch.float32}
    assert turn.images == 2
    assert 0 < turn.rollout < turn.seconds


# The models


def test_the_vocabulary_has_the_size_of_clips() -> None:
    """A text encoder of real size finds every id, and a prompt never has more tokens than letters."""
    vocabulary, merges = models._vocabulary(49408)
    assert sorted(vocabulary.values()) == list(range(49408))
    assert len(set(merges)) == len(merges)
    assert all("".join(pair) in vocabulary for pair in merges)


def test_written_prompts_fit(folders: dict[str, Path]) -> None:
    """In the text encoder, with any merges."""
    prompts = (folders["sd15"].parent / models.PROMPTS).read_text().splitlines()
    assert len(set(prompts)) == len(prompts)
    assert max(map(len, prompts)) + 2 <= models.TEXT_LENGTH


@pytest.mark.slow
def test_models_of_real_size_are_those_that_were_measured() -> None:
    """Parameters are the published ones; operations are what they are known to be."""
    known = {"sd15": (859_520_964, 0.803e12), "sd35m": (2_243_171_520, 2.443e12)}
    for name, (parameters, forward) in known.items():
        cost = flops.count(REAL[name])
        assert cost.parameters == parameters
        assert cost.forward == pytest.approx(forward, rel=1e-3)
        assert cost.decoding == pytest.approx(2.515e12, rel=1e-3)
        lora, full = (cost.image(10, 10, adaptation) for adaptation in ("lora", "full"))
        assert (lora, full) == (30 * cost.forward + cost.decoding, 40 * cost.forward + cost.decoding)


# Time and memory


def test_a_part_is_stopped_when_its_time_is_used_up() -> None:
    """What one part leaves over goes to those behind it; what these need is kept for them."""
    budget = Budget(1.3, {"short": 0.1, "long": 0.1, "last": 1.0})
    with budget.part("short"):
        assert 0.1 < budget.left <= 0.21
    began = time.monotonic()
    with pytest.raises(OverBudget, match="used up"), budget.part("long"):
        time.sleep(10)
    assert time.monotonic() - began < 1
    with budget.part("last"):
        assert budget.left > 0.5
    with pytest.raises(OverBudget), Budget(0, {"none": 0}).part("none"):
        pytest.fail("a part without time began")


class Room:
    """Memory for so many rows. No GPU is here that could run out of it."""

    def __init__(self, rows: int) -> None:
        self.rows, self.used, self.order = rows, 0, []  # type: ignore[var-annotated]


class Tenant:
    trained = 1

    def __init__(self, room: Room, name: str, rows: int) -> None:
        if room.used + rows > room.rows:
            raise torch.OutOfMemoryError("out of memory")
        self.room, self.name, self.rows, self.images = room, name, rows, rows
        room.used += rows

    def iterate(self) -> Turn:
        self.room.order.append(self.name)
        return Turn(self.images, 2.0, 0.5, {"first_ratio_deviation": 0.0})

    def __del__(self) -> None:
        if hasattr(self, "room"):
            self.room.used -= self.rows


def _measured(room: Room, rows: int) -> dict[str, turns.Measured]:
    makers: Any = {name: lambda rows, name=name: Tenant(room, name, rows) for name in ("a", "b")}
    budget = Budget(60, {"case": 60})
    with budget.part("case"):
        return measure(makers, rows, CPU, budget, 2)


def test_arms_take_turns() -> None:
    """None is always the first, and the first iteration of each does not count."""
    room = Room(16)
    found = _measured(room, 8)
    assert room.order == ["a", "b", "a", "b", "b", "a"]
    assert [(one.beside, len(one.turns), one.note) for one in found.values()] == [(True, 2, "")] * 2
    assert compared(found["a"], found["b"]) == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 2}


def test_an_arm_without_memory_beside_the_others_comes_after_them() -> None:
    """With all its rows, and the table says so."""
    found = _measured(Room(12), 8)
    assert [(one.beside, one.rows, len(one.turns)) for one in found.values()] == [(True, 8, 2), (False, 8, 2)]


def test_an_arm_that_does_not_fit_halves_its_rows() -> None:
    """Down to a group; below that it is reported."""
    assert [one.rows for one in _measured(Room(4), 16).values()] == [4, 4]
    failed = _measured(Room(2), 16)
    assert {one.note for one in failed.values()} == {"out of memory with 4 rows"}
    assert compared(failed["a"], failed["b"]) is None


# The whole script


def test_the_table_says_what_is_missing_and_whether_the_goals_are_met() -> None:
    """A part that was stopped has no numbers but a note."""
    arm = {"turns": 3, "images": 32, "seconds": 3.2, "rollout": 1.2, "update": 2.0, "memory": 30 * table.GIB,
           "rows": 16, "flops_per_image": 25e12, "beside": True, "note": "", "first_ratio_deviation": 2e-7}  # fmt: skip
    empty = {"turns": 0, "beside": True, "note": "", "memory": None}
    spread = {"median": 1.71, "low": 1.7, "high": 1.8, "n": 3}
    case = {"label": "SD1.5 size", "adaptation": "lora", "clip": 1e-5, "note": "", "ratio": spread,
            "critic": {"median": 1.08, "low": 1.07, "high": 1.09, "n": 3}}  # fmt: skip
    found = {
        "dry_run": False, "machine": {"gpu": "H100", "cpu": "c"}, "command": "make bench-gpu", "commit": "0123abc",
        "versions": {"torch": "2.13"}, "seconds": 400.0, "peak": 800e12, "peak_dtype": "bfloat16", "overrides": [],
        "cases": [
            {**case, "arms": {"ours": arm, "grpo": {**arm, "beside": False}, "plain": arm}},
            {**case, "adaptation": "full", "arms": dict.fromkeys(("ours", "grpo", "plain"), empty),
             "ratio": None, "critic": None, "note": "stopped: its time of 95 s was used up"},
        ],
        "inference": [{"label": "SD1.5 size", "note": "out of memory with 16 rows"}],
    }  # fmt: skip
    text = table.document([{**found, "dry_run": True}, found])
    assert text.index("## H100") < text.index("## Dry run on H100")
    for expected in (
        "| SD1.5 size | lora | latentac | 10 | 1.20, 2.00 | 250 | 31.2% | 30.0 | 16 | 2.0e-07 (2.0% of the clip) | – |",
        "| SD1.5 size | lora | 1.71 [1.70, 1.80], n = 3 | +8.0% [+7.0%, +9.0%], n = 3 | 25 |",
        "lora, latentac, GRPO: measured after the others",
        "- SD1.5 size, full: stopped: its time of 95 s was used up.",
        "- SD1.5 size, steering and endpoint: out of memory with 16 rows.",
        "at least 1.5 times the plain loop: yes (1.71)",
        "within 40 GiB: yes (30)",
        "at most 5% over GRPO: no (1.08)",
        "full: fits on one GPU: no",
    ):
        assert expected in text


def test_results_of_a_gpu_need_a_clean_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written or measured."""
    monkeypatch.setattr("benchmarks.plan.commit", lambda: "0123abc-dirty")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="6"):
        program.main([])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_walks_the_whole_script(tmp_path: Path) -> None:
    """Every part of both models has its numbers, and the table claims nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", f"--output={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("dry-run-*.json")
    found = json.loads(file.read_text())
    assert found["dry_run"]
    assert [(case["model"], case["adaptation"]) for case in found["cases"]] == [
        (name, adaptation) for name in MINIATURE for adaptation in ("lora", "full")
    ]
    for case in found["cases"]:
        for arm in case["arms"].values():
            assert arm["turns"] == program.DRY_TURNS
            assert 0 < arm["rollout"] < arm["seconds"]
        assert case["arms"]["ours"]["first_ratio_deviation"] < 1e-4
        assert case["ratio"]["low"] <= case["ratio"]["median"] <= case["ratio"]["high"]
        assert case["critic"]["n"] == program.DRY_TURNS
        trained = case["arms"]["plain"]["trained"]
        assert {arm["trained"] for arm in case["arms"].values()} == {trained}, "the loops train different transitions"
    for one in found["inference"]:
        assert one["endpoint"]["single"] > 0
        assert one["steering"]["plain_seconds"] > 0
    text = done.stdout.strip()
    assert "Dry run" in text
    assert "Goals" not in text
    assert text in (tmp_path / "README.md").read_text()

"""The evidence: a fair plan, units that resume, right statistics and verdicts, and a README that tells them."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks import aggregate, claims, report
from benchmarks.claims import CLAIMS, judge
from benchmarks.evidence import Schedule, refresh
from benchmarks.plan import (
    ARMS,
    EXPERIMENTS,
    FAILURE,
    FULL,
    QUICK,
    RESULT,
    ROOT,
    SCALES,
    Scale,
    Unit,
    require_clean_tree,
    units,
)
from benchmarks.unit import _SOURCES
from latentac.config.recipes import RECIPES

TINY = (
    *("kernel.num_steps=4", "evaluation.num_images=16", "evaluation.num_bootstrap=100"),
    *("evaluation.num_diversity_prompts=2", "evaluation.images_per_prompt=4"),
    *("pretrain.num_images=16", "pretrain.num_held_out_images=16", "pretrain.num_passes=1"),
    *("train.num_iterations=3", "train.images_per_iteration=16", "train.block_images=16", "train.checkpoint_every=1"),
    *("train.updates_per_iteration=2", "train.num_workers=1", "critic.replay_images=24"),
)
TIMES = {"seconds", "created", "curve", "history"}


# The plan


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_arm_spends_the_same(scale: Scale) -> None:
    """Within an experiment and recipe each arm that trains scores as many images and does as many actor updates."""
    spent: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for unit in units(scale):
        assert unit.config.train.early_stopping is None, "an arm that stops early spends less"
        if unit.trains:
            spent.setdefault((unit.experiment, unit.recipe), set()).add((unit.images, unit.updates))
    assert {name: len(found) for name, found in spent.items()} == dict.fromkeys(spent, 1), spent
    if scale is FULL:
        for (_, recipe), budgets in spent.items():
            assert budgets == {(5_120, {"shapes-unet": 80, "shapes-dit": 320, "words-dit": 320}[recipe])}


def test_a_group_is_not_paid_for_in_prompts_alone() -> None:
    """GRPO's groups come out of the same images per iteration; only value pretraining changes the iterations."""
    config = next(unit.config for unit in units(FULL) if unit.arm == "grpo" and unit.recipe == "shapes-unet")
    assert (config.train.images_per_iteration, config.algorithm.own["group_size"]) == (256, 4)
    assert config.pretrain.num_images == 0


def test_the_plan_may_stop_anywhere() -> None:
    """All arms have seed n before any has seed n + 1; what two experiments share is one unit."""
    planned = units(FULL)
    assert [unit.seed for unit in planned] == sorted(unit.seed for unit in planned)
    shared = [{unit.name for unit in planned if (unit.experiment, unit.arm) == (name, "ours") and unit.seed < 3}
              for name in ("main", "ablations")]  # fmt: skip
    assert shared[1] <= shared[0]
    assert len({unit.hash for unit in planned}) == len({unit.name for unit in planned})


def test_a_unit_is_known_by_what_decides_its_result() -> None:
    """A setting changes the hash; the gate, which plays no part, does not; a unit survives its JSON."""
    unit = Unit("main", "ours", "shapes-unet", 0, TINY)
    same = dataclasses.replace(unit, overrides=(*TINY, "gate.min_gain=0.5"))
    other = dataclasses.replace(unit, overrides=(*TINY, "policy.learning_rate=1e-5"))
    assert unit.hash == same.hash != other.hash
    assert Unit.from_json(unit.to_json()) == unit


def test_every_claim_has_its_comparison() -> None:
    """What a claim asks for is in the plan: an experiment of that name, with intervals of at least three seeds."""
    assert {claim.experiment for claim in CLAIMS} <= {*EXPERIMENTS, "cost", "steering", "serving", "scoring", "scaling"}
    counts = [count for seeds in FULL.seeds.values() for recipe, count in seeds.items() if recipe in RECIPES]
    assert min(counts) >= claims.MIN_SEEDS


# Statistics


def test_the_gap_is_what_the_judge_did_not_gain() -> None:
    """The trained reward's gain minus the judge's, by seed at the end, and at each point of the curve from 0 on."""
    record = _record("ours", 0, 0.0)
    record["gain"] |= {"shapes_verifier": {"mean": 0.3}, "rapidocr": {"mean": 0.1}}
    for step, point in enumerate(record["curve"]):
        point["rewards"] = {"shapes_verifier": 0.4 + 0.2 * step, "rapidocr": 0.5 + 0.05 * step}
    ours = aggregate.summarise("words", [record])["arms"]["ours"]
    assert ours["gap"]["mean"] == pytest.approx(0.2)
    assert [point["rewards"]["gap"]["mean"] for point in ours["curve"]] == pytest.approx([0.0, 0.15, 0.3])


def test_intervals_over_seeds_are_students() -> None:
    """The interval of a mean is scipy's; one of differences is that of the paired test; one seed has none."""
    numbers = [0.61, 0.55, 0.7, 0.64]
    found = aggregate.t_interval(numbers)
    low, high = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
    assert found == pytest.approx({"mean": np.mean(numbers), "low": low, "high": high, "n": 4})
    others = dict(enumerate([0.5, 0.52, 0.6]))
    low, high = stats.ttest_rel(numbers[:3], list(others.values())).confidence_interval(0.95)
    paired = aggregate.paired(dict(enumerate(numbers)), others)
    assert paired is not None
    assert (paired["low"], paired["high"], paired["n"]) == pytest.approx((low, high, 3))
    assert aggregate.t_interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert aggregate.paired({0: 1.0}, {1: 1.0}) is None


def test_results_of_another_configuration_are_not_mixed_in(tmp_path: Path) -> None:
    """Only units of the present plan are aggregated, those that the file has already included; the rest are missing."""
    scale = _here(tmp_path)
    planned = units(scale, ["main"], ["shapes-unet"])
    _leave(scale, planned[0], {**_record(planned[0].arm, 0, 0.0), "hash": planned[0].hash})
    stale = {**_record("ddpo", 0, 0.0), "hash": "another", "environment": {}}
    kept = {**_record("ddpo", 0, 0.25), "hash": next(unit.hash for unit in planned if unit.arm == "ddpo")}
    kept["environment"] = {"commit": "c", "machine": {}, "versions": {}}
    scale.results.mkdir()
    (scale.results / "main-shapes-unet.json").write_text(json.dumps({"units": [stale, kept]}))
    path = aggregate.aggregate(scale, "main", "shapes-unet")
    assert path is not None
    found = json.loads(path.read_text())
    assert [(unit["arm"], unit["hash"]) for unit in found["units"]] == [
        ("ours", planned[0].hash),
        ("ddpo", kept["hash"]),
    ]
    assert found["differences"]["ddpo"]["final.shapes_verifier"]["n"] == 1
    assert ["pixel", 0] in found["missing"]
    assert ["ours", 0] not in found["missing"]
    assert aggregate.aggregate(scale, "critic", "shapes-unet") is None


def test_what_is_recorded_need_not_run_again(tmp_path: Path) -> None:
    """A unit of the committed files is finished on every machine, in each experiment that has it; anew, it is not."""
    scale = dataclasses.replace(FULL, folder=tmp_path / "units", results=tmp_path / "results")
    shared = next(unit for unit in units(scale, ["main"], ["shapes-dit"]) if unit.arm == "ours")
    record = {**_record("ours", 0, 0.0), "hash": shared.hash}
    record["environment"] = {"commit": "c", "machine": {}, "versions": {}}
    scale.results.mkdir()
    (scale.results / "main-shapes-dit.json").write_text(json.dumps({"units": [record]}))
    planned = units(scale, ["main", "ablations"], ["shapes-dit"])
    left = Schedule(scale, planned, workers=1).left
    assert len(left) == len({unit.name for unit in planned}) - 1
    assert shared.name not in {unit.name for unit in left}
    assert shared.name in {unit.name for unit in Schedule(scale, planned, workers=1, anew=True).left}
    other = next(unit for unit in planned if unit.arm == "plain")
    assert aggregate.aggregate(scale, "ablations", "shapes-dit") is None, "there is nothing to compare it with"
    _leave(scale, other, {**_record("plain", 0, 0.0), "hash": other.hash})
    path = aggregate.aggregate(scale, "ablations", "shapes-dit")
    assert path is not None
    assert [unit["hash"] for unit in json.loads(path.read_text())["units"]] == [other.hash, shared.hash]


def test_aggregated_files_are_json(tmp_path: Path) -> None:
    """What `dump` writes reads back equal, at six digits, with a unit a line."""
    content = {"arms": {"ours": {"mean": 1 / 3, "seeds": [0, 1]}}, "units": [{"a": {"b": [1.0]}}, {}], "empty": []}
    text = aggregate.dump(content)
    assert json.loads(text) == {**content, "arms": {"ours": {"mean": 0.333333, "seeds": [0, 1]}}}
    assert '  {"a": {"b": [1.0]}},\n' in text


# Verdicts


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ({"mean": 0.1, "low": 0.05, "high": 0.15, "n": 3}, "holds"),
        ({"mean": -0.1, "low": -0.15, "high": -0.05, "n": 3}, "does not hold"),
        ({"mean": 0.1, "low": -0.05, "high": 0.25, "n": 5}, "undecided"),
        ({"mean": 0.1, "low": 0.05, "high": 0.15, "n": 2}, "undecided"),
        ({"mean": 0.1, "low": None, "high": None, "n": 1}, "undecided"),
        (None, "undecided"),
    ],
)
def test_verdicts_follow_the_interval(interval: dict[str, Any] | None, word: str) -> None:
    """The whole interval on one side decides, three seeds at least; and the mirror image decides the other way."""
    assert judge(interval, 0.0).word == word
    if interval is not None:
        opposite = {"holds": "does not hold", "does not hold": "holds"}.get(word, word)
        assert judge(interval, 0.0, above=False).word == opposite


@pytest.mark.parametrize(("truth", "word"), [(1, "holds"), (-1, "does not hold"), (0, "undecided")])
def test_each_claim_can_come_out_each_way(truth: int, word: str) -> None:
    """In a made-up world where it is true, false, or too noisy to tell, a claim gets that verdict."""
    results = _world(truth)
    for claim in CLAIMS:
        assert claim.verdict(results, "shapes-unet").word == word, claim.sentence
        missing = claim.verdict({}, "shapes-unet")
        assert (missing.word, missing.reason) == ("undecided", "not run yet")


# The README


def test_the_readme_says_the_recorded_results() -> None:
    """The section is what the committed files generate, and its figures are there."""
    text = FULL.readme.read_text()
    found = report.section(aggregate.load(FULL), os.path.relpath(FULL.results, FULL.readme.parent))
    assert report.replaced(text, found) == text, "run `python -m benchmarks.evidence report`"


def test_a_report_is_drawn_from_the_files_alone(tmp_path: Path) -> None:
    """Every table, figure and claim of a full set of results; twice the same, byte for byte."""
    scale = _here(tmp_path)
    scale.results.mkdir()
    for name, content in _world(1).items():
        (scale.results / f"{name}.json").write_text(aggregate.dump(dict(content)))
    written = {path: path.read_bytes() for path in report.write_report(scale)}
    drawn = {f"{name}-shapes-unet.svg" for name in (*EXPERIMENTS, "steering")}
    assert {path.name for path in written} == {"README.md", *drawn}
    assert written == {path: path.read_bytes() for path in report.write_report(scale)}
    text = scale.readme.read_text()
    assert all(claim.sentence in text for claim in CLAIMS)
    assert text.count("**holds**") == len(CLAIMS)
    for figure in (path for path in written if path.suffix == ".svg"):
        assert f"results/{figure.name})" in text


def test_a_document_without_markers_is_refused() -> None:
    """Nothing is appended somewhere by guess."""
    with pytest.raises(ValueError, match="results"):
        report.replaced("# Title\n", "text")
    assert report.section({}, "folder") == f"{report.NOTHING}\n"


# Units


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_unit_comes_to_the_same_result(tmp_path: Path) -> None:
    """kill -9 after the first iteration, then on from the checkpoint: bitwise the numbers of an undisturbed run."""
    unit = Unit("main", "ours", "shapes-unet", 0, TINY)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unit.json").write_text(unit.to_json())
    undisturbed, killed = _start(tmp_path / "whole"), _start(tmp_path / "killed")
    while not list((tmp_path / "killed").glob("checkpoint-000001")):
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / RESULT).exists()
    assert _start(tmp_path / "killed").wait() == 0
    assert undisturbed.wait() == 0
    whole, again = (json.loads((tmp_path / name / RESULT).read_text()) for name in ("whole", "killed"))
    assert {name: whole[name] for name in whole.keys() - TIMES} == {name: again[name] for name in again.keys() - TIMES}
    assert [point["rewards"] for point in whole["curve"]] == [point["rewards"] for point in again["curve"]]
    timed = {"seconds", "rollout_seconds", "speed"}
    histories = [
        [{k: v for k, v in entry.items() if k not in timed} for entry in each["history"]] for each in (whole, again)
    ]
    assert histories[0] == histories[1]
    assert whole["images"] == 64
    assert [point["images"] for point in whole["curve"]] == [0, 32, 48, 64]
    assert not list((tmp_path / "killed").glob("*checkpoint*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_failed_unit_is_reported_and_stops_nobody(tmp_path: Path) -> None:
    """The scheduler goes on after a failure, aggregates what there is, and names what is missing and why."""
    scale = _here(tmp_path)
    failing = 'rewards=[{use: "tests.latentac.rewards.failing:Failing", name: fragile, where: always, how: raises}]'
    bad = Unit("critic", "pretrained", "shapes-unet", 0, (*TINY, failing, "gate.reward=fragile"))
    good = Unit("critic", "ten_times", "shapes-unet", 1, TINY)
    schedule = Schedule(scale, [bad, good], workers=2)
    assert not schedule.run(deadline=time.monotonic())  # no time at all: nothing is started, nothing is lost
    assert schedule.run(deadline=float("inf"))
    assert schedule.failed == [bad]
    assert "reward fragile, prompt" in json.loads((scale.folder / bad.name / FAILURE).read_text())["problem"]
    found = json.loads((scale.folder / good.name / RESULT).read_text())
    assert (found["images"], found["updates"], len(found["critic"]["best"])) == (16, 0, 4)
    assert [len(passes) for passes in found["critic"]["passes"].values()] == list(ARMS["ten_times"].passes)
    assert Schedule(scale, [bad, good], workers=1).left == [bad]
    assert refresh(scale, [good]) == [], "a unit that is not in the plan was aggregated"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_cost_of_the_critic_is_measured_in_turns(tmp_path: Path) -> None:
    """One process gives both ratios with their intervals and each arm's seconds by part."""
    from benchmarks import critic_cost

    settings = [f"--set={setting}" for setting in TINY]
    assert critic_cost.main(["--pairs=2", f"--output={tmp_path}", *settings]) == 0
    found = json.loads((tmp_path / "cost-shapes-unet.json").read_text())
    for ratio in (found["ratio"], found["recipe_ratio"]):
        assert ratio["n"] == 2
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
    for parts in found["seconds"].values():
        assert parts["rollout"] > 0
        assert parts["actor"] > 0
        assert parts["critic"] >= 0


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [([], 0.0), ([(1.0, 3.0)], 2.0), ([(4.0, 5.0), (1.0, 3.0), (2.0, 3.5)], 3.5), ([(0.0, 9.0), (1.0, 2.0)], 9.0)],
)
def test_time_that_overlaps_counts_once(spans: list[tuple[float, float]], seconds: float) -> None:
    """Of rollouts, and of scoring."""
    from benchmarks.scoring import covered

    assert covered(spans) == seconds


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_worker_and_two_are_compared_in_turns(tmp_path: Path) -> None:
    """Three processes, two of which train together; the images of both trainings are the same."""
    from benchmarks import scaling

    settings = [f"--set={setting}" for setting in (*TINY, "train.block_images=8")]
    assert scaling.main(["--rounds=2", f"--output={tmp_path}", *settings]) == 0
    found = json.loads((tmp_path / "scaling-shapes-unet.json").read_text())
    assert found["speedup"]["n"] == 2
    assert 0 < found["speedup"]["low"] <= found["speedup"]["median"]
    assert found["speedup"]["median"] == pytest.approx(found["seconds"]["one"] / found["seconds"]["two"], rel=0.5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_overlapping_is_measured_in_one_iteration(tmp_path: Path) -> None:
    """Each part's seconds, of a reward that waits and of one that computes."""
    from benchmarks import scoring

    settings = [f"--set={setting}" for setting in TINY]
    assert scoring.main(["--iterations=2", "--processes=1", f"--output={tmp_path}", *settings]) == 0
    found = json.loads((tmp_path / "scoring-shapes-unet.json").read_text())
    for kind in ("waits", "computes"):
        seconds, ratio = found[kind]["seconds"], found[kind]["ratio"]
        assert seconds["rollout"] > 0
        assert 0.9 * found["least_scoring"] < seconds["scoring"] <= seconds["both"] < seconds["iteration"]
        assert ratio["n"] == 2
        assert 0.99 < ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_endpoint_is_measured_in_turns(tmp_path: Path) -> None:
    """Two real servers: each method's ratio, one caller's seconds, every probe; and the file says so."""
    from benchmarks import serving

    options = ["--rounds=2", "--requests=8", "--alone=2", f"--output={tmp_path}"]
    assert serving.main(options) == 0
    found = json.loads((tmp_path / "serving-shapes-unet.json").read_text())
    for ratio in (*found["throughput"].values(), found["overhead"]):
        assert ratio["n"] == 2
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found["alone"]["bare"] > 0
    assert found["probes"]["n"] > 0
    assert found["probes"]["median"] <= found["probes"]["p99"] <= found["probes"]["max"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_versions_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This version against its own last commit: a ratio for each measurement, and no checkout is left."""
    from benchmarks import against

    for name, number in {"IMAGES": 4, "QUESTIONS": 16, "LARGE_BYTES": 10_000, "SMALL_FILES": 2, "BOUND": 0}.items():
        monkeypatch.setattr(against, name, number)
    assert against.main(["HEAD", "--rounds=1", f"--output={tmp_path / 'throughput.json'}"]) == 0
    found = json.loads((tmp_path / "throughput.json").read_text())
    kinds = {"images", "questions", *(f"{each} {place}" for each in ("publish", "fetch") for place in ("S3", "file"))}
    assert set(found["ratios"]) == kinds
    assert all(ratio["median"] > 0 for ratio in found["ratios"].values())
    listed = subprocess.run(["git", "worktree", "list"], cwd=against.ROOT, capture_output=True, text=True, check=True)
    assert "tree" not in {Path(line.split()[0]).name for line in listed.stdout.splitlines()}


# What they share


def _here(folder: Path) -> Scale:
    """The quick scale, working below `folder`."""
    return dataclasses.replace(QUICK, folder=folder / "units", results=folder / "results", readme=folder / "README.md")


def _untimed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.endswith("seconds")}


def test_ways_to_steer_are_measured_on_the_same_particles(tmp_path: Path) -> None:
    """Best-of-N by the true reward is the best of its particles, every number of evaluations has its control, and what
    was measured is not measured again."""
    import torch

    from benchmarks import steering
    from latentac.backbones import load_backbone
    from latentac.runs.configuration import resolve_recipe
    from latentac.sampling.kernels import KERNELS
    from latentac.sampling.policy import Policy
    from latentac.training.value_pretraining import new_critic
    from latentac.worlds.builtin import builtin_pipeline

    config = resolve_recipe("shapes-dit-smoke", "", [])
    backbone = load_backbone(config.backbone, builtin_pipeline("shapes-dit"), torch.device("cpu"))
    critic = new_critic(config, Policy(backbone, KERNELS.make(config.kernel)))
    torch.nn.init.normal_(critic.heads.weight)
    critic.save(tmp_path / "pretrain-value" / "critic")
    world = steering.World("base", config, tmp_path, 6)
    assert world.counts(steering.WAYS["best_of_n"])[-1] == 16
    assert world.nfe(steering.WAYS["resampling_cfg"], 2) == 4 * config.kernel.num_steps
    rows = steering.points(world, "best_of_n", 3) + steering.points(world, "resampling", 2)
    rewards = {(row["way"], row["particles"], row["choice"]): np.array(row["rewards"]) for row in rows}
    assert all(found.shape == (6, len(world.rewards)) for found in rewards.values())
    alone, best = (rewards["best_of_n", *which] for which in ((1, "none"), (3, "reward")))
    assert (best[:, 0] >= np.maximum(alone, rewards["best_of_n", 3, "critic"])[:, 0]).all()
    found = steering.compared(rows, [reward.name for reward in world.rewards], config)
    assert [row["particles"] for row in found if row["way"] == "best_of_n"] == [1, 2, 2]
    assert all(row["control_nfe"] == row["nfe"] for row in found)
    assert {row["critic"] for row in found if row["way"] == "resampling"} == {True}
    assert [row["critic"] for row in found if row["way"] == "best_of_n"] == [False, True, False]
    cost = steering.cost(world, 4)
    assert cost["resampling"]["n"] == cost["value_gradient"]["n"] > 2
    calls: list[int] = []
    for stamp in ({"a": 1}, {"a": 1}, {"a": 2}):
        steering._once(tmp_path, stamp, "name", lambda: calls.append(1))
    assert len(calls) == 2


def _start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "benchmarks.unit", str(folder)], cwd=ROOT, env=environment)


def _leave(scale: Scale, unit: Unit, record: Mapping[str, Any]) -> None:
    folder = scale.folder / unit.name
    folder.mkdir(parents=True)
    (folder / RESULT).write_text(json.dumps({**record, "commit": "c", "machine": {}, "versions": {}}))


def _record(arm: str, seed: int, shift: float) -> dict[str, Any]:
    """A unit's record in a world where this arm is `shift` better than 0.6 in everything, up to a little chance."""
    drawn = random.Random(f"{arm}/{seed}")
    value = 0.6 + shift + drawn.uniform(-0.005, 0.005)
    rewards = ("shapes_verifier", "jpeg_compressibility", "colourfulness", "shapes_clip", "rapidocr")
    numbers = {name: {"mean": value, "low": value - 0.02, "high": value + 0.02, "n": 256} for name in rewards}
    curve = [
        {"iteration": step, "images": 100 * step, "seconds": 9.0 * step, "rewards": dict.fromkeys(rewards, value)}
        for step in range(3)
    ]
    steps = [value - 0.6 + 0.01 * step for step in range(3)]
    return {
        "arm": arm,
        "seed": seed,
        "hash": f"{arm}-{seed}",
        "sources": "s",
        "overrides": [],
        "images": 10_240,
        "updates": 160,
        "base": numbers,
        "final": numbers,
        "reward": "shapes_verifier",
        "gain": {**{name: {"mean": value - 0.45} for name in rewards}, "shapes_verifier": {"mean": 0.15}},
        "drift": dict.fromkeys(rewards, 1 - value),
        "score": value,
        "diversity_kept": {"ratio": value},
        "critic": {"explained_variance": steps, "best": steps, "rank_correlation": steps, "pretrained": steps},
        "curve": curve,
        "recoveries": [],
        "seconds": {"pretraining": 60.0, "training": 600.0},
    }


def _world(truth: int) -> dict[str, dict[str, Any]]:
    """Aggregated files of a world where every claim is true (1), false (-1), or drowned in noise (0)."""
    results = {}
    for name, plan in EXPERIMENTS.items():
        records = []
        for arm in plan.arms:
            for seed in range(3):
                noise = 0.3 * (seed - 1) if truth == 0 and plan.reference_of(arm) == arm else 0.0
                ahead = 0.1 * truth if plan.reference_of(arm) == arm else 0.0
                if (name, arm) == ("words", "joint") or (
                    name == "ablations" and arm in ("lambda_1", "lambda_095", "replay", "ours")
                ):
                    ahead = 0.2 * truth
                if arm == "ten_times":
                    ahead = 0.2 if truth < 0 else 0.1 * truth
                records.append(_record(arm, seed, ahead + noise))
        found: dict[str, Any] = {
            "experiment": name,
            "recipe": "shapes-unet",
            "command": "make evidence",
            "sources": ["s"],
        }
        machine = {"gpu": None, "cpu": "a processor", "cores": 2}
        found |= {"commits": ["0" * 40], "machines": [machine], "missing": [], "failed": [], "units": records}
        results[f"{name}-shapes-unet"] = {**found, **aggregate.summarise(name, records)}
    ratio = {1: (1.05, 1.04, 1.06), -1: (1.2, 1.18, 1.22), 0: (1.1, 1.05, 1.15)}[truth]
    reported: dict[str, float] = {**dict(zip(("median", "low", "high"), ratio, strict=True)), "n": 12}
    results["cost-shapes-unet"] = {
        **results["main-shapes-unet"],
        "experiment": "cost",
        "ratio": reported,
        "recipe_ratio": reported,
        "seconds": {name: dict.fromkeys(("rollout", "actor", "critic", "all"), 1.0) for name in ("DDPO", "values")},
        "steps": 10,
    } | {"images": 256, "updates": 4}
    results["scoring-shapes-unet"] = {**results["main-shapes-unet"], **_scoring_world(truth)}
    figures = {1: (1.9, 1.85, 1.95), -1: (1.4, 1.3, 1.5), 0: (1.7, 1.5, 1.9)}[truth]
    speedup = {**dict(zip(("median", "low", "high"), figures, strict=True)), "n": 6}
    scaling = {"experiment": "scaling", "images": 256, "speedup": speedup, "seconds": {"one": 4.0, "two": 2.0}}
    results["scaling-shapes-unet"] = {**results["main-shapes-unet"], **scaling}
    results["steering-shapes-unet"] = {**results["main-shapes-unet"], **_steering_world(truth)}
    results["serving-shapes-unet"] = {**results["main-shapes-unet"], **_serving_world(truth)}
    return results


def _scoring_world(truth: int) -> dict[str, Any]:
    """Rollouts and scoring overlap, or follow each other, or nobody knows."""
    figures = {1: (1.03, 1.01, 1.06), -1: (1.4, 1.3, 1.5), 0: (1.1, 1.0, 1.3)}[truth]
    ratio = dict(zip(("median", "low", "high"), figures, strict=True))
    seconds = dict.fromkeys(("rollout", "scoring", "both", "iteration"), 2.0)
    kind = {"seconds": seconds, "ratio": {**ratio, "n": 6}, "iteration_ratio": {**ratio, "n": 6}}
    sizes = {"images": 256, "block_images": 32, "processes": 2, "seconds_per_image": 0.05, "least_scoring": 6.4}
    return {"experiment": "scoring", **sizes, "waits": kind, "computes": kind}


def _serving_world(truth: int) -> dict[str, Any]:
    """Batching gains, or loses, or nobody knows; probes are answered in time but where it loses."""
    median, half = {1: (2.0, 0.1), -1: (0.9, 0.1), 0: (1.5, 0.2)}[truth]
    ratio = {"median": median, "low": median - half, "high": median + half, "n": 6}
    methods = ("none", "value_gradient")
    return {
        "experiment": "serving",
        "callers": 8,
        "batch_rows": 4,
        "steps": 10,
        "throughput": dict.fromkeys(methods, ratio),
        "rates": {method: {"batched": 40.0, "single": 20.0} for method in methods},
        "alone": {"served": 0.06, "drawn": 0.055, "bare": 0.035},
        "overhead": ratio,
        "probes": {"n": 500 if truth else 50, "median": 0.002, "p99": 0.02, "max": 0.2 if truth < 0 else 0.03},
    }


def _steering_world(truth: int) -> dict[str, Any]:
    """Points of a few ways: those that a critic steers are ahead of best-of-N, behind it, or nobody knows."""
    ahead = 0.1 * truth
    spread = 0.2 if truth == 0 else 0.02

    def point(weights: str, way: str, particles: int, nfe: int, choice: str) -> dict[str, Any]:
        steered = way != "best_of_n"
        difference = ahead if steered else 0.0
        interval = {"mean": difference, "low": difference - spread, "high": difference + spread, "n": 256}
        reward = {"mean": 0.6 + difference, "low": 0.58, "high": 0.8, "n": 256}
        found = dict.fromkeys(("shapes_verifier", "jpeg_compressibility", "colourfulness", "shapes_clip"), reward)
        return {
            "weights": weights,
            "way": way,
            "particles": particles,
            "nfe": nfe,
            "choice": choice,
            "label": f"{way} x{particles}",
            "critic": steered,
            "rewards": found,
            "diversity": reward,
            "minus_control": interval,
            "minus_plain": interval,
            "seconds": 0.02,
        }

    points = []
    for weights in ("base", "trained"):
        points.append(point(weights, "value_gradient", 1, 20, "none"))
        for count in claims.MULTIPLES:
            ways = ("best_of_n", "resampling", "value_gradient") if count > 1 else ("best_of_n",)
            choices = ("critic", "reward") if count > 1 else ("none",)
            points += [point(weights, way, count, 10 * count, choice) for way in ways for choice in choices]

    def ratio(median: float, half: float) -> dict[str, float]:
        return {"median": median, "low": median - half, "high": median + half, "n": 12}

    particle, gradient = {1: (1.05, 2.2), -1: (1.3, 2.9), 0: (1.1, 2.5)}[truth]
    cost = {"rows": 64, "resampling": ratio(particle, 0.03), "value_gradient": ratio(gradient, 0.03)}
    found = {"experiment": "steering", "reward": "shapes_verifier", "steps": 10, "prompts": 256}
    return {**found, "cost": {"base": cost, "trained": cost}, "points": points}


def test_results_of_a_dirty_tree_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They could not be made again. Elsewhere they may be written."""
    for tree in ("0123abc-dirty", "unknown"):
        monkeypatch.setattr("benchmarks.plan.commit", lambda tree=tree: tree)
        with pytest.raises(SystemExit, match="6"):
            require_clean_tree(FULL.results / "serving.json")
        require_clean_tree(tmp_path / "serving.json")
    monkeypatch.setattr("benchmarks.plan.commit", lambda: "0123abc")
    require_clean_tree(FULL.results / "serving.json")


def test_the_sources_of_a_unit_are_there() -> None:
    """A pattern without files would let results of other code count as the same."""
    assert all(any((ROOT / "latentac").glob(pattern)) for pattern in _SOURCES)

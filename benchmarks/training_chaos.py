"""Faults of a training job, in numbers: how long until it trains again, what is lost, and is the result the same?

    python -m benchmarks.training_chaos [--faults 50] [--seed 0]

Two to four torchrun agents on loopback, with the command of the cluster's job, and a real MinIO on a small disk. Runs
of a tiny recipe meet fault after fault, at random, until they are done. In every second run the number of workers is
fixed: its weights have to be bitwise those of a run without faults. A fault comes when the job has recovered from the
one before: all agents train, and the store has a checkpoint from after the fault.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.chaos import Scene, scene
from benchmarks.chaos_job import Stuck
from benchmarks.chaos_round import ELASTIC, FIXED, Met, Round
from benchmarks.plan import FULL, require_clean_tree
from latentac.runs.preparation.prepare import environment
from latentac.runs.steps import prepare, pretrain_value
from latentac.store import open_store
from latentac.system.lifetime import stop_on_sigterm

SETTINGS = (
    "kernel.num_steps=2",
    "critic.body.width=32",
    "critic.body.num_queries=1",
    "pretrain={num_images: 8, num_held_out_images: 8, num_passes: 1, minibatch_states: 8}",
    # A multiple of 2, 3, and 4 workers.
    "train={images_per_iteration: 12, block_images: 1, updates_per_iteration: 1, checkpoint_every: 1}",
    "policy.learning_rate=1e-6",  # in many iterations of so few images a larger one diverges
    "backbone.device=cpu",
    "rewards=[{use: jpeg_compressibility}]",
    "gate.reward=jpeg_compressibility",
)
TOLERANCE = 0.01
"""Of a run whose number of workers changed: distance of its weights from those of the run without faults, divided by
the distance that training moved them."""

RECOVERY_SECONDS = 30.0
"""From the kill of a worker to the next finished iteration, on two cores."""

DISK_MIB = 1024
"""Of the store: what a few runs need."""


def _read(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """All of the safetensors files in `folder`, by part, file, and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{part}/{file.relative_to(folder)}:{name}": each for file in files for name, each in load_file(file).items()
    }


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance of two sets of weights that have the same names."""
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


@dataclass
class Weights:
    """Those that a run has before training, and after it."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]

    def distance(self, found: dict[str, torch.Tensor]) -> float:
        """Of other weights from those after training, in units of the distance that training moved them."""
        return _distance(self.after, found) / _distance(self.before, self.after)

    def largest_difference(self, found: dict[str, torch.Tensor]) -> float:
        """Of a weight from that after training, divided by the largest weight of its tensor."""
        pairs = ((self.after[name].double(), found[name].double()) for name in self.after)
        return max(float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)) for one, other in pairs)


@dataclass
class Site:
    """Where runs are trained: a store, and a folder. iterations: of each run."""

    stage: Scene
    folder: Path
    iterations: int

    def prepare(self, run: str, agents: tuple[int, int]) -> Round:
        """A run of its own, up to its training."""
        url, own = f"s3://{self.stage.server.bucket}/{run}", self.folder / run
        own.mkdir()
        settings = [*SETTINGS, f"train.num_iterations={self.iterations}"]
        prepare(run, url, str(own), "shapes-unet-smoke", overrides=settings)
        pretrain_value(run, url, str(own))
        return Round(self.stage, url, run, own, agents)

    def weights(self, played: Round) -> "Weights":
        """Of a run that is done. Then the store has nothing of it any more: its disk is small."""
        store, own = open_store(played.url), played.folder
        for step in ("prepare", "pretrain-value", "train"):
            shutil.rmtree(own / step, ignore_errors=True)
            store.fetch(f"{played.run}/{step}", own / step)
        store.remove(sorted(store.entries(), reverse=True))
        for path in own.glob("attempt-*/*/"):
            shutil.rmtree(path, ignore_errors=True)
        after = _read(own / "train" / "policy", "policy") | _read(own / "train" / "critic", "critic")
        before = _read(own / "prepare" / "backbone", "policy") | _read(own / "pretrain-value" / "critic", "critic")
        return Weights({name: before[name] for name in after}, after)


def measure(faults: int, seed: int, iterations: int, folder: Path) -> dict[str, Any]:
    """Raises Stuck where a wait of the job has reached its bound."""
    choice, bags = random.Random(seed), {FIXED: list[str](), ELASTIC: list[str]()}
    met: list[Met] = []
    rounds: list[dict[str, Any]] = []
    with scene(folder, DISK_MIB) as stage:
        site = Site(stage, folder, iterations)
        unharmed = site.prepare("unharmed", FIXED)
        unharmed.play(0, choice, [])
        reference = site.weights(unharmed)
        while len(met) < faults:
            agents, run = (ELASTIC if len(rounds) % 2 else FIXED), f"round-{len(rounds)}"
            print(f"{run}: {agents[0]} to {agents[1]} agents", flush=True)
            played = site.prepare(run, agents)
            played.play(min(faults - len(met), (faults + 1) // 2), choice, bags[agents])
            met += played.met
            found = site.weights(played).after
            row = {"agents": list(agents), "faults": len(played.met), "distance": reference.distance(found)}
            rounds.append(row | {"largest_difference": reference.largest_difference(found)})
            print(f"{run}: {json.dumps(rounds[-1])}", flush=True)
    return _record(met, rounds, seed, iterations)


def _record(met: list[Met], rounds: list[dict[str, Any]], seed: int, iterations: int) -> dict[str, Any]:
    by_kind: dict[str, list[Met]] = defaultdict(list)
    for each in met:
        by_kind[each.kind].append(each)
    fixed = [each["largest_difference"] for each in rounds if each["agents"] == list(FIXED)]
    elastic = [each["distance"] for each in rounds if each["agents"] == list(ELASTIC)]
    wrong = sum(difference != 0 for difference in fixed) + sum(difference > TOLERANCE for difference in elastic)
    found = environment()
    return {
        "command": "make chaos",
        "commit": found["commit"],
        "machine": found["machine"],
        "seed": seed,
        "faults": len(met),
        "iterations": iterations,
        "tolerance": TOLERANCE,
        "wrong_results": wrong,
        "most_lost": max((each.lost for each in met), default=0),
        "helped": sum(not each.alone and each.kind != "disk_full" for each in met),
        "late": sum(each.kind == "worker_killed" and each.seconds > RECOVERY_SECONDS for each in met),
        "rounds": rounds,
        "kinds": {kind: _row(each) for kind, each in sorted(by_kind.items())},
    }


def _row(met: list[Met]) -> dict[str, Any]:
    seconds = [each.seconds for each in met]
    names = dict.fromkeys(name for each in met for name in each.parts)
    return {
        "faults": len(met),
        "most_lost": max(each.lost for each in met),
        "alone": sum(each.alone for each in met),
        "median_seconds": round(statistics.median(seconds), 2),
        "longest_seconds": round(max(seconds), 2),
        "median_parts": {
            name: round(statistics.median(each.parts[name] for each in met if name in each.parts), 2) for name in names
        },
    }


def table(found: dict[str, Any]) -> str:
    """Of the kinds of faults, one a line."""
    lines = ["fault               count  lost  alone  median s  longest s  parts of the median (s)"]
    for kind, row in found["kinds"].items():
        parts = ", ".join(f"{name} {value:.1f}" for name, value in row["median_parts"].items())
        lines.append(
            f"{kind:<18} {row['faults']:>6} {row['most_lost']:>5} {row['alone']:>6}"
            f" {row['median_seconds']:>9.1f} {row['longest_seconds']:>10.1f}  {parts}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=40, help="of each run (default 40)")
    parser.add_argument("--output", type=Path, default=FULL.results / "chaos" / "training.json")
    options = parser.parse_args(arguments)
    require_clean_tree(options.output)
    stop_on_sigterm()
    print(f"seed {options.seed}, {options.faults} faults", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="latentac-chaos-"))
    try:
        found = measure(options.faults, options.seed, options.iterations, folder)
    except Stuck as error:
        print(error, file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    print(f"wrong results: {found['wrong_results']}; most iterations lost by a fault: {found['most_lost']}")
    print(f"jobs that needed help: {found['helped']}; workers' kills above {RECOVERY_SECONDS:.0f} s: {found['late']}")
    failed = found["wrong_results"] or found["most_lost"] > 1 or found["helped"] or found["late"]
    if not failed:
        shutil.rmtree(folder)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

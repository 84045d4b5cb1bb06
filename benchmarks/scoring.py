"""Whether scoring and rollouts overlap: iterations with a reward of 50 ms per image in a pool of processes.

    python -m benchmarks.scoring [--recipe shapes-unet] [--iterations 6] [--processes 2]

Each call of a rollout and of scoring is timed in the iteration itself. `rollout` is the time during which any block
was rolled out, `scoring` that during which any block was scored, `both` the time from the first rollout to the last
score, and `iteration` all, with the policy's updates. A reward that waits, as for a GPU or a server, decides; one that
uses the processor takes the cores of the rollouts, and is shown beside it.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.aggregate import dump
from benchmarks.claims import verdicts
from benchmarks.plan import FULL, require_clean_tree
from benchmarks.unit import base_policy
from latentac.evaluation.measures import median
from latentac.rewards.configured import load_rewards
from latentac.runs.configuration import resolve_recipe
from latentac.runs.preparation.prepare import environment
from latentac.sampling.devices import pick_device
from latentac.system.progress import progress
from latentac.training.distributed import Mesh
from latentac.training.trainer import Trainer, new_trainer
from latentac.training.value_pretraining import new_critic
from latentac.worlds.prompts import load_prompts

Given = TypeVar("Given")
Result = TypeVar("Result")
Spans = list[tuple[float, float]]

_BOOTSTRAP = 2000
_SECONDS = 0.05
_DEFAULTS: dict[str, Any] = {"RECIPE": "shapes-unet", "PROCESSES": 2, "ITERATIONS": 6}
_PARTS = ("rollout", "scoring", "both", "iteration")


def covered(spans: Spans) -> float:
    """The seconds that lie in any of `spans`, (begin, end) each."""
    total, reached = 0.0, -float("inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


class Watch:
    """Times calls of a trainer's methods, from any thread."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._lock = trainer, threading.Lock()
        self._spans: dict[str, Spans] = {}
        for part, name in (("rollout", "_roll_out"), ("scoring", "_score")):
            setattr(trainer, name, self._timed(part, getattr(trainer, name)))

    def seconds(self) -> dict[str, float]:
        """Of one more iteration, by part."""
        self._spans = {"rollout": [], "scoring": []}
        entry = self._trainer.iterate()
        found = {name: covered(spans) for name, spans in self._spans.items()}
        return {**found, "both": entry["rollout_seconds"], "iteration": entry["seconds"]}

    def _timed(self, part: str, work: Callable[[Given], Result]) -> Callable[[Given], Result]:
        def call(given: Given) -> Result:
            began = time.perf_counter()
            result = work(given)
            with self._lock:
                self._spans[part].append((began, time.perf_counter()))
            return result

        return call


def measure(recipe: str, overrides: Sequence[str], iterations: int, processes: int) -> dict[str, Any]:
    """The record. Of each kind of reward `iterations` count, after one that does not."""
    kinds: dict[str, Any] = {}
    with progress(2 * (iterations + 1), "scoring", "iterations") as bar:
        for kind in ("waits", "computes"):
            trainer = _trainer(recipe, overrides, processes, kind == "computes")
            watch, rows = Watch(trainer), []
            for _ in range(iterations + 1):
                rows.append(watch.seconds())
                bar.update()
            kinds[kind] = _summary(rows[1:])
    train, found = trainer.config.train, environment()
    return {
        "experiment": "scoring",
        "recipe": recipe,
        "command": _command(RECIPE=recipe, PROCESSES=processes, ITERATIONS=iterations),
        "commits": [found["commit"]],
        "machines": [found["machine"]],
        "images": train.images_per_iteration,
        "block_images": train.block_images,
        "processes": processes,
        "seconds_per_image": _SECONDS,
        "least_scoring": train.images_per_iteration * _SECONDS / processes,
        **kinds,
    }


def _summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """seconds: medians by part; ratio, iteration_ratio: of `both` and of `iteration` to the longer of rollout and
    scoring of the same iteration."""
    table = {part: np.array([row[part] for row in rows]) for part in _PARTS}
    longer = np.maximum(table["rollout"], table["scoring"])
    return {
        "seconds": {part: float(np.median(values)) for part, values in table.items()},
        "ratio": median(table["both"] / longer, _BOOTSTRAP, 0),
        "iteration_ratio": median(table["iteration"] / longer, _BOOTSTRAP, 0),
    }


def _command(**options: object) -> str:
    """What makes this record."""
    return " ".join(["make bench-scoring", *(f"{n}={v}" for n, v in options.items() if v != _DEFAULTS[n])])


def _trainer(recipe: str, overrides: Sequence[str], processes: int, computes: bool) -> Trainer:
    own = f"use: 'benchmarks.slow:Slow', name: slow, seconds: {_SECONDS}, computes: {str(computes).lower()}"
    rewards = f"rewards=[{{{own}, processes: {processes}}}]"
    config = resolve_recipe(recipe, "", ["train.num_workers=1", *overrides, rewards, "gate.reward=slow"])
    device = pick_device(config.backbone.device)
    policy = base_policy(config, device)
    critic = new_critic(config, policy).to(device)
    prompts = load_prompts(config.prompts.source).train
    return new_trainer(config, policy, critic, load_rewards(config.rewards), prompts, mesh=Mesh.single(device))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default=_DEFAULTS["RECIPE"])
    parser.add_argument("--iterations", type=int, default=_DEFAULTS["ITERATIONS"])
    parser.add_argument("--processes", type=int, default=_DEFAULTS["PROCESSES"], help="that score")
    parser.add_argument("--set", action="append", default=[], help="path=value over the recipe")
    parser.add_argument("--output", type=Path, default=FULL.results, help="folder of scoring-<recipe>.json")
    options = parser.parse_args(arguments)
    require_clean_tree(options.output)
    torch.set_num_threads(1)
    # Nothing is scored before the first block is rolled out, and nothing rolled out while the last one is scored.
    overrides = ["train.block_images=16", *options.set]
    found = measure(options.recipe, overrides, options.iterations, options.processes)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"scoring-{options.recipe}.json").write_text(dump(found))
    print(f"scoring {found['images']} images in {options.processes} processes: {found['least_scoring']:.2f} s at least")
    for kind in ("waits", "computes"):
        parts = "  ".join(f"{part} {value:.2f} s" for part, value in found[kind]["seconds"].items())
        both, whole = found[kind]["ratio"], found[kind]["iteration_ratio"]
        print(f"a reward that {kind}: {parts}")
        print(f"  to the longer of rollout and scoring: both {both['median']:.3f}, iteration {whole['median']:.3f}")
    print("\n".join(verdicts("scoring", found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the critic costs: iterations of DDPO and of ours with frozen taps, values alone and the whole recipe, in turns.

    python -m benchmarks.critic_cost [--recipe shapes-unet] [--pairs 12]

All do the same images, denoising steps and policy updates in one process. `values` asks the critic at every state and
trains it on them; `recipe` does what the recipe says besides: takes the values' gradient by the latents at every step,
and learns from remembered images, each state of which costs a forward.
"""

import argparse
import sys
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
from latentac.config.schema import Config
from latentac.evaluation.measures import median
from latentac.rewards.configured import load_rewards
from latentac.runs.configuration import resolve_recipe
from latentac.runs.preparation.prepare import environment
from latentac.sampling.devices import pick_device
from latentac.system.progress import progress
from latentac.training import value_pretraining as pretraining
from latentac.training.algorithms import ALGORITHMS
from latentac.training.distributed import Mesh
from latentac.training.policy_learning import Block, CreditedBlock
from latentac.training.trainer import Rollouts, Trainer
from latentac.worlds.prompts import load_prompts

Given = TypeVar("Given")
Result = TypeVar("Result")

_BOOTSTRAP = 2000
_ARMS = {
    "DDPO": ["algorithm.use=ddpo"],
    "values": [
        *("algorithm.use=ppo", "critic.body.use=frozen_taps"),
        *("algorithm.value_gradient=0", "critic.replay_images=0"),
    ],
    "recipe": ["algorithm.use=ppo", "critic.body.use=frozen_taps"],
}


class Timed(Trainer):
    """An iteration's seconds by part. On a CPU they are the processor's, so what else runs does not count."""

    policy_seconds = 0.0
    rollout_seconds: list[float]

    def seconds(self) -> dict[str, float]:
        """Of one more iteration: rollout and scoring, policy updates, critic updates and credit, and all."""
        began = self.clock()
        self.policy_seconds, self.rollout_seconds = 0.0, []
        self.iterate()
        total, rollouts = self.clock() - began, sum(self.rollout_seconds)
        rest = total - rollouts - self.policy_seconds
        return {"rollout": rollouts, "actor": self.policy_seconds, "critic": rest, "all": total}

    def clock(self) -> float:
        if self.mesh.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.mesh.device)
        return time.perf_counter()

    def _roll_out(self, index: int) -> Rollouts:
        return self._timed(super()._roll_out, index)

    def _score(self, made: Rollouts) -> Block:
        return self._timed(super()._score, made)

    def _timed(self, work: Callable[[Given], Result], given: Given) -> Result:
        clock = time.thread_time if self.mesh.device.type == "cpu" else self.clock  # on a CPU, one thread per block
        began = clock()
        result = work(given)
        self.rollout_seconds.append(clock() - began)
        return result

    def _update_policy(self, blocks: Sequence[CreditedBlock], update: int) -> dict[str, float]:
        began = self.clock()
        metrics = super()._update_policy(blocks, update)
        self.policy_seconds += self.clock() - began
        return metrics


def measure(recipe: str, overrides: Sequence[str], pairs: int) -> dict[str, Any]:
    """The record of `pairs` iterations of each arm, after one that does not count. ratio, recipe_ratio: of `values` and
    of `recipe` to DDPO, turn by turn."""
    trainers = {name: _trainer(resolve_recipe(recipe, "", [*overrides, *own])) for name, own in _ARMS.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in _ARMS}
    with progress(pairs + 1, "critic cost", "pairs") as bar:
        for pair in range(pairs + 1):
            for name in list(_ARMS)[:: 1 if pair % 2 else -1]:  # none is always the first
                rows[name].append(trainers[name].seconds())
            bar.update()
    whole = {name: np.array([row["all"] for row in found[1:]]) for name, found in rows.items()}
    config = trainers["values"].config
    parts = ("rollout", "actor", "critic", "all")
    found = environment()
    return {
        "experiment": "cost",
        "recipe": recipe,
        "command": "make bench-critic" + ("" if recipe == "shapes-unet" else f" RECIPE={recipe}"),
        "commits": [found["commit"]],
        "machines": [found["machine"]],
        "images": config.train.images_per_iteration,
        "steps": config.kernel.num_steps,
        "updates": config.train.updates_per_iteration,
        "ratio": median(whole["values"] / whole["DDPO"], _BOOTSTRAP, 0),
        "recipe_ratio": median(whole["recipe"] / whole["DDPO"], _BOOTSTRAP, 0),
        "seconds": {
            name: {part: float(np.median([row[part] for row in each[1:]])) for part in parts}
            for name, each in rows.items()
        },
    }


def _trainer(config: Config) -> Timed:
    device = pick_device(config.backbone.device)
    policy = base_policy(config, device)
    critic = pretraining.new_critic(config, policy).to(device)
    policy.backbone.adapt(config.policy)
    rewards = load_rewards(config.rewards)
    weights = torch.tensor([reward.weight for reward in config.rewards])
    prompts = load_prompts(config.prompts.source).train
    algorithm = ALGORITHMS.make(config.algorithm, weights)
    return Timed(config, policy, critic, algorithm, rewards, prompts, mesh=Mesh.single(device))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.critic_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="shapes-unet")
    parser.add_argument("--pairs", type=int, default=12, help="iterations of each arm")
    parser.add_argument("--set", action="append", default=[], help="path=value over the recipe")
    parser.add_argument("--output", type=Path, default=FULL.results, help="folder of cost-<recipe>.json")
    options = parser.parse_args(arguments)
    require_clean_tree(options.output)
    torch.set_num_threads(1)
    found = measure(options.recipe, ["train.num_workers=1", *options.set], options.pairs)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"cost-{options.recipe}.json"
    path.write_text(dump(found))
    for name, parts in found["seconds"].items():
        print(f"{name:6}", *(f"{part} {value:6.2f} s" for part, value in parts.items()), sep="  ")
    for name, key in (("values", "ratio"), ("recipe", "recipe_ratio")):
        ratio = found[key]
        print(f"{name} / DDPO: {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}], {ratio['n']} pairs")
    print("\n".join(verdicts("cost", found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

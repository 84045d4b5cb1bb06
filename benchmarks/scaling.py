"""Whether two workers on two cores do twice the images of one worker on one core.

    python -m benchmarks.scaling [--recipe shapes-unet] [--rounds 6]

One worker has a core of its own, and two workers of another training have the same core and a second one. They do
whole iterations (rollout, reward, updates of policy and critic) in turns, so whatever else runs on the machine meets
both alike. The two exchange gradients over gloo on loopback. After the measurement the program prints the tables of
`benchmarks.fleet`, which predict many GPUs.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from benchmarks import fleet
from benchmarks.aggregate import dump
from benchmarks.claims import verdicts
from benchmarks.plan import FULL, ROOT, require_clean_tree
from benchmarks.unit import base_policy
from latentac.evaluation.measures import median
from latentac.rewards.configured import load_rewards
from latentac.runs.configuration import resolve_recipe
from latentac.runs.preparation.prepare import environment
from latentac.system.lifetime import die_with_parent
from latentac.system.progress import progress
from latentac.training.distributed import Mesh
from latentac.training.trainer import new_trainer
from latentac.training.value_pretraining import new_critic
from latentac.worlds.prompts import load_prompts

_BOOTSTRAP = 2000
_DEFAULTS: dict[str, Any] = {"RECIPE": "shapes-unet", "ROUNDS": 6}


class Worker:
    """A process that trains on one core, an iteration at a time."""

    def __init__(self, recipe: str, overrides: Sequence[str], core: int, rank: int, size: int, port: int) -> None:
        mesh = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scaling", "--worker", str(core), recipe, *overrides],
            cwd=ROOT,
            env={**os.environ, **mesh, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.core = core

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def begin(self) -> None:
        """Ask for an iteration."""
        assert self._process.stdin is not None
        self._process.stdin.write("iterate\n")
        self._process.stdin.flush()

    def entry(self) -> dict[str, Any]:
        """Wait until it is done: its entry in the history. Raises RuntimeError where the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker on core {self.core} ended with {self._process.wait()}: see its messages")
        found: dict[str, Any] = json.loads(line)
        return found


def measure(recipe: str, overrides: Sequence[str], rounds: int) -> dict[str, Any]:
    """The record. The first iteration of each training does not count. Raises RuntimeError with less than two cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError(f"two cores are needed, and this process may use {len(cores)}")
    trainings = {"one": [(cores[0], 0, 1)], "two": [(cores[0], 0, 2), (cores[1], 1, 2)]}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    first_rewards: dict[str, float] = {}
    with ExitStack() as stack, progress(2 * (rounds + 1), "scaling", "iterations") as bar:
        workers = {}
        for name, places in trainings.items():
            port = _free_port()
            workers[name] = [stack.enter_context(Worker(recipe, overrides, *place, port)) for place in places]
        for number in range(rounds + 1):
            for name in list(trainings)[:: 1 if number % 2 else -1]:
                for worker in workers[name]:
                    worker.begin()
                entries = [worker.entry() for worker in workers[name]]
                bar.update()
                if number == 0:
                    first_rewards[name] = entries[0]["reward_mean"]
                else:
                    seconds[name].append(max(entry["seconds"] for entry in entries))
    if first_rewards["one"] != first_rewards["two"]:
        raise RuntimeError(f"one worker and two have other images: mean rewards {first_rewards}")
    config, found = resolve_recipe(recipe, "", overrides), environment()
    one, two = (np.array(seconds[name]) for name in trainings)
    return {
        "experiment": "scaling",
        "recipe": recipe,
        "command": _command(RECIPE=recipe, ROUNDS=rounds),
        "commits": [found["commit"]],
        "machines": [found["machine"]],
        "images": config.train.images_per_iteration,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "speedup": median(one / two, _BOOTSTRAP, 0),
    }


def work(core: int, recipe: str, overrides: Sequence[str]) -> None:
    """One worker: an iteration per line of stdin, and its entry as a line of JSON."""
    die_with_parent()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    mesh = Mesh.join("cpu")
    config = resolve_recipe(recipe, "", overrides)
    policy = base_policy(config, mesh.device)
    critic = new_critic(config, policy)
    prompts = load_prompts(config.prompts.source).train
    trainer = new_trainer(config, policy, critic, load_rewards(config.rewards), prompts, mesh=mesh)
    for _ in sys.stdin:
        print(json.dumps(trainer.iterate()), flush=True)
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _command(**options: object) -> str:
    """What makes this record."""
    return " ".join(["make bench-scaling", *(f"{n}={v}" for n, v in options.items() if v != _DEFAULTS[n])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default=_DEFAULTS["RECIPE"])
    parser.add_argument(
        "--rounds", type=int, default=_DEFAULTS["ROUNDS"], help="iterations of each training that count"
    )
    parser.add_argument("--set", action="append", default=[], help="path=value over the recipe")
    parser.add_argument("--output", type=Path, default=FULL.results, help="folder of scaling-<recipe>.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        core, recipe, *overrides = options.worker
        work(int(core), recipe, overrides)
        return 0
    require_clean_tree(options.output)
    found = measure(options.recipe, options.set, options.rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"scaling-{options.recipe}.json").write_text(dump(found))
    for name, seconds in found["seconds"].items():
        print(f"{name:<4} worker(s): {found['images'] / seconds:.1f} images per second, {seconds:.2f} s per iteration")
    speedup = found["speedup"]
    print(
        f"two workers do {speedup['median']:.3f} [{speedup['low']:.3f}, {speedup['high']:.3f}] times the images of one"
    )
    print("\n".join(verdicts("scaling", found)), end="\n\n")
    return fleet.main()


if __name__ == "__main__":
    sys.exit(main())

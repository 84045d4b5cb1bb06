"""What the endpoint costs and gains: batching against one by one, the way through HTTP, and probes under load.

    python -m benchmarks.serving [--recipe shapes-unet] [--rounds 6]

Two servers of one model run beside each other, and take turns: one puts images together, the other draws each by
itself; both have a worker a core. The critic is not trained: its values cost what a trained one's do.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.aggregate import dump
from benchmarks.claims import verdicts
from benchmarks.plan import FULL, require_clean_tree
from benchmarks.unit import base_policy
from latentac.config.schema import Config
from latentac.evaluation.measures import median
from latentac.runs.configuration import resolve_recipe
from latentac.runs.preparation.prepare import environment
from latentac.runs.resolution import resolve_all
from latentac.sampling.rollout import rollout
from latentac.serving.client import Client
from latentac.serving.exported import add_base, export
from latentac.serving.generator import Generator
from latentac.serving.process import ServerProcess
from latentac.system.progress import progress
from latentac.training import value_pretraining as pretraining
from latentac.worlds.builtin import builtin_pipeline

CALLERS = 8
_BOOTSTRAP = 2000
_PROBE_SECONDS = 0.02
_READY_SECONDS = 240.0
_METHODS: dict[str, dict[str, Any]] = {"none": {"method": "none"}, "value_gradient": {"method": "value_gradient"}}


def export_base(config: Config, folder: Path, **serving: Any) -> Path:
    """The pretrained pipeline of a recipe with a new critic, as `deploy` exports a trained one."""
    source = builtin_pipeline(config.backbone.source)
    shutil.copytree(source, folder)
    torch.manual_seed(0)
    critic = pretraining.new_critic(config, base_policy(config, torch.device("cpu")))
    torch.nn.init.normal_(critic.heads.weight, std=0.1)
    critic.save(folder / "critic")
    add_base(folder, source)
    settings = config.serving.model_copy(update=serving)
    resolved = resolve_all(config.model_copy(update={"serving": settings}).model_dump())
    export(folder, resolved.config, run="bench", version="bench", extensions=resolved.described())
    return folder


class Probes:
    """Asks for a server's liveness from entering to leaving; `seconds` of each answer."""

    def __init__(self, server: ServerProcess) -> None:
        self._client, self._ended = Client(server.address, server.name), threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.seconds: list[float] = []

    def __enter__(self) -> "Probes":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._ended.wait(_PROBE_SECONDS):
            began = time.monotonic()
            status, _ = self._client.ask("GET", "/v2/health/live", None, 60.0)
            self.seconds.append(time.monotonic() - began)
            if status != 200:
                raise RuntimeError(f"a probe answered {status}")


def rate(server: ServerProcess, fields: dict[str, Any], seed: int, requests: int) -> float:
    """Images per second, with CALLERS requests under way at any time."""
    began = time.monotonic()
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda i: server.predict(fields | {"seed": seed + i}), range(requests)))
    return requests / (time.monotonic() - began)


def alone(
    server: ServerProcess, generator: Generator, fields: dict[str, Any], seed: int, requests: int
) -> dict[str, float]:
    """Median seconds per image with one request under way: served, drawn in this process, and drawn here by the loop
    alone in a batch of one, without values."""
    spent: dict[str, list[float]] = {"served": [], "drawn": [], "bare": []}
    policy, steps = generator.policy("trained"), generator.exported.kernel.num_steps
    for turn in range(requests):
        began = time.monotonic()
        server.predict(fields | {"seed": seed + turn})
        spent["served"].append(time.monotonic() - began)
        began = time.monotonic()
        generator.generate(seed=seed + turn, **fields)
        spent["drawn"].append(time.monotonic() - began)
        began = time.monotonic()
        noise = torch.randn(1, steps + 1, *policy.backbone.latent_shape)
        conditioning = policy.backbone.encode([fields["prompt"]])
        policy.backbone.decode(rollout(policy, None, conditioning, noise).clean)
        spent["bare"].append(time.monotonic() - began)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def measure(recipe: str, rounds: int, requests: int, alone_requests: int) -> dict[str, Any]:
    """The record. throughput: the ratio of batched to one by one, round by round, a method; probes: seconds."""
    config = resolve_recipe(recipe, "", [])
    rates: dict[str, dict[str, list[float]]] = {name: {"batched": [], "single": []} for name in _METHODS}
    alones: list[dict[str, float]] = []
    probes: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_base(config, Path(temporary) / "batched")
        single = export_base(config, Path(temporary) / "single", batch_rows=1, batch_wait_seconds=0.0)
        generator = Generator(folder, torch.device("cpu"))
        with (
            ServerProcess(folder, ready_seconds=_READY_SECONDS) as together,
            ServerProcess(single, ready_seconds=_READY_SECONDS) as apart,
            progress(rounds + 1, "serving", "rounds") as bar,
        ):
            for turn in range(rounds + 1):
                for name, fields in _METHODS.items():
                    asked = {"prompt": "two red squares", **fields}
                    for kind in ("batched", "single") if turn % 2 else ("single", "batched"):
                        server = together if kind == "batched" else apart
                        with Probes(server) as watched:
                            speed = rate(server, asked, 1000 * turn, requests)
                        if turn:  # the first round only warms
                            rates[name][kind].append(speed)
                            probes += watched.seconds if kind == "batched" else []
                if turn:
                    plain = {"prompt": "two red squares", "method": "none"}
                    alones.append(alone(together, generator, plain, 1000 * turn, alone_requests))
                bar.update()
    found = environment()
    throughput = {
        name: median(np.array(each["batched"]) / np.array(each["single"]), _BOOTSTRAP, 0)
        for name, each in rates.items()
    }
    return {
        "experiment": "serving",
        "recipe": recipe,
        "command": "make bench-serving" + ("" if recipe == "shapes-unet" else f" RECIPE={recipe}"),
        "commits": [found["commit"]],
        "machines": [found["machine"]],
        "callers": CALLERS,
        "batch_rows": config.serving.batch_rows,
        "steps": config.kernel.num_steps,
        "throughput": throughput,
        "rates": {name: {kind: statistics.median(each) for kind, each in both.items()} for name, both in rates.items()},
        "alone": {name: statistics.median([one[name] for one in alones]) for name in alones[0]},
        "overhead": median(np.array([one["served"] / one["drawn"] for one in alones]), _BOOTSTRAP, 0),
        "probes": {
            "n": len(probes),
            "median": statistics.median(probes),
            "p99": float(np.quantile(probes, 0.99)),
            "max": max(probes),
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="shapes-unet")
    parser.add_argument("--rounds", type=int, default=6, help="turns of both servers")
    parser.add_argument("--requests", type=int, default=64, help="of a turn")
    parser.add_argument("--alone", type=int, default=24, help="of a turn with one caller")
    parser.add_argument("--output", type=Path, default=FULL.results, help="folder of serving-<recipe>.json")
    options = parser.parse_args(arguments)
    require_clean_tree(options.output)
    torch.set_num_threads(1)
    found = measure(options.recipe, options.rounds, options.requests, options.alone)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"serving-{options.recipe}.json"
    path.write_text(dump(found))
    print(json.dumps({name: found[name] for name in ("rates", "alone", "probes")}, indent=2))
    for name, ratio in (*found["throughput"].items(), ("overhead of a request", found["overhead"])):
        print(f"{name}: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}], {ratio['n']} rounds")
    print("\n".join(verdicts("serving", found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

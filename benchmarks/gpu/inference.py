"""What steering costs on a model, and how many images per second its endpoint's generator makes."""

import os
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.budget import Budget, OverBudget, say
from benchmarks.gpu.flops import clock
from benchmarks.gpu.turns import Record
from latentac.config.schema import Config
from latentac.method.randomness import noise_for
from latentac.runs.resolution import resolve_all
from latentac.sampling.rollout import rollout
from latentac.sampling.steering import STEERING
from latentac.sampling.steering.run import SteeringRun
from latentac.serving.exported import export
from latentac.serving.generator import Generator
from latentac.training.experiment import load_policy
from latentac.training.value_pretraining import new_critic

PARTICLES = 4
_TURNS = 2
_PROMPT = "a lighthouse in the rain"


def measure(config: Config, device: torch.device, folder: Path, budget: Budget) -> Record:
    """{endpoint, steering, note}, as far as the time of the present part of `budget` suffices."""
    found: Record = {"rows": config.train.block_images, "endpoint": None, "steering": None, "note": ""}
    try:
        generator = Generator(_exported(config, folder), device)
        found["endpoint"] = endpoint(generator, config.serving.batch_rows, device)
        say(f"        endpoint: {found['endpoint']['batched']:.2f} images per second, batched")
        found["steering"] = steering(generator, config, device)
    except OverBudget as stopped:
        found["note"] = str(stopped)
    except torch.OutOfMemoryError:
        found["note"] = f"out of memory with {found['rows']} rows"
    return found


def endpoint(generator: Generator, rows: int, device: torch.device) -> Record:
    """Images per second: of requests that fill a batch, and of one image at a time."""
    found = {}
    for name, count in (("batched", rows), ("single", 1)):
        batching = generator.exported.batching.model_copy(update={"batch_rows": count})
        generator.exported = generator.exported.model_copy(update={"batching": batching})
        seconds = _median(partial(generator.generate, _PROMPT, 0, count, method="none"), device)
        found[name] = count / seconds
    return found


def steering(generator: Generator, config: Config, device: torch.device) -> Record:
    """Seconds of a rollout per row, plain; how many times that a particle of resampling takes, which asks the critic at
    every step; and how many forwards a gradient step takes beside its own."""
    policy, critic, steps = generator.policy("trained"), generator.critic, config.kernel.num_steps
    rows = config.train.block_images
    noise = noise_for([(row,) for row in range(rows)], 0, steps, policy.backbone.latent_shape).to(device)
    conditioning = policy.backbone.encode([_PROMPT] * rows)

    def seconds(method: str, particles: int) -> float:
        extension = next(one for one in config.steering.methods if one.use == method)
        whole = extension.with_own({**extension.own, "start": 0.0, "stop": 1.0})
        made = STEERING.make(whole, torch.ones(1, device=device), particles)
        uniforms = torch.full((rows // particles, steps), 0.5, device=device)

        def steered() -> None:
            rollout(policy, critic, conditioning, noise, steering=SteeringRun(made, uniforms))

        return _median(steered, device)

    plain = _median(partial(rollout, policy, None, conditioning, noise), device)
    particle, gradient = seconds("resampling", PARTICLES), seconds("value_gradient", 1)
    say(f"        steering: a particle {particle / plain:.2f}, a gradient step {(gradient - plain) / plain:.2f}")
    return {
        "plain_seconds": plain / rows,
        "particle": particle / plain,
        "gradient_forwards": (gradient - plain) / plain,
    }


def _median(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of `work`, after a time that does not count."""
    work()
    taken = []
    for _ in range(_TURNS):
        began = clock(device)
        work()
        taken.append(clock(device) - began)
    return statistics.median(taken)


def _exported(config: Config, folder: Path) -> Path:
    """The base pipeline with a new critic, as `deploy` exports a trained one. Its files are links to the base's."""
    shutil.copytree(config.backbone.source, folder, copy_function=os.link)
    torch.manual_seed(0)
    critic = new_critic(config, load_policy(config))
    torch.nn.init.normal_(critic.heads.weight, std=0.1)
    critic.save(folder / "critic")
    resolved = resolve_all(config.model_dump())
    export(folder, resolved.config, run="bench", version="bench", extensions=resolved.described())
    return folder

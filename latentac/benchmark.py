"""The steering benchmark: reward against the number of function evaluations, at the same prompts and seeds."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from latentac.config import Config
from latentac.critic import Critic
from latentac.evaluation import Arm, gallery, sample
from latentac.measures import interval
from latentac.policy import Policy
from latentac.progress import progress
from latentac.prompts import Prompt, balanced
from latentac.rewards import Reward
from latentac.steering import STEERING, Steering, evaluations, make_steering


def arms(config: Config) -> list[tuple[str, float, int, Steering]]:
    """(method, strength, candidates, steering) of each arm; every head counts by its reward's weight.

    The value gradient alone at each of `gradient_strengths`; at its own strength each method with each number of
    candidates, but those that take gradients not with the highest, which cost three times as much.
    """
    settings = config.steering
    alone = [(strength, _steering(config, "value_gradient", strength, 1)) for strength in settings.gradient_strengths]
    found = [("value_gradient", strength, 1, steering) for strength, steering in alone]
    for method in STEERING:
        for candidates in settings.candidates:
            strength = settings.strengths.of(method)
            steering = _steering(config, method, strength, candidates)
            if candidates < max(settings.candidates) or not steering.needs_gradient:
                found.append((method, strength, candidates, steering))
    return found


def _steering(config: Config, method: str, strength: float, candidates: int) -> Steering:
    weights = torch.tensor([reward.weight for reward in config.rewards])
    return make_steering(method, strength * weights, candidates, config.steering.schedule)


def run_benchmark(
    config: Config, policy: Policy, critic: Critic, rewards: Sequence[Reward], prompts: Sequence[Prompt]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, one an arm and reward, and a gallery.

    A row is {method, strength, candidates, nfe, reward, mean, low, high, n, seconds}. nfe counts forwards of the
    denoiser an image, a backward as 2; seconds are wall time for all n images, decoding and scoring included. The
    gallery shows the value gradient at its own strength on the prompts and noise of `compare`.
    """
    evaluation = config.evaluation
    chosen = [prompts[i].text for i in balanced(prompts, evaluation.num_images, config.seed, "evaluation")]
    texts, shown = chosen[: config.steering.num_images], chosen[: evaluation.num_gallery_prompts]
    steered = _steering(config, "value_gradient", config.steering.strengths.value_gradient, 1)
    seed, steps, found, rows = config.seed, config.kernel.num_steps, arms(config), []
    # What an arm costs goes by its evaluations, so these are the unit: pictures would promise a wrong end.
    costs = [evaluations(steering, steps) for *_, steering in found]
    shown_cost = evaluations(steered, steps)
    with progress(sum(costs) * len(texts) + shown_cost * len(shown), "steer", "evaluations") as bar:
        for number, ((method, strength, candidates, steering), cost) in enumerate(zip(found, costs, strict=True), 1):
            label = f"{method} {strength:g}" if candidates == 1 else f"{method} {candidates}"
            bar.begin(f"arm {number} of {len(found)}: {label}")
            started = time.monotonic()
            arm = sample(policy, critic, rewards, texts, seed, steps, steering=steering, bar=bar, units=cost)
            rows += _rows(config, arm, time.monotonic() - started, method, strength, candidates, steering)
        bar.begin("gallery")
        arm = sample(policy, critic, rewards, shown, seed, steps, steering=steered, bar=bar, units=shown_cost)
    return rows, gallery(config, shown, {"steered": arm})


def _rows(
    config: Config, arm: Arm, seconds: float, method: str, strength: float, candidates: int, steering: Steering
) -> list[dict[str, Any]]:
    # At strength 0 the gradient changes nothing: a plain rollout gives the same pictures for K forwards.
    acts = not (method == "value_gradient" and strength == 0)
    return [
        {
            "method": method,
            "strength": strength,
            "candidates": candidates,
            "nfe": evaluations(steering if acts else None, config.kernel.num_steps),
            "reward": name,
            **interval(arm.scores.column(name).numpy(), config.evaluation.num_bootstrap, config.seed),
            "seconds": seconds,
        }
        for name in arm.scores.names
    ]

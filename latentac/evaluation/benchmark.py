"""The steering benchmark: reward against the number of function evaluations, at the same prompts and seeds."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latentac.config import schema
from latentac.critic import Critic
from latentac.evaluation.arms import best_steered
from latentac.evaluation.held_out import Arm, Sampling, gallery, sample
from latentac.evaluation.measures import interval
from latentac.rewards.configured import ConfiguredReward
from latentac.sampling.policy import Policy
from latentac.sampling.steering import STEERING, Steering, evaluations
from latentac.system.names import PLAIN
from latentac.system.progress import progress
from latentac.worlds.prompts import Prompt, balanced


@dataclass(frozen=True)
class Plan:
    """One arm. method: its configured name, or `none`; particles: rollouts per image; steering: None where plain."""

    method: str
    strength: float
    particles: int
    steering: Steering | None

    @property
    def label(self) -> str:
        if self.steering is None:
            return "plain"
        return f"{self.method} {self.strength:g}" if self.particles == 1 else f"{self.method} {self.particles}"


def arms(settings: schema.Steering, reward_weights: Sequence[float]) -> list[Plan]:
    """Plain sampling, then of each configured method its `sweep` of strengths with one particle, and its own strength
    with each of `sweep_particles`. Every head counts by its reward's weight."""
    weights = torch.tensor(reward_weights)
    plans = [Plan(PLAIN, 0.0, 1, None)]
    for place, method in enumerate(settings.methods):
        own: Any = STEERING.settings(method, f"steering.methods.{place}")
        wanted = [(float(strength), 1) for strength in own.sweep]
        wanted += [(own.strength, particles) for particles in own.sweep_particles]
        for strength, particles in wanted:
            plans.append(Plan(method.name, strength, particles, STEERING.make(method, strength * weights, particles)))
    return plans


def run_benchmark(
    settings: schema.Evaluation,
    steering: schema.Steering,
    sampling: Sampling,
    policy: Policy,
    critic: Critic,
    rewards: Sequence[ConfiguredReward],
    *,
    prompts: Sequence[Prompt],
    main_reward: str,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row per arm and reward, and a gallery.

    A row is {method, strength, particles, nfe, reward, mean, low, high, n, seconds}. nfe counts forwards of the
    denoiser per image, a backward as 2; seconds are wall time for all n images, decoding and scoring included. The
    gallery shows the arm that was best by the main reward, on the prompts and noise of `compare`.
    """
    chosen = [prompts[i] for i in balanced(prompts, settings.num_images, sampling.seed, "evaluation")]
    wanted, shown = chosen[: steering.num_images], chosen[: settings.num_gallery_prompts]
    rows: list[dict[str, Any]] = []
    plans = arms(steering, [reward.weight for reward in rewards])
    # What an arm costs goes by its evaluations, so these are the unit: images would promise a wrong end. Which arm
    # the gallery shows is not known yet: it counts as the dearest.
    costs = [evaluations(plan.steering, sampling.num_steps) for plan in plans]
    with progress(sum(costs) * len(wanted) + max(costs) * len(shown), "steer", "evaluations") as bar:
        for number, (plan, cost) in enumerate(zip(plans, costs, strict=True), 1):
            bar.begin(f"arm {number} of {len(plans)}: {plan.label}")
            started = time.monotonic()
            arm = sample(policy, critic, rewards, wanted, sampling, steering=plan.steering, bar=bar, units=cost)
            measured = {"nfe": cost, "seconds": time.monotonic() - started}
            rows += _rows(arm, plan, measured, settings.num_bootstrap, sampling.seed)
        best = best_steered(rows, main_reward)
        wanted_arm = (best["method"], best["strength"], best["particles"]) if best else None
        shown_arm = next((p.steering for p in plans if (p.method, p.strength, p.particles) == wanted_arm), None)
        bar.begin("gallery")
        arm = sample(policy, critic, rewards, shown, sampling, steering=shown_arm, bar=bar, units=max(costs))
    return rows, gallery(sampling.seed, [prompt.text for prompt in shown], {"steered": arm})


def _rows(arm: Arm, plan: Plan, measured: dict[str, Any], num_bootstrap: int, seed: int) -> list[dict[str, Any]]:
    return [
        {
            "method": plan.method,
            "strength": plan.strength,
            "particles": plan.particles,
            "nfe": measured["nfe"],
            "reward": name,
            **interval(arm.scores.column(name).numpy(), num_bootstrap, seed),
            "seconds": measured["seconds"],
        }
        for name in arm.scores.names
    ]

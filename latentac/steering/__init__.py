"""Steering: the critic changes how a policy samples. One file a method, one row here.

A method may move each transition (`guide`), and may choose among several rollouts of an image (`select`).
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import Tensor

from latentac.diffusion import GaussianTransition


@dataclass(frozen=True)
class SteeringState:
    """One step of a rollout, before the next latents are drawn.

    latents: [B, *latent], a leaf that requires grad where the method needs gradients
    transition: the policy's own      values: [B, M], standardised, with the graph to `latents` where it is needed
    """

    step: int
    latents: Tensor
    transition: GaussianTransition
    values: Tensor


class Steering(Protocol):
    """Built as `Class(weights, candidates)`. candidates: rollouts an image; needs_gradient: whether `guide` takes the
    values' gradient by the latents."""

    candidates: int
    needs_gradient: bool

    def guide(self, state: SteeringState) -> GaussianTransition:
        """The transition to draw the next latents from."""
        ...

    def select(self, values: Tensor) -> Tensor:
        """Which candidate each image keeps. values: [B, N, M] at the last denoised state. Returns int64 [B]."""
        ...


STEERING = {
    "value_gradient": "latentac.steering.value_gradient:ValueGradient",
    "best_of_n": "latentac.steering.best_of_n:BestOfN",
}


def make_steering(name: str, weights: Tensor, candidates: int = 1) -> Steering:
    """The method `name`, a row of the table or `module:Class`, built as `Class(weights, candidates)`.

    weights: [M], how much each reward's head counts, in standard deviations of that reward.
    """
    module, _, attribute = STEERING.get(name, name).partition(":")
    steering: Steering = getattr(import_module(module), attribute)(weights, candidates)
    return steering


def evaluations(steering: Steering | None, num_steps: int) -> int:
    """NFE an image: a forward counts 1 and a backward 2, for every step of every candidate."""
    if steering is None:
        return num_steps
    return num_steps * steering.candidates * (3 if steering.needs_gradient else 1)

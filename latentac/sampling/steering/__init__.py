"""Steering: the critic changes how a policy samples, towards p(x) exp(sum_m w_m V_m).

One file per method, one row here.

An image has N particles, which are consecutive rows of a rollout. A method may move each transition
(`propose`), may replace particles by copies of others (`resample`), and chooses one at the end (`select`).
"""

import math
from dataclasses import dataclass
from typing import Protocol, Self

from pydantic import model_validator
from torch import Tensor

from latentac.config.extensions import Settings, Table
from latentac.config.sections import Fraction, Positive, Rate
from latentac.method.diffusion import GaussianTransition


class SteeringSettings(Settings):
    """The settings of every steering method. The `Settings` of a class derive from this."""

    strength: Rate = 1.0
    """Factor on the steering weights, in standard deviations of each reward."""
    particles: Positive = 4
    """Rollouts per image if a request does not say."""
    start: Fraction = 0.3
    """First step at which the method acts, as a share of the steps: it acts if k / K >= start, for step k of K."""
    stop: Fraction = 0.8
    """Share of the steps after which the method no longer acts: it acts only if k / K < stop."""
    sweep_particles: list[Positive] = [2, 4, 8]
    """Numbers of particles. The benchmark has one arm for each, with this strength."""
    sweep: list[Rate] = []
    """Strengths. The benchmark has one arm for each, with one particle."""

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if self.start >= self.stop:
            raise ValueError(f"start = {self.start:g} is not before stop = {self.stop:g}, so it would never act")
        return self

    def steps(self, num_steps: int) -> range:
        """The steps k with start <= k / K < stop."""
        return range(math.ceil(self.start * num_steps - 1e-9), math.ceil(self.stop * num_steps - 1e-9))


@dataclass(frozen=True)
class SteeringState:
    """One step of a rollout, before the next latents are drawn. B images, N particles each.

    latents: [B N, *latent], a leaf that requires grad where the method needs gradients
    transition: the policy's own      values: [B N, M], standardised, with the graph to `latents` where it is needed
    """

    step: int
    latents: Tensor
    transition: GaussianTransition
    values: Tensor


class SteeredRollout:
    """A method applied to one rollout; it may keep state from step to step. This one changes nothing.

    At each step of `Steering.steps` the rollout calls `propose`, then `resample`, draws, and calls `moved`.
    """

    def propose(self, state: SteeringState) -> GaussianTransition:
        """The proposal: the transition to draw the next latents from."""
        return state.transition

    def resample(self, state: SteeringState) -> Tensor | None:
        """Which rows continue, int64 [B N]. The rows of an image are chosen among its own rows. None keeps all."""
        return None

    def moved(self, transition: GaussianTransition, proposal: GaussianTransition, next_latents: Tensor) -> None:
        """Called with the latents that were drawn from `proposal`, where the policy has `transition`."""


class Steering(Protocol):
    """Built as `Class(settings, weights, particles)` with `SteeringSettings`. Several threads use the same object.

    weights: [M], how much each reward's head counts, in standard deviations of that reward, or [B, M], a row per image.
    particles: rollouts per image; needs_gradient: whether `propose` takes the values' gradient by the latents.
    summary: what it does, in a few words, for a person who chooses among methods.
    """

    summary: str
    particles: int
    needs_gradient: bool

    def steps(self, num_steps: int) -> range:
        """The steps of a rollout at which the method acts; at the others the rollout is a plain one."""
        ...

    def begin(self, uniforms: Tensor) -> SteeredRollout:
        """The method applied to one rollout of B images. uniforms: [B, K] from U(0, 1), one for each time that an
        image may be resampled."""
        ...

    def select(self, values: Tensor) -> Tensor:
        """Which particle each image keeps. values: [B, N, M], standardised, at the last denoised state. int64 [B]."""
        ...


STEERING = Table(
    "method of steering",
    {
        "value_gradient": "latentac.sampling.steering.value_gradient:ValueGradient",
        "best_of_n": "latentac.sampling.steering.best_of_n:BestOfN",
        "resampling": "latentac.sampling.steering.resampling:Resampling",
        "twisted": "latentac.sampling.steering.twisted:Twisted",
        "svdd": "latentac.sampling.steering.svdd:SVDD",
    },
)


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """[B N], psi = sum_m w_m V_m of each row of values [B N, M]; weights: [M], or [B, M], each for N rows."""
    return (values * per_row(weights, len(values))).sum(-1)


def per_row(weights: Tensor, rows: int) -> Tensor:
    """[M] as it is, or [B N, M]: the weights of each of `rows` = B N rows."""
    return weights if weights.ndim == 1 else weights.repeat_interleave(rows // len(weights), 0)


def evaluations(steering: Steering | None, num_steps: int, guided: bool = False) -> int:
    """NFE an image: for every step of every particle a forward counts 1, and a backward, where there is one, 2; with
    classifier-free guidance each of them twice."""
    forwards = num_steps
    if steering is not None:
        gradients = len(steering.steps(num_steps)) if steering.needs_gradient else 0
        forwards = steering.particles * (num_steps + 2 * gradients)
    return forwards * (2 if guided else 1)

"""Soft value-based decoding with the critic: several particles at each step, of which the best one is continued."""

import torch
from torch import Tensor

from latentac.sampling.steering import SteeredRollout, SteeringState, weighted
from latentac.sampling.steering.best_of_n import BestOfN


class SVDD(BestOfN):
    """At each step, an image's N particles are compared by sum_m w_m V_m, and all continue from the best one (Li et al.
    2024, in the limit of temperature 0)."""

    summary = "at each step, all particles continue from the best one"

    def begin(self, uniforms: Tensor) -> SteeredRollout:
        return Greedy(self.weights, self.particles)


class Greedy(SteeredRollout):
    def __init__(self, weights: Tensor, particles: int) -> None:
        self.weights, self.particles = weights, particles

    def resample(self, state: SteeringState) -> Tensor | None:
        psi = weighted(state.values.detach(), self.weights)
        best = psi.unflatten(0, (-1, self.particles)).argmax(1)
        first = torch.arange(len(best), device=best.device) * self.particles
        return (first + best).repeat_interleave(self.particles)

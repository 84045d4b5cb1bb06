"""Value-gradient steering: each mean moves uphill on the critic."""

import torch
from torch import Tensor

from latentac.diffusion import GaussianTransition, broadcast
from latentac.steering import Guide, SteeringState, weighted
from latentac.steering.best_of_n import BestOfN


class ValueGradient(BestOfN):
    """mean <- mean + std^2 grad_z sum_m w_m V_m(z_t, t, y) (arXiv 2605.27736; Dhariwal and Nichol 2021, algorithm 1).

    It is the first-order tilt of the transition towards p(z') exp(sum_m w_m V_m); 0 leaves the rollout bitwise as it
    was. Of several candidates the one with the highest value is kept.
    """

    needs_gradient = True

    def __init__(self, weights: Tensor, candidates: int = 1) -> None:
        super().__init__(weights, candidates)

    def begin(self, uniforms: Tensor) -> Guide:
        return Uphill(self.weights)


class Uphill(Guide):
    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def guide(self, state: SteeringState) -> GaussianTransition:
        return state.transition.shifted(ascent(state, self.weights))


def ascent(state: SteeringState, weights: Tensor) -> Tensor:
    """[B N, *latent], std^2 grad_z sum_m w_m V_m: by how much the mean moves."""
    (gradient,) = torch.autograd.grad(weighted(state.values, weights).sum(), state.latents)
    return broadcast(state.transition.std**2, gradient) * gradient

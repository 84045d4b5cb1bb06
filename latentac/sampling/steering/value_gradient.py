"""Value-gradient steering: each mean moves along the gradient of the critic."""

import torch
from torch import Tensor

from latentac.config.sections import Positive, Rate
from latentac.method.diffusion import GaussianTransition, broadcast
from latentac.sampling.steering import SteeredRollout, SteeringSettings, SteeringState, per_row, weighted
from latentac.sampling.steering.best_of_n import BestOfN


class ValueGradient(BestOfN):
    """mean <- mean + std^2 grad_z sum_m w_m V_m(z_t, t, y) (arXiv 2605.27736; Dhariwal and Nichol 2021, algorithm 1).

    It is the first-order tilt of the transition towards p(z') exp(sum_m w_m V_m). Weight 0 leaves the rollout bitwise
    unchanged. Of several particles, the one with the highest value is kept.
    """

    summary = "moves each step along the value gradient"
    needs_gradient = True

    class Settings(SteeringSettings):
        """Those of every method, and the length of a step."""

        strength: Rate = 20.0
        particles: Positive = 1
        sweep_particles: list[Positive] = [2, 4]
        sweep: list[Rate] = [10.0, 20.0, 30.0]
        normalised: bool = False
        """Normalise the gradient. The strength is then the length of the shift, in standard deviations of the
        transition."""

    settings: Settings

    def begin(self, uniforms: Tensor) -> SteeredRollout:
        return GradientAscent(self.weights, self.settings.normalised)


class GradientAscent(SteeredRollout):
    def __init__(self, weights: Tensor, normalised: bool) -> None:
        self.weights, self.normalised = weights, normalised

    def propose(self, state: SteeringState) -> GaussianTransition:
        return state.transition.shifted(ascent(state, self.weights, self.normalised))


def ascent(state: SteeringState, weights: Tensor, normalised: bool) -> Tensor:
    """[B N, *latent], by how much the mean moves: std^2 g, g = grad_z sum_m w_m V_m, or std sum_m |w_m| g / |g|, which
    is as many standard deviations of the transition whatever the critic's slope."""
    (gradient,) = torch.autograd.grad(weighted(state.values, weights).sum(), state.latents)
    std = broadcast(state.transition.std, gradient)
    if not normalised:
        return std**2 * gradient
    rows = len(gradient)
    length = per_row(weights, rows).abs().sum(-1).expand(rows) / gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
    return std * broadcast(length, gradient) * gradient

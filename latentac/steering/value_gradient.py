"""Value-gradient steering: each mean moves uphill on the critic."""

import torch
from torch import Tensor

from latentac.diffusion import GaussianTransition, broadcast
from latentac.steering import SteeringState


class ValueGradient:
    """mean <- mean + std^2 grad_z sum_m w_m V_m(z_t, t, y) (arXiv 2605.27736; Dhariwal and Nichol 2021, algorithm 1).

    It is the first-order tilt of the transition towards p(z') exp(sum_m w_m V_m). weights: [M], the strength of each
    reward's head, whose values are in standard deviations of that reward; 0 leaves the rollout bitwise as it was.
    Of several candidates the one with the highest value is kept.
    """

    needs_gradient = True

    def __init__(self, weights: Tensor, candidates: int = 1) -> None:
        self.weights, self.candidates = weights, candidates

    def guide(self, state: SteeringState) -> GaussianTransition:
        (gradient,) = torch.autograd.grad((state.values @ self.weights).sum(), state.latents)
        variance = broadcast(state.transition.std**2, gradient)
        return state.transition.shifted(variance * gradient)

    def select(self, values: Tensor) -> Tensor:
        return (values @ self.weights).argmax(1)

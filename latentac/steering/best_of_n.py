"""Best-of-N: the control that every other method has to beat."""

from torch import Tensor

from latentac.config import Schedule
from latentac.steering import Guide, weighted, window


class BestOfN:
    """N plain rollouts an image; the critic keeps the one with the highest sum_m w_m V_m at its last denoised state.

    No picture is decoded and no reward is asked for the choice.
    """

    needs_gradient = False

    def __init__(self, weights: Tensor, candidates: int, schedule: Schedule) -> None:
        if candidates < 1:
            raise ValueError(f"steering needs at least one candidate, got {candidates}")
        self.weights, self.candidates, self.schedule = weights, candidates, schedule

    def steps(self, num_steps: int) -> range:
        return window(self.schedule, num_steps)

    def begin(self, uniforms: Tensor) -> Guide:
        return Guide()

    def select(self, values: Tensor) -> Tensor:
        return weighted(values.flatten(0, 1), self.weights).view(values.shape[:2]).argmax(1)

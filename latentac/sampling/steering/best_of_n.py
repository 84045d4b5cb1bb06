"""Best-of-N: the control that every other method has to beat."""

from torch import Tensor

from latentac.sampling.steering import SteeredRollout, SteeringSettings, weighted


class BestOfN:
    """N plain rollouts per image; the critic keeps the one with the highest sum_m w_m V_m at its last denoised state.

    For the choice, no image is decoded and no reward is called.
    """

    summary = "makes several images and keeps the one with the highest value"
    needs_gradient = False

    class Settings(SteeringSettings):
        """Those of every method. When the method acts makes no difference here."""

    def __init__(self, settings: SteeringSettings, weights: Tensor, particles: int) -> None:
        if particles < 1:
            raise ValueError(f"steering needs at least one particle, got {particles}")
        self.settings, self.weights, self.particles = settings, weights, particles

    def steps(self, num_steps: int) -> range:
        return self.settings.steps(num_steps)

    def begin(self, uniforms: Tensor) -> SteeredRollout:
        return SteeredRollout()

    def select(self, values: Tensor) -> Tensor:
        return weighted(values.flatten(0, 1), self.weights).view(values.shape[:2]).argmax(1)

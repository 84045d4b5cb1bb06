"""Twisted proposals: particles follow the value gradient, and their weights are corrected for it."""

from torch import Tensor

from latentac.config.sections import Positive, Rate
from latentac.method.diffusion import GaussianTransition
from latentac.sampling.steering import SteeredRollout, SteeringState
from latentac.sampling.steering.resampling import Particles, Resampling
from latentac.sampling.steering.value_gradient import ascent


class Twisted(Resampling):
    """Value gradient and resampling together (twisted diffusion sampler, Wu et al. 2023).

    The mean of the proposal is moved as in `value_gradient`, and each weight is multiplied by p(z') / q(z'). So the
    distribution stays p(z) exp(psi), whatever the gradient. With a good gradient the weights stay even.
    """

    summary = "value gradient and resampling together, with exact weights"
    needs_gradient = True

    class Settings(Resampling.Settings):
        """Those of `resampling`, and the length of the shift."""

        strength: Rate = 10.0
        sweep_particles: list[Positive] = [2, 4]
        normalised: bool = False
        """As in `value_gradient`."""

    settings: Settings

    def begin(self, uniforms: Tensor) -> SteeredRollout:
        return TwistedParticles(self, uniforms)


class TwistedParticles(Particles):
    settings: Twisted.Settings

    def propose(self, state: SteeringState) -> GaussianTransition:
        if bool((state.transition.std <= 0).any()):
            return state.transition  # a step without noise has no other proposal than itself
        return state.transition.shifted(ascent(state, self.weights, self.settings.normalised))

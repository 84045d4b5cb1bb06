"""Twisted proposals: particles that move uphill on the critic, and are weighed for having done so."""

from torch import Tensor

from latentac.config.sections import Positive, Rate
from latentac.method.diffusion import GaussianTransition
from latentac.sampling.steering import Guide, SteeringState
from latentac.sampling.steering.resampling import Particles, Resampling
from latentac.sampling.steering.value_gradient import ascent


class Twisted(Resampling):
    """Value gradient and resampling together (twisted diffusion sampler, Wu et al. 2023).

    The proposal is the transition with its mean moved as `value_gradient` moves it, and each weight is multiplied by
    p(z') / q(z'), so the law stays p(z) exp(psi) however good the gradient is; a good one keeps the weights even.
    """

    summary = "gradient and resampling together, weighed exactly"
    needs_gradient = True

    class Settings(Resampling.Settings):
        """Those of `resampling`, and the length of a step."""

        strength: Rate = 10.0
        candidates: list[Positive] = [2, 4]
        normalised: bool = False
        """As in `value_gradient`."""

    settings: Settings

    def begin(self, uniforms: Tensor) -> Guide:
        return TwistedParticles(self, uniforms)


class TwistedParticles(Particles):
    settings: Twisted.Settings

    def guide(self, state: SteeringState) -> GaussianTransition:
        if bool((state.transition.std <= 0).any()):
            return state.transition  # a step without noise has no other proposal than itself
        return state.transition.shifted(ascent(state, self.weights, self.settings.normalised))

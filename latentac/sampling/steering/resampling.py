"""Resampling with the critic: sequential Monte Carlo whose potentials are values. No image is decoded on the way."""

import math
from typing import Literal

import torch
from torch import Tensor

from latentac.config.sections import Fraction, NonNegative, Rate
from latentac.method.diffusion import GaussianTransition
from latentac.sampling.steering import SteeredRollout, SteeringSettings, SteeringState, weighted
from latentac.sampling.steering.best_of_n import BestOfN


class Resampling(BestOfN):
    """Feynman-Kac steering (Singhal et al. 2025) with the critic as its intermediate reward.

    The N particles of an image follow p(z) exp(psi), psi = sum_m w_m V_m(z_t, t, y). If the effective sample size of
    their weights is below `resample_below` N, they are resampled systematically (Douc and Cappe 2005). The values come
    from the forward pass that the denoiser makes anyway.

    At the end, the particle with the highest value is kept.
    """

    summary = "several particles: good ones replace bad ones"

    class Settings(SteeringSettings):
        """Those of every method, and how particles are weighted."""

        strength: Rate = 5.0
        potential: Literal["diff", "max"] = "diff"
        """`diff` weights each step by exp(psi_t - psi_{t-1}); the product of these is exp(psi) at the end. `max`
        weights it by the rise of the highest psi so far of the particle."""
        tempering: NonNegative = 0.0
        """psi is multiplied by ((k + 1) / n)^tempering at the k-th of n steered steps. The factor rises to 1, so the
        last steered step has the full weight. At earlier steps, where values are uncertain, less is decided."""
        resample_below: Fraction = 0.7
        """Particles are resampled if their effective sample size is below this share of their number."""

    settings: Settings

    def begin(self, uniforms: Tensor) -> SteeredRollout:
        return Particles(self, uniforms)


class Particles(SteeredRollout):
    """log_weights: [B, N] since the last resampling; log_normaliser: [B], log of the estimate of Z up to then."""

    def __init__(self, steering: Resampling, uniforms: Tensor) -> None:
        self.weights, self.particles, self.settings = steering.weights, steering.particles, steering.settings
        self.steps, self.uniforms = steering.steps(uniforms.shape[1]), uniforms
        self.log_weights = uniforms.new_zeros(len(uniforms), self.particles)
        self.log_normaliser = uniforms.new_zeros(len(uniforms))
        self._psi = uniforms.new_zeros(len(uniforms), self.particles)

    def resample(self, state: SteeringState) -> Tensor | None:
        psi = weighted(state.values.detach(), self.weights).unflatten(0, (-1, self.particles))
        first = state.step == self.steps.start
        if self.settings.potential == "max" and not first:
            psi = psi.maximum(self._psi)
        before = 0.0 if first else self._temperature(state.step - 1) * self._psi
        self.log_weights = self.log_weights + self._temperature(state.step) * psi - before
        self._psi = psi
        return self._resampled(state.step)

    def moved(self, transition: GaussianTransition, proposal: GaussianTransition, next_latents: Tensor) -> None:
        if proposal is not transition:
            change = transition.log_prob(next_latents) - proposal.log_prob(next_latents)
            self.log_weights = self.log_weights + change.unflatten(0, (-1, self.particles))

    def _temperature(self, step: int) -> float:
        """lambda_k = ((k + 1) / n)^tempering of the k-th of n steered steps."""
        return float(((step - self.steps.start + 1) / len(self.steps)) ** self.settings.tempering)

    def _resampled(self, step: int) -> Tensor | None:
        images, count = self.log_weights.shape
        shares = self.log_weights.softmax(1)
        poor = 1 / shares.square().sum(1) < self.settings.resample_below * count
        if not bool(poor.any()):
            return None
        own = torch.arange(count, device=shares.device).expand(images, -1)
        chosen = torch.where(poor[:, None], systematic(shares, self.uniforms[:, step]), own)
        mean = self.log_weights.logsumexp(1) - math.log(count)
        self.log_normaliser = torch.where(poor, self.log_normaliser + mean, self.log_normaliser)
        self.log_weights = torch.where(poor[:, None], torch.zeros_like(self.log_weights), self.log_weights)
        self._psi = self._psi.gather(1, chosen)
        return (chosen + count * torch.arange(images, device=chosen.device)[:, None]).flatten()


def systematic(shares: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [B, N], ascending: place j goes to the particle in whose share (u + j) / N falls. Particle i gets N share_i
    places in expectation, and never fewer than the whole number below or more than the one above that.

    shares: [B, N], rows that sum to 1; uniforms: [B].
    """
    count = shares.shape[1]
    points = (torch.arange(count, device=shares.device) + uniforms[:, None]) / count
    edges = shares.cumsum(1)
    return torch.searchsorted(edges / edges[:, -1:], points.contiguous()).clamp(max=count - 1)

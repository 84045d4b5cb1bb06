"""Noise schedules, Gaussian transitions and the kernels that make them: the decision process of denoising.

A noise level is a float `sigma` in [0, 1]: a noisy latent is `x = alpha(sigma) x0 + sigma n`, with n ~ N(0, I).
Variance-preserving models have alpha = sqrt(1 - sigma^2) (so sigma^2 = 1 - alpha-bar of DDPM);
flow-matching models have alpha = 1 - sigma. A denoiser predicts the pair (x0, n); a kernel turns it into
the distribution of the next, less noisy latents. Everything here is float32 and free of configuration.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Path = Literal["variance_preserving", "flow"]


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says of noisy latents. clean (x0) and noise (n): float32 [B, *latent], with
    x = alpha x0 + sigma n."""

    clean: Float[Tensor, "B *latent"]
    noise: Float[Tensor, "B *latent"]


def alpha_of(sigma: Float[Tensor, "*axes"], path: Path) -> Float[Tensor, "*axes"]:
    """The signal's coefficient at noise level `sigma`, same shape."""
    return (1 - sigma**2).clamp(min=0).sqrt() if path == "variance_preserving" else 1 - sigma


def broadcast(per_image: Float[Tensor, "B"], like: Float[Tensor, "B *latent"]) -> Float[Tensor, "B *ones"]:
    """[B] -> [B, 1, ...] with as many axes as `like`."""
    return per_image.reshape(-1, *[1] * (like.ndim - 1))


def forward_noise(
    clean: Float[Tensor, "B *latent"], noise: Float[Tensor, "B *latent"], sigma: Float[Tensor, "B"], path: Path
) -> Float[Tensor, "B *latent"]:
    """x = alpha(sigma) x0 + sigma n; clean, noise: [B, *latent]; sigma: [B]."""
    return broadcast(alpha_of(sigma, path), clean) * clean + broadcast(sigma, clean) * noise


class DeterministicTransition(ValueError):
    """A density was asked of a transition without noise: it has none."""


@dataclass(frozen=True)
class GaussianTransition:
    """The next latents are N(mean, std^2 I). mean: float32 [B, *latent]; std: float32 [B], 0 where deterministic."""

    mean: Float[Tensor, "B *latent"]
    std: Float[Tensor, "B"]

    def sample(self, noise: Float[Tensor, "B *latent"]) -> Float[Tensor, "B *latent"]:
        """mean + std * noise; noise: standard normal, shaped as the mean."""
        return self.mean + broadcast(self.std, self.mean) * noise

    def log_prob(self, next_latents: Float[Tensor, "B *latent"]) -> Float[Tensor, "B"]:
        """[B], the log-density of `next_latents` in nats, *summed* over the D latent dimensions.

        Raises DeterministicTransition where std is 0: there is no density, and a placeholder would train on nothing.
        """
        # Only on a CPU: a GPU would have to wait for the answer, and a rollout leaves such steps out itself.
        if self.std.device.type == "cpu" and bool((self.std <= 0).any()):
            raise DeterministicTransition("a transition with std 0 has no density: leave the step out of the objective")
        deviation = (next_latents - self.mean) / broadcast(self.std, self.mean)
        dimensions = self.mean[0].numel()
        squares = deviation.flatten(1).square().sum(1)
        return -0.5 * squares - dimensions * (self.std.log() + 0.5 * math.log(2 * math.pi))

    def rows(self, index: Int64[Tensor, "N"]) -> "GaussianTransition":
        """The transitions of the images that `index`, int64 [N], names."""
        return GaussianTransition(self.mean[index], self.std[index])

    def shifted(self, offset: Float[Tensor, "B *latent"]) -> "GaussianTransition":
        """The same transition with `offset`, [B, *latent], added to its mean."""
        return GaussianTransition(self.mean + offset, self.std)


@runtime_checkable
class Kernel(Protocol):
    """One stochastic sampler step: from the prediction at `sigma` to the distribution at `sigma_next` < `sigma`.

    path: how signal and noise mix in the models that it samples.
    """

    @property
    def path(self) -> Path: ...

    def transition(
        self,
        latents: Float[Tensor, "B *latent"],
        prediction: Prediction,
        sigma: Float[Tensor, "B"],
        sigma_next: Float[Tensor, "B"],
    ) -> GaussianTransition:
        """latents: [B, *latent] at `sigma`; sigma, sigma_next: [B]."""
        ...

    def std(self, sigma: Float[Tensor, "B"], sigma_next: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """[B], the transition's standard deviation; it does not depend on the latents."""
        ...


@dataclass(frozen=True)
class DDIM:
    """DDIM-eta (Song, Meng, Ermon 2021, eq. 12 and 16): `noise` is eta: 1 is the DDPM posterior, 0
    the probability-flow ODE."""

    noise: float
    path: Path = "variance_preserving"

    def std(self, sigma: Float[Tensor, "B"], sigma_next: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        alpha, alpha_next = alpha_of(sigma, self.path), alpha_of(sigma_next, self.path)
        return self.noise * (sigma_next / sigma) * (1 - (alpha / alpha_next) ** 2).clamp(min=0).sqrt()

    def transition(
        self,
        latents: Float[Tensor, "B *latent"],
        prediction: Prediction,
        sigma: Float[Tensor, "B"],
        sigma_next: Float[Tensor, "B"],
    ) -> GaussianTransition:
        std = self.std(sigma, sigma_next)
        direction = (sigma_next**2 - std**2).clamp(min=0).sqrt()
        alpha_next = alpha_of(sigma_next, self.path)
        mean = broadcast(alpha_next, latents) * prediction.clean + broadcast(direction, latents) * prediction.noise
        return GaussianTransition(mean, std)


@dataclass(frozen=True)
class FlowSDE:
    """Euler-Maruyama step of the flow's SDE (Flow-GRPO, Liu et al. 2025, eq. 9): g = noise sqrt(s / (1 - s)).

    At s = 1 the denominator would vanish; the next level stands in for s there.
    """

    noise: float
    path: Path = "flow"

    def _diffusion(self, sigma: Float[Tensor, "B"], sigma_next: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        level = torch.where(sigma >= 1, sigma_next, sigma)
        return self.noise * (sigma / (1 - level)).sqrt()

    def std(self, sigma: Float[Tensor, "B"], sigma_next: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return self._diffusion(sigma, sigma_next) * (sigma - sigma_next).sqrt()

    def transition(
        self,
        latents: Float[Tensor, "B *latent"],
        prediction: Prediction,
        sigma: Float[Tensor, "B"],
        sigma_next: Float[Tensor, "B"],
    ) -> GaussianTransition:
        dt = broadcast(sigma_next - sigma, latents)
        s, half = broadcast(sigma, latents), broadcast(self._diffusion(sigma, sigma_next) ** 2 / (2 * sigma), latents)
        velocity = prediction.noise - prediction.clean
        mean = latents * (1 + half * dt) + velocity * (1 + half * (1 - s)) * dt
        return GaussianTransition(mean, self.std(sigma, sigma_next))


@dataclass(frozen=True)
class DanceSDE:
    """Euler-Maruyama step of the flow's SDE (DanceGRPO, Xue et al. 2025) with one diffusion at all levels: g = noise.

    The last step is as noisy as the others, and nothing removes its noise from the latents.
    """

    noise: float
    path: Path = "flow"

    def std(self, sigma: Float[Tensor, "B"], sigma_next: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return self.noise * (sigma - sigma_next).sqrt()

    def transition(
        self,
        latents: Float[Tensor, "B *latent"],
        prediction: Prediction,
        sigma: Float[Tensor, "B"],
        sigma_next: Float[Tensor, "B"],
    ) -> GaussianTransition:
        dt, half = broadcast(sigma_next - sigma, latents), broadcast(self.noise**2 / (2 * sigma), latents)
        velocity = prediction.noise - prediction.clean
        mean = latents + (velocity + half * prediction.noise) * dt
        return GaussianTransition(mean, self.std(sigma, sigma_next))


@dataclass(frozen=True)
class CPS:
    """Coefficient-preserving sampling (Wang and Yu 2025): the total noise coefficient stays sigma_next exactly.

    `noise` in [0, 1]; 0 is the Euler step of the flow's ODE.
    """

    noise: float
    path: Path = "flow"

    def std(self, sigma: Float[Tensor, "B"], sigma_next: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        return sigma_next * math.sin(self.noise * math.pi / 2)

    def transition(
        self,
        latents: Float[Tensor, "B *latent"],
        prediction: Prediction,
        sigma: Float[Tensor, "B"],
        sigma_next: Float[Tensor, "B"],
    ) -> GaussianTransition:
        std = self.std(sigma, sigma_next)
        direction = (sigma_next**2 - std**2).clamp(min=0).sqrt()
        mean = broadcast(1 - sigma_next, latents) * prediction.clean + broadcast(direction, latents) * prediction.noise
        return GaussianTransition(mean, std)


def num_stochastic_steps(kernel: Kernel, sigmas: Float[Tensor, "levels"]) -> int:
    """How many leading steps of the schedule `sigmas`, [K+1] descending, have a density.

    The stochastic steps must come first and without a gap, or credit would pass through steps that no one chose.
    Raises ValueError otherwise.
    """
    stochastic = [bool(std > 0) for std in kernel.std(sigmas[:-1], sigmas[1:])]
    count = sum(stochastic)
    if stochastic != [True] * count + [False] * (len(stochastic) - count):
        raise ValueError(f"the stochastic steps of a schedule must be contiguous and first, got {stochastic}")
    return count

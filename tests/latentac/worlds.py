"""A world with a closed form: linear-Gaussian data, its exact denoiser, and the analytic critic of a quadratic reward.

It stands where a backbone stands, behind the same protocol, so the product's own loop runs on it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from latentac.backbones import to_arrays
from latentac.config.learning import Policy as PolicySettings
from latentac.method import diffusion
from latentac.method.diffusion import Kernel
from latentac.method.records import Conditioning
from latentac.sampling.kernels import KERNELS

MEAN, STD = 0.7, 0.6
"""Of the data: x0 ~ N(MEAN, STD^2)."""


class GaussianBackbone:
    """The exact E[x0 | x_t] of scalar Gaussian data; its tap is (x, x^2) between two constants, which keep its size
    for a critic that normalises over the channels."""

    device = torch.device("cpu")
    latent_shape = (1, 1, 1)
    text_width = 1
    max_tokens = 1

    def __init__(self, path: diffusion.Path) -> None:
        self.path = path
        self.module: nn.Module = nn.Identity()
        self.tap_shapes = {"state": (4, 1, 1)}

    def schedule(self, num_steps: int) -> Tensor:
        """Uniform in the flow's time; for a variance-preserving path uniform in the angle whose sine is sigma."""
        time = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        if self.path == "variance_preserving":
            time = torch.sin(time * 1.5)  # stops short of pure noise, as trained schedules do
        return time.float()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1))

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [1] * len(prompts)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[diffusion.Prediction, dict[str, Tensor]]:
        alpha = diffusion.broadcast(diffusion.alpha_of(sigma, self.path), latents)
        level = diffusion.broadcast(sigma, latents)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + level**2)
        clean = MEAN + gain * (latents - alpha * MEAN)
        frame = torch.full_like(latents, 3.0)
        taps = {"state": torch.cat([latents, latents**2, frame, -frame], 1)}
        return diffusion.Prediction(clean, (latents - alpha * clean) / level), taps

    def images(self, latents: Tensor) -> Tensor:
        return latents.sigmoid().expand(-1, 3, -1, -1)

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_arrays(self.images, latents)

    def clone(self) -> Self:
        return type(self)(self.path)

    def adapt(self, settings: PolicySettings) -> None:
        pass

    def save(self, folder: FilePath) -> None:
        pass


@dataclass(frozen=True)
class AffineStep:
    """x' = slope x + offset + std n, the step that a kernel takes in this world."""

    slope: float
    offset: float
    std: float


def affine_steps(backbone: GaussianBackbone, kernel: Kernel, num_steps: int) -> list[AffineStep]:
    """Read off the kernel's mean at x = 0 and x = 1; float64 is not needed for what is tested."""
    sigmas = backbone.schedule(num_steps)
    steps = []
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
        levels = sigma.expand(2), sigma_next.expand(2)
        prediction, _ = backbone.predict(x, levels[0], backbone.encode(["", ""]))
        transition = kernel.transition(x, prediction, *levels)
        at_zero, at_one = transition.mean.flatten().tolist()
        steps.append(AffineStep(at_one - at_zero, at_zero, float(transition.std[0])))
    return steps


@dataclass(frozen=True)
class Quadratic:
    """V(x) = p x^2 / 2 + q x + r."""

    p: float
    q: float
    r: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.p * x**2 / 2 + self.q * x + self.r


def analytic_values(steps: Sequence[AffineStep], reward: Quadratic) -> list[Quadratic]:
    """V_0 ... V_{K-1}, backed up from the terminal reward: E[V(A x + B + S n)] of a quadratic is a quadratic."""
    values = []
    value = reward
    for step in reversed(steps):
        a, b, s = step.slope, step.offset, step.std
        value = Quadratic(
            a**2 * value.p,
            a * (value.p * b + value.q),
            value.p * b**2 / 2 + value.q * b + value.r + value.p * s**2 / 2,
        )
        values.append(value)
    return values[::-1]


REWARD = Quadratic(-2.0, 1.0, 0.5)
STEPS = 8
FLOW = [name for name in KERNELS if KERNELS.load(name).path == "flow"]
NOISY: list[Kernel] = [KERNELS.build("ddim", noise=1.0), *(KERNELS.build(name, noise=0.5) for name in FLOW)]


class AnalyticCritic(nn.Module):
    """V* as a critic: what the trained one approximates."""

    def __init__(self, backbone, kernel):
        super().__init__()
        self.sigmas = backbone.schedule(STEPS)[:-1]
        self.values = analytic_values(affine_steps(backbone, kernel, STEPS), REWARD)

    def features(self, latents, prediction, taps):
        return taps

    def standardised(self, features, sigma, conditioning):
        states, steps = features["state"][:, :1, 0, 0], (self.sigmas - sigma[:, None]).abs().argmin(1)
        each = torch.stack([value(states) for value in self.values[: len(self.sigmas)]])
        return each[steps, torch.arange(len(states))]

    def standardise(self, returns):
        return returns

    def unstandardise(self, values):
        return values

"""The records that the layers pass to each other, and the legend of their axes.

    P  prompts      G  group (rollouts of one prompt)      B = P * G  images
    K  denoising steps      S  stochastic steps, S <= K      M  rewards
    L  text tokens      C  text width      *latent  one latent image, for example (4, 8, 8)

Latents run in the order of the decision process, from noise (index 0) to data (index K).
Every tensor of numbers that learn or are learned from is float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is conditioned on. tokens: float32 [B, L, C], the text encoder's output for each prompt;
    pooled: float32 [B, C'], one vector a prompt, where the denoiser takes one."""

    tokens: Float[Tensor, "B L C"]
    pooled: Float[Tensor, "B width"] | None = None

    def rows(self, index: Int64[Tensor, "N"]) -> "Conditioning":
        """The conditioning of the images that `index`, int64 [N], names; repeated rows are allowed."""
        return replace(self, tokens=self.tokens[index], pooled=None if self.pooled is None else self.pooled[index])

    def to(self, device: torch.device) -> "Conditioning":
        """On `device`."""
        return replace(
            self, tokens=self.tokens.to(device), pooled=None if self.pooled is None else self.pooled.to(device)
        )


def join(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all parts, in order."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(torch.cat([part.tokens for part in parts]), torch.cat(pooled) if pooled else None)


def taken(tensor: Tensor, index: Tensor | tuple[Tensor, ...], device: torch.device) -> Tensor:
    """`tensor[index]` on `device`, wherever the tensor and the index are."""
    several = index if isinstance(index, tuple) else (index,)
    return tensor[tuple(one.to(tensor.device) for one in several)].to(device)


@dataclass(frozen=True)
class ValueGradients:
    """The values' gradient by the latents that a stochastic step led to. gradients: [B, S, *latent], of the weighted,
    standardised values; known: bool [B, S], where there is one. Or [N, *latent] and [N]."""

    gradients: Float[Tensor, "..."]
    known: Bool[Tensor, "..."]

    def rows(self, index: Tensor | tuple[Tensor, Tensor]) -> "ValueGradients":
        return replace(self, gradients=self.gradients[index], known=self.known[index])

    def to(self, device: torch.device) -> "ValueGradients":
        """On `device`."""
        return replace(self, gradients=self.gradients.to(device), known=self.known.to(device))


@dataclass(frozen=True)
class Trajectory:
    """A batch of rollouts: all that an update needs, and nothing of the network's own state.

    conditioning: of the B prompts, B rows
    latents:      [B, K+1, *latent] from noise to data
    sigmas:       [K+1] noise levels, the float values that the kernel used, descending; the last is 0
    means:        [B, S, *latent] the acting policy's mean at each stochastic step, for exact KLs
    log_probs:    [B, S] summed log-density of each stochastic step's next latents under the acting policy, nats
    values:       [B, K, M] the critic's estimate at each state that was denoised; M = 0 without a critic
    features: name -> [B, K, ...], what the critic saw of each state; nothing unless it was asked for
    value_gradients: at the latents that each stochastic step led to; None unless they were asked for
    """

    conditioning: Conditioning
    latents: Float[Tensor, "B levels *latent"]
    sigmas: Float[Tensor, "levels"]
    means: Float[Tensor, "B S *latent"]
    log_probs: Float[Tensor, "B S"]
    values: Float[Tensor, "B K M"]
    features: Mapping[str, Tensor] = field(default_factory=dict)
    value_gradients: ValueGradients | None = None

    @property
    def num_steps(self) -> int:
        """K, the number of denoising steps."""
        return self.latents.shape[1] - 1

    @property
    def num_stochastic_steps(self) -> int:
        """S, the number of leading steps that have a density."""
        return self.log_probs.shape[1]

    @property
    def clean(self) -> Tensor:
        """[B, *latent], the latents at the end of the trajectory."""
        return self.latents[:, -1]

    def kept_on(self, device: torch.device) -> "Trajectory":
        """With all that is large on `device`. Noise levels, log-probabilities and values stay where they are."""
        return replace(
            self,
            conditioning=self.conditioning.to(device),
            latents=self.latents.to(device),
            means=self.means.to(device),
            features={name: feature.to(device) for name, feature in self.features.items()},
            value_gradients=None if self.value_gradients is None else self.value_gradients.to(device),
        )

    def rows(self, index: Int64[Tensor, "N"]) -> "Trajectory":
        """The rollouts that `index`, int64 [N], names, in that order."""
        return replace(
            self,
            conditioning=self.conditioning.rows(index),
            latents=self.latents[index],
            means=self.means[index],
            log_probs=self.log_probs[index],
            values=self.values[index],
            features={name: feature[index] for name, feature in self.features.items()},
            value_gradients=None if self.value_gradients is None else self.value_gradients.rows(index),
        )


def join_trajectories(parts: Sequence[Trajectory]) -> Trajectory:
    """The rollouts of all parts, in order. The parts have the same noise levels and keep the same things."""
    first = parts[0]
    known = [part.value_gradients for part in parts if part.value_gradients is not None]
    return Trajectory(
        conditioning=join([part.conditioning for part in parts]),
        latents=torch.cat([part.latents for part in parts]),
        sigmas=first.sigmas,
        means=torch.cat([part.means for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        values=torch.cat([part.values for part in parts]),
        features={name: torch.cat([part.features[name] for part in parts]) for name in first.features},
        value_gradients=ValueGradients(torch.cat([g.gradients for g in known]), torch.cat([g.known for g in known]))
        if known
        else None,
    )


@dataclass(frozen=True)
class Scores:
    """rewards: float32 [B, M], each column in that reward's own unit; names: M names in column order."""

    rewards: Float[Tensor, "B M"]
    names: tuple[str, ...]

    def column(self, name: str) -> Float[Tensor, "B"]:
        """[B], the rewards that `name` gave."""
        return self.rewards[:, self.names.index(name)]


@dataclass(frozen=True)
class Minibatch:
    """N denoising steps, flattened over images and steps.

    latents, next_latents: [N, *latent]     sigma, sigma_next: [N]     conditioning: N rows
    old_means: [N, *latent], old_log_probs: [N]: of the acting policy     advantages: [N], whitened
    value_gradients: N rows, or None
    """

    latents: Float[Tensor, "N *latent"]
    next_latents: Float[Tensor, "N *latent"]
    sigma: Float[Tensor, "N"]
    sigma_next: Float[Tensor, "N"]
    conditioning: Conditioning
    old_means: Float[Tensor, "N *latent"]
    old_log_probs: Float[Tensor, "N"]
    advantages: Float[Tensor, "N"]
    value_gradients: ValueGradients | None = None

    def __len__(self) -> int:
        """N, the number of denoising steps."""
        return len(self.sigma)

    def part(self, rows: range) -> "Minibatch":
        """The denoising steps `rows`, which are consecutive; of all of them, the minibatch itself."""
        if len(rows) == len(self):
            return self
        index = torch.arange(rows.start, rows.stop, device=self.sigma.device)
        return Minibatch(
            latents=self.latents[index],
            next_latents=self.next_latents[index],
            sigma=self.sigma[index],
            sigma_next=self.sigma_next[index],
            conditioning=self.conditioning.rows(index),
            old_means=self.old_means[index],
            old_log_probs=self.old_log_probs[index],
            advantages=self.advantages[index],
            value_gradients=None if self.value_gradients is None else self.value_gradients.rows(index),
        )


def flatten_steps(
    trajectory: Trajectory, advantages: Float[Tensor, "B S"], image: Int64[Tensor, "N"], step: Int64[Tensor, "N"]
) -> Minibatch:
    """Pick the transitions (image[i], step[i]) out of a trajectory. The result is where the noise levels are, wherever
    the trajectory keeps the rest.

    advantages: [B, S]; image, step: int64 [N], `step` below S.
    """
    device = trajectory.sigmas.device
    here = image.to(device), step.to(device)
    kept = image.to(trajectory.latents.device), step.to(trajectory.latents.device)
    gradients = trajectory.value_gradients
    return Minibatch(
        latents=taken(trajectory.latents, kept, device),
        next_latents=taken(trajectory.latents, (kept[0], kept[1] + 1), device),
        sigma=trajectory.sigmas[here[1]],
        sigma_next=trajectory.sigmas[here[1] + 1],
        conditioning=trajectory.conditioning.rows(kept[0]).to(device),
        old_means=taken(trajectory.means, kept, device),
        old_log_probs=trajectory.log_probs[here],
        advantages=advantages[here],
        value_gradients=None if gradients is None else gradients.rows(kept).to(device),
    )

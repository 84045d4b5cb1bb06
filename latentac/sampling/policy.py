"""The policy: a backbone and a kernel give the distribution of the next latents, in rollout and in the loss alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentac.backbones import Denoiser
from latentac.backbones.guided import guided
from latentac.config.schema import Config
from latentac.method.diffusion import GaussianTransition, Kernel, Prediction
from latentac.method.records import Conditioning
from latentac.sampling.kernels import KERNELS
from latentac.sampling.rows import Rows


@dataclass(frozen=True)
class PolicyOutput:
    """One forward: the next latents' distribution, the prediction behind it, and the feature maps for the critic."""

    transition: GaussianTransition
    prediction: Prediction
    taps: dict[str, Tensor]

    def first(self, count: int) -> "PolicyOutput":
        """The first `count` rows."""
        transition = GaussianTransition(self.transition.mean[:count], self.transition.std[:count])
        prediction = Prediction(self.prediction.clean[:count], self.prediction.noise[:count])
        return PolicyOutput(transition, prediction, {name: tap[:count] for name, tap in self.taps.items()})


class Policy:
    """Sampling and the loss call the same `forward`, so the ratio is bitwise 1 before the first update.

    A network's rounding may depend on the number of rows of a forward pass. Where `rows` has a limit, each pass has
    exactly that many: a shorter batch is filled up with copies of its last row, a longer one is divided.
    """

    def __init__(self, backbone: Denoiser, kernel: Kernel, rows: Rows | None = None) -> None:
        if kernel.path != backbone.path:
            raise ValueError(f"a {kernel.path} kernel cannot sample a {backbone.path} backbone")
        self.backbone, self.kernel = backbone, kernel
        self.rows = rows or Rows()

    def forward(self, latents: Tensor, sigma: Tensor, sigma_next: Tensor, conditioning: Conditioning) -> PolicyOutput:
        """latents: float32 [B, *latent] at noise level sigma [B]; sigma_next: [B], below sigma."""
        count, limit = len(latents), self.rows.limit
        if limit is None or count == limit:
            return self._forward(latents, sigma, sigma_next, conditioning)
        parts = []
        for part in self.rows.parts(count):
            index = torch.arange(part.start, part.start + limit, device=latents.device).clamp(max=part.stop - 1)
            output = self._forward(latents[index], sigma[index], sigma_next[index], conditioning.rows(index))
            parts.append(output.first(len(part)))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _forward(self, latents: Tensor, sigma: Tensor, sigma_next: Tensor, conditioning: Conditioning) -> PolicyOutput:
        prediction, taps = self.backbone.predict(latents, sigma, conditioning)
        return PolicyOutput(self.kernel.transition(latents, prediction, sigma, sigma_next), prediction, taps)

    def transition(
        self, latents: Tensor, sigma: Tensor, sigma_next: Tensor, conditioning: Conditioning
    ) -> GaussianTransition:
        """The distribution of the next latents; arguments as in `forward`."""
        return self.forward(latents, sigma, sigma_next, conditioning).transition


def configured_policy(config: Config, backbone: Denoiser) -> Policy:
    """The policy of a run on `backbone`: with the configured kernel, guidance scale and rows per forward pass."""
    limit = None if config.train.micro_images == "auto" else config.train.micro_images
    kernel = KERNELS.make(config.kernel, path="kernel")
    return Policy(guided(backbone, config.policy.guidance_scale), kernel, Rows(limit))


def _joined(parts: Sequence[PolicyOutput]) -> PolicyOutput:
    transitions, predictions = [part.transition for part in parts], [part.prediction for part in parts]
    return PolicyOutput(
        GaussianTransition(torch.cat([t.mean for t in transitions]), torch.cat([t.std for t in transitions])),
        Prediction(torch.cat([p.clean for p in predictions]), torch.cat([p.noise for p in predictions])),
        {name: torch.cat([part.taps[name] for part in parts]) for name in parts[0].taps},
    )

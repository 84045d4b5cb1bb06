"""The policy: a backbone and a kernel give the distribution of the next latents, in rollout and in the loss alike."""

from dataclasses import dataclass

from torch import Tensor

from latentac.backbones import Denoiser
from latentac.method.diffusion import GaussianTransition, Kernel, Prediction
from latentac.method.records import Conditioning


@dataclass(frozen=True)
class PolicyOutput:
    """One forward: the next latents' distribution, the prediction behind it, and the feature maps for the critic."""

    transition: GaussianTransition
    prediction: Prediction
    taps: dict[str, Tensor]


class Policy:
    """Sampling and the loss call the same `forward`, so the ratio is bitwise 1 before the first update."""

    def __init__(self, backbone: Denoiser, kernel: Kernel) -> None:
        if kernel.path != backbone.path:
            raise ValueError(f"a {kernel.path} kernel cannot sample a {backbone.path} backbone")
        self.backbone, self.kernel = backbone, kernel

    def forward(self, latents: Tensor, sigma: Tensor, sigma_next: Tensor, conditioning: Conditioning) -> PolicyOutput:
        """latents: float32 [B, *latent] at noise level sigma [B]; sigma_next: [B], below sigma."""
        prediction, taps = self.backbone.predict(latents, sigma, conditioning)
        return PolicyOutput(self.kernel.transition(latents, prediction, sigma, sigma_next), prediction, taps)

    def transition(
        self, latents: Tensor, sigma: Tensor, sigma_next: Tensor, conditioning: Conditioning
    ) -> GaussianTransition:
        """The distribution of the next latents; arguments as in `forward`."""
        return self.forward(latents, sigma, sigma_next, conditioning).transition

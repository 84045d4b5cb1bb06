"""The autoencoder of a world: a pixel of the latents stands for 4 x 4 pixels of the image. And its training."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class AutoencoderTraining:
    """`kl_weight` is small: it only keeps the latents' scale from drifting, the reconstruction decides the rest.
    `colour_weight` is that of the error of each 4 x 4 pixels' mean colour, without its brightness."""

    steps: int = 1000
    batch: int = 32
    learning_rate: float = 2e-3
    kl_weight: float = 1e-5
    edge_weight: float = 0.5
    colour_weight: float = 0.0


def build_autoencoder(image_size: int) -> AutoencoderKL:
    """0.4 M parameters, two halvings. image_size: longer side of the images, in pixels; it only labels the weights."""
    return AutoencoderKL(
        sample_size=image_size,
        latent_channels=4,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
    )


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_images(decoded: Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3], rounded as diffusers' VaeImageProcessor does."""
    scaled = decoded.detach().float().mul(0.5).add(0.5).clamp(0.0, 1.0).mul(255.0).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def train_autoencoder(
    autoencoder: AutoencoderKL, images: np.ndarray, training: AutoencoderTraining, report: Callable[[int, float], None]
) -> None:
    """Fits `autoencoder` in place to `images` uint8 [N, H, W, 3], with torch's global generator. `report(step, loss)`
    is called after every step. At the end `scaling_factor` is set so that scaled latents have unit variance.
    """
    autoencoder.train()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=training.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=training.learning_rate, total_steps=training.steps, pct_start=0.1
    )
    for step in range(training.steps):
        target = to_tensor(images[torch.randint(len(images), (training.batch,)).numpy()])
        posterior = autoencoder.encode(target).latent_dist
        decoded = autoencoder.decode(posterior.sample()).sample
        loss = _reconstruction_loss(decoded, target, training)
        loss = loss + training.kl_weight * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, loss.item())
    autoencoder.eval()
    mean, deviation = encode(autoencoder, images[:2048])
    scale = (mean + deviation * torch.randn_like(mean)).std().item()
    autoencoder.register_to_config(scaling_factor=1.0 / scale)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: np.ndarray, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the unscaled latents: float32 [N, 4, H/4, W/4] each."""
    posteriors = [
        autoencoder.encode(to_tensor(images[start : start + batch])).latent_dist
        for start in range(0, len(images), batch)
    ]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, latents: Tensor, batch: int = 256) -> np.ndarray:
    """Images uint8 [N, H, W, 3] of *scaled* latents float32 [N, 4, H/4, W/4]."""
    scale, shift = scale_and_shift(autoencoder)
    return np.concatenate([to_images(autoencoder.decode(part / scale + shift).sample) for part in latents.split(batch)])


def scale_and_shift(autoencoder: AutoencoderKL) -> tuple[float, float]:
    """Scaled latents are (latents - shift) * scale; Stable Diffusion 3 shifts, its predecessors do not."""
    return autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0


def centre_latents(autoencoder: AutoencoderKL, images: np.ndarray) -> None:
    """Sets `scaling_factor` and `shift_factor` so that the scaled latents of `images` have mean 0 and variance 1."""
    mean, deviation = encode(autoencoder, images)
    variance = mean.var() + deviation.square().mean()
    autoencoder.register_to_config(shift_factor=mean.mean().item(), scaling_factor=variance.rsqrt().item())


def _reconstruction_loss(decoded: Tensor, target: Tensor, training: AutoencoderTraining) -> Tensor:
    """L1 + L2 + L1 of the horizontal and vertical differences: objects and letters differ in their edges. And the error
    of the colours, which would be learned long after thin letters."""
    error = decoded - target
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    loss = error.abs().mean() + functional.mse_loss(decoded, target) + training.edge_weight * edges
    if training.colour_weight:
        colour = functional.avg_pool2d(error - error.mean(1, keepdim=True), 4)
        loss = loss + training.colour_weight * colour.abs().mean()
    return loss

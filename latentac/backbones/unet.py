"""A UNet in the folder layout of diffusers' StableDiffusionPipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from latentac.backbones import count_tokens
from latentac.backbones.pipeline import PipelineBackbone, PipelineSettings
from latentac.backbones.schedulers import variance_preserving
from latentac.backbones.stable_diffusion import UNET
from latentac.method import diffusion
from latentac.method.records import Conditioning


class VariancePreservingUNet(PipelineBackbone):
    """What the UNets of Stable Diffusion 1, 2 and XL share. Taps: `middle`, the mid block's output, and `last`, the
    last up-block's output.

    Integer timesteps exist only in here: outside, a noise level is the float sigma = sqrt(1 - alpha-bar).
    """

    path: diffusion.Path = "variance_preserving"

    def __init__(self, settings: PipelineSettings, folder: Path, device: torch.device) -> None:
        super().__init__(settings, folder, device)
        if device.type == "cuda":  # convolutions of half precision are faster so; rounding is the same
            self.module.to(memory_format=torch.channels_last)
            self._autoencoder.to(memory_format=torch.channels_last)
        scheduler = variance_preserving(folder)
        self._scheduler = scheduler
        self._prediction_type: str = scheduler.config.prediction_type
        self._sigma_table = (1 - scheduler.alphas_cumprod.double()).sqrt().float()
        self._sigmas_here = self._sigma_table.to(device)
        config = self.module.config
        self.text_width: int = config.cross_attention_dim
        for name, block in (("middle", self.module.mid_block), ("last", self.module.up_blocks[-1])):
            self._taps.watch(block, name, lambda output: output)
        widths, (_, height, width) = config.block_out_channels, self.latent_shape
        reduced = 2 ** (len(widths) - 1)  # each block but the last halves, and rounds up
        self.tap_shapes = {
            "middle": (widths[-1], -(-height // reduced), -(-width // reduced)),
            "last": (widths[0], height, width),
        }
        self.compile()

    def schedule(self, num_steps: int) -> Tensor:
        """Trailing timesteps (Lin et al. 2024, table 2): the first level is the noisiest that the model knows.

        Computed as diffusers does it, whose rounding decides which of two timesteps a step in the middle takes.
        """
        total = len(self._sigma_table)
        trailing = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
        timesteps = torch.from_numpy(trailing.astype(np.int64))
        return torch.cat([self._sigma_table[timesteps], torch.zeros(1)])

    def _timesteps(self, sigma: Tensor) -> Tensor:
        """The timestep of each noise level, int64 [B], without a transfer to the host."""
        return (self._sigmas_here[None] - sigma[:, None]).abs().argmin(1)

    def _prediction(self, latents: Tensor, sigma: Tensor, output: Tensor) -> diffusion.Prediction:
        alpha = diffusion.broadcast(diffusion.alpha_of(sigma, self.path), latents)
        noise_level = diffusion.broadcast(sigma, latents)
        if self._prediction_type == "v_prediction":
            return diffusion.Prediction(alpha * latents - noise_level * output, alpha * output + noise_level * latents)
        return diffusion.Prediction((latents - noise_level * output) / alpha, output)

    def _scheduler_of_schedule(self) -> Any:
        return DDIMScheduler.from_config(
            self._scheduler.config,
            timestep_spacing="trailing",
            clip_sample=False,
            thresholding=False,
            set_alpha_to_one=True,
        )


class UNetBackbone(VariancePreservingUNet):
    """Stable Diffusion 1 and 2: one CLIP text encoder. Exported without the safety checker, which served images do not
    pass either."""

    layout = UNET

    def __init__(self, settings: PipelineSettings, folder: Path, device: torch.device) -> None:
        super().__init__(settings, folder, device)
        self._text_encoder = self._load("text_encoder")
        self._tokenizer = self._load("tokenizer")
        longest = self._text_encoder.config.max_position_embeddings  # some tokenizers name no bound of their own
        self.max_tokens: int = min(self._tokenizer.model_max_length, longest)

    def _text_encoders(self) -> Sequence[Any]:
        return [self._text_encoder]

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        with self._tokenizing:
            tokens = self._tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
        return Conditioning(self._text_encoder(tokens.input_ids.to(self._text_device)).last_hidden_state)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        with self._tokenizing:
            return count_tokens(self._tokenizer, prompts)

    def _network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.module(latents, self._timesteps(sigma), conditioning.tokens, return_dict=False)[0]
        return output

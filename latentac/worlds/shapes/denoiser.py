"""The first pipeline's text encoder, UNet and scheduler, their joint loss, and a sampler to score them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentac.worlds.pretraining.tokens import tokenize
from latentac.worlds.pretraining.training import DenoiserTraining
from latentac.worlds.shapes.tokens import TEXT_LENGTH, build_tokenizer

TEXT_WIDTH = 64
LATENT_SHAPE = (4, 8, 8)
TRAIN_TIMESTEPS = 1000
TRAINING = DenoiserTraining()


@dataclass(frozen=True)
class Denoiser:
    """What turns a caption and noise into latents; the two modules are trained together."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    sampler: str = "DDIM with trailing timesteps and eta 1"

    def parts(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder, "unet": self.unet}

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList(self.parts().values())

    def with_modules(self, modules: nn.Module) -> Self:
        text_encoder, unet = modules.children()
        return replace(self, text_encoder=text_encoder, unet=unet)

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        return tokenize(self.tokenizer, texts)

    def loss(self, clean: Tensor, token_ids: Tensor) -> Tensor:
        """The mean square error of the noise (Ho et al. 2020, eq. 14)."""
        noise = torch.randn_like(clean)
        timesteps = torch.randint(TRAIN_TIMESTEPS, (len(clean),))
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        hidden = self.text_encoder(token_ids).last_hidden_state
        return functional.mse_loss(self.unet(noisy, timesteps, encoder_hidden_states=hidden).sample, noise)

    @torch.no_grad()
    def sample(self, texts: Sequence[str], steps: int, generator: torch.Generator) -> Tensor:
        hidden = self.text_encoder(self.token_ids(texts)).last_hidden_state
        latents = torch.randn(len(texts), *LATENT_SHAPE, generator=generator)
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            noise = self.unet(latents, timestep, encoder_hidden_states=hidden).sample
            latents = self.scheduler.step(noise, timestep, latents, eta=1.0, generator=generator).prev_sample
        return latents

    def save(self, folder: Path, autoencoder: AutoencoderKL) -> None:
        StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder, safe_serialization=True)


def build_denoiser(folder: Path) -> Denoiser:
    """1.0 M + 0.15 M parameters, no dropout anywhere; weights from torch's global generator. The tokenizer is written
    to `folder`.
    """
    tokenizer = build_tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1],
        in_channels=LATENT_SHAPE[0],
        out_channels=LATENT_SHAPE[0],
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # as in Stable Diffusion; trailing timesteps do not use it
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )
    return Denoiser(tokenizer, text_encoder, unet, scheduler)

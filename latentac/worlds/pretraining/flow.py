"""A small Stable Diffusion 3: text encoders, flow transformer and scheduler, their joint loss, and a sampler."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from latentac.method.diffusion import CPS, Kernel, Prediction
from latentac.worlds.pretraining.tokens import tokenize

TEXT_WIDTH = 48  # of each of the two encoders
JOINT_WIDTH = 128  # wider than both texts together, so that they are padded with zeros as in Stable Diffusion 3
PATCH = 2
TRAIN_TIMESTEPS = 1000
KERNEL: Kernel = CPS(0.9)


@dataclass(frozen=True)
class FlowSizes:
    """latents: channels, height and width; width: of the transformer; text_layers: of each text encoder, the last one
    for the pooled text alone."""

    latents: tuple[int, int, int]
    width: int
    num_heads: int
    num_blocks: int
    text_layers: int = 3


@dataclass(frozen=True)
class FlowDenoiser:
    """What turns a caption and noise into latents; the three modules are trained together."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]
    transformer: SD3Transformer2DModel
    scheduler: FlowMatchEulerDiscreteScheduler
    latent_shape: tuple[int, int, int]
    sampler: str = f"{KERNEL} at even noise levels"

    def parts(self) -> dict[str, nn.Module]:
        first, second = self.text_encoders
        return {"text_encoder": first, "text_encoder_2": second, "transformer": self.transformer}

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList(self.parts().values())

    def with_modules(self, modules: nn.Module) -> Self:
        first, second, transformer = modules.children()
        return replace(self, text_encoders=(first, second), transformer=transformer)

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        return tokenize(self.tokenizers[0], texts)  # the two are equal

    def loss(self, clean: Tensor, token_ids: Tensor) -> Tensor:
        """Flow matching (Lipman et al. 2023; Esser et al. 2024, eq. 13): the mean square error of v = n - x0 at
        x = (1 - s) x0 + s n, with logit-normal s.
        """
        noise = torch.randn_like(clean)
        sigma = torch.randn(len(clean)).sigmoid()
        level = sigma[:, None, None, None]
        velocity = self.velocity((1 - level) * clean + level * noise, sigma, *self.embed(token_ids))
        return functional.mse_loss(velocity, noise - clean)

    def embed(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The penultimate hidden states side by side, padded to [B, L, JOINT_WIDTH], and the pooled texts [B, C']."""
        outputs = [encoder(token_ids, output_hidden_states=True) for encoder in self.text_encoders]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        return functional.pad(hidden, (0, JOINT_WIDTH - hidden.shape[-1])), pooled

    def velocity(self, latents: Tensor, sigma: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
        """v at latents [B, C, h, w] and sigma [B]."""
        return self.transformer(
            latents, encoder_hidden_states=hidden, pooled_projections=pooled, timestep=sigma * TRAIN_TIMESTEPS
        ).sample

    @torch.no_grad()
    def sample(self, texts: Sequence[str], steps: int, generator: torch.Generator, kernel: Kernel = KERNEL) -> Tensor:
        embedded = self.embed(self.token_ids(texts))
        latents = torch.randn(len(texts), *self.latent_shape, generator=generator)
        for sigma, sigma_next in itertools.pairwise(torch.linspace(1, 0, steps + 1)):
            levels = sigma.expand(len(texts)), sigma_next.expand(len(texts))
            velocity = self.velocity(latents, levels[0], *embedded)
            prediction = Prediction(latents - sigma * velocity, latents + (1 - sigma) * velocity)
            noise = torch.randn(latents.shape, generator=generator)
            latents = kernel.transition(latents, prediction, *levels).sample(noise)
        return latents

    def save(self, folder: Path, autoencoder: AutoencoderKL) -> None:
        StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self.scheduler,
            vae=autoencoder,
            text_encoder=self.text_encoders[0],
            tokenizer=self.tokenizers[0],
            text_encoder_2=self.text_encoders[1],
            tokenizer_2=self.tokenizers[1],
            text_encoder_3=None,
            tokenizer_3=None,
        ).save_pretrained(folder, safe_serialization=True)


def build_flow_denoiser(tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], sizes: FlowSizes) -> FlowDenoiser:
    """No dropout anywhere; weights from torch's global generator. The tokenizers must be equal."""
    channels, height, width = sizes.latents
    longer = max(height, width)  # diffusers' position table is square
    transformer = SD3Transformer2DModel(
        sample_size=longer,
        patch_size=PATCH,
        in_channels=channels,
        out_channels=channels,
        num_layers=sizes.num_blocks,
        attention_head_dim=sizes.width // sizes.num_heads,
        num_attention_heads=sizes.num_heads,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=sizes.width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=longer // PATCH,
        qk_norm="rms_norm",
    )
    _begin_as_identity(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=1.0)
    first, second = (_text_encoder(tokenizer, sizes.text_layers) for tokenizer in tokenizers)
    return FlowDenoiser(tokenizers, (first, second), transformer, scheduler, sizes.latents)


def _text_encoder(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextModelWithProjection:
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # The penultimate hidden states are not normalised: at CLIP's own scale, 0.02, they would be lost in the biases.
    for embedding in encoder.modules():
        if isinstance(embedding, nn.Embedding):
            nn.init.normal_(embedding.weight, std=0.5)
    return encoder


def _begin_as_identity(transformer: SD3Transformer2DModel) -> None:
    """adaLN-Zero (Peebles and Xie 2023, section 3.2): every block begins as the identity, and the output as 0."""
    blocks = [layer for block in transformer.transformer_blocks for layer in (block.norm1, block.norm1_context)]
    for layer in (*(norm.linear for norm in blocks), transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)

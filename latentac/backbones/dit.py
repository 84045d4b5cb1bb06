"""A diffusion transformer in the folder layout of diffusers' StableDiffusion3Pipeline, used without its T5 encoder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor

from latentac.backbones import count_tokens
from latentac.backbones.flow import FlowTransformer, watch_thirds
from latentac.backbones.pipeline import PipelineSettings
from latentac.backbones.stable_diffusion import DIT
from latentac.method.records import Conditioning
from latentac.system.errors import ConfigError, Problem

_CLIP_LENGTH = 77  # tokens of Stable Diffusion 3's CLIP encoders,
_T5_LENGTH = 256  # and the zero tokens that it puts after them where T5 would be


class DiTBackbone(FlowTransformer):
    """Stable Diffusion 3 and 3.5. Taps: `block_<i>`, the image tokens on their grid after the blocks at one third, two
    thirds and the end."""

    layout = DIT

    def __init__(self, settings: PipelineSettings, folder: Path, device: torch.device) -> None:
        super().__init__(settings, folder, device)
        # The library's own pipeline encodes the text.
        self._pipeline = StableDiffusion3Pipeline(
            transformer=self.module,
            scheduler=None,
            vae=self._autoencoder,
            text_encoder=self._load("text_encoder"),
            tokenizer=self._load("tokenizer"),
            text_encoder_2=self._load("text_encoder_2"),
            tokenizer_2=self._load("tokenizer_2"),
            text_encoder_3=None,
            tokenizer_3=None,
        )
        self.text_width: int = self.module.config.joint_attention_dim
        self.max_tokens: int = self._pipeline.tokenizer_max_length  # of both encoders
        _, height, width = self.latent_shape
        grid = height // self._patch, width // self._patch
        most = self.module.config.pos_embed_max_size
        if max(grid) > most:
            side = most * self._patch * self.image_size[0] // height
            problem, remedy = f"has more than {side} pixels per side", "Use smaller images with this model"
            raise ConfigError([Problem("backbone.image_size", list(self.image_size), problem, remedy)])
        names = watch_thirds(
            self._taps, self.module.transformer_blocks, lambda output: output[1].transpose(1, 2).unflatten(2, grid)
        )
        self.tap_shapes = dict.fromkeys(names, (self.module.inner_dim, *grid))
        self.compile()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        standard = self._pipeline.tokenizer_max_length >= _CLIP_LENGTH
        with self._tokenizing, torch.no_grad():
            tokens, _, pooled, _ = self._pipeline.encode_prompt(
                list(prompts),
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=_T5_LENGTH if standard else 0,
            )
        return Conditioning(tokens, pooled)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """For that of the two tokenizers which makes more of them."""
        with self._tokenizing:
            both = [count_tokens(one, prompts) for one in (self._pipeline.tokenizer, self._pipeline.tokenizer_2)]
        return [max(counts) for counts in zip(*both, strict=True)]

    def _network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        velocity: Tensor = self.module(
            latents,
            encoder_hidden_states=conditioning.tokens,
            pooled_projections=conditioning.pooled,
            timestep=sigma * self._num_timesteps,
            return_dict=False,
        )[0]
        return velocity

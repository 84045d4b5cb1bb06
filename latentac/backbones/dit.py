"""A diffusion transformer in the folder layout of diffusers' StableDiffusion3Pipeline, with or without T5."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from torch import Tensor

from latentac.backbones import count_tokens
from latentac.backbones.flow import FlowTransformer, watch_thirds
from latentac.backbones.layout import Layout
from latentac.backbones.pipeline import PipelineSettings
from latentac.backbones.stable_diffusion import DIT
from latentac.backbones.t5_layout import t5_parts, t5_rules
from latentac.method.records import Conditioning
from latentac.system.errors import ConfigError, Problem

_CLIP_LENGTH = 77  # tokens of Stable Diffusion 3's CLIP encoders,
_T5_LENGTH = 256  # and those of T5 that it puts after them, or as many zeros

DIT_WITH_T5 = replace(
    DIT,
    parts=(*DIT.parts, *t5_parts("text_encoder_3", "tokenizer_3")),
    rules=(*DIT.rules, *t5_rules("text_encoder_3", "tokenizer_3")),
    absent=("feature_extractor", "image_encoder"),
)


class DiTSettings(PipelineSettings):
    """How Stable Diffusion 3 computes."""

    t5: bool = False
    """Use the T5 encoder, which has 4.8 billion parameters. Without it, zeros take the place of its 256 tokens."""


class DiTBackbone(FlowTransformer):
    """Stable Diffusion 3 and 3.5. Taps: `block_<i>`, the image tokens on their grid after the blocks at one third, two
    thirds and the end."""

    Settings: ClassVar[type[PipelineSettings]] = DiTSettings
    layout = DIT

    @classmethod
    def layout_for(cls, settings: PipelineSettings) -> Layout:
        return DIT_WITH_T5 if isinstance(settings, DiTSettings) and settings.t5 else cls.layout

    def __init__(self, settings: DiTSettings, folder: Path, device: torch.device) -> None:
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
            text_encoder_3=self._load("text_encoder_3") if settings.t5 else None,
            tokenizer_3=self._load("tokenizer_3") if settings.t5 else None,
        )
        self.text_width: int = self.module.config.joint_attention_dim
        self.max_tokens: int = self._pipeline.tokenizer_max_length  # of both CLIP encoders
        self._t5_length = _T5_LENGTH if self.max_tokens >= _CLIP_LENGTH else 0
        if settings.t5:  # which reads the longest texts whole
            self._t5_length = self.max_tokens = min(_T5_LENGTH, self._pipeline.tokenizer_3.model_max_length)
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

    def compile(self) -> None:
        if self.settings.compile != "blocks":
            super().compile()
            return
        for block in self.module.transformer_blocks:  # diffusers names no repeated blocks for this class
            block.compile()

    def _text_encoders(self) -> Sequence[Any]:
        pipeline = self._pipeline
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
        return [encoder for encoder in encoders if encoder is not None]

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        with self._tokenizing:
            tokens, _, pooled, _ = self._pipeline.encode_prompt(
                list(prompts),
                None,
                None,
                device=self._text_device,
                do_classifier_free_guidance=False,
                max_sequence_length=self._t5_length,
            )
        return Conditioning(tokens, pooled)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """T5's; without it, those of that CLIP tokenizer which makes more of them."""
        pipeline = self._pipeline
        tokenizers = [pipeline.tokenizer_3] if pipeline.tokenizer_3 else [pipeline.tokenizer, pipeline.tokenizer_2]
        with self._tokenizing:
            found = [count_tokens(one, prompts) for one in tokenizers]
        return [max(counts) for counts in zip(*found, strict=True)]

    def call(self) -> dict[str, str]:
        """How many tokens stand after those of CLIP."""
        return super().call() | {"max_sequence_length": str(self._t5_length)}

    def _network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        velocity: Tensor = self.module(
            latents,
            encoder_hidden_states=conditioning.tokens,
            pooled_projections=conditioning.pooled,
            timestep=sigma * self._num_timesteps,
            return_dict=False,
        )[0]
        return velocity

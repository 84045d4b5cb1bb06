"""FLUX.1: a diffusion transformer in the folder layout of diffusers' FluxPipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from latentac.backbones import count_tokens
from latentac.backbones.attention import SwitchedSettings, check_attention, switch_attention
from latentac.backbones.flow import FlowTransformer, watch_thirds
from latentac.backbones.flux_layout import CELLS, FLUX, PATCH
from latentac.backbones.pipeline import PipelineSettings
from latentac.backbones.t5_layout import LONGEST
from latentac.method.records import Conditioning

_TIMESTEPS = 1000  # by which the transformer multiplies the noise level


class FluxSettings(SwitchedSettings):
    """How FLUX.1 computes."""

    distilled_guidance: Annotated[float, Field(ge=0, le=50)] = 3.5
    """The guidance scale that the transformer gets as an input. FLUX.1 dev learned from a guided model, and has such an
    input. No effect on models without it, such as FLUX.1 schnell."""
    text_tokens: Annotated[int, Field(ge=2, le=LONGEST)] = LONGEST
    """Tokens of T5 per prompt. FLUX.1 schnell was trained with 256."""


class FluxBackbone(FlowTransformer):
    """FLUX.1 dev and schnell, 1,024 x 1,024 pixels by default. Taps: `block_<i>`, the image tokens on their grid after
    one third, two thirds and all of the double and single blocks, counted together."""

    Settings: ClassVar[type[PipelineSettings]] = FluxSettings
    layout = FLUX
    cells = CELLS
    guides = False  # it is the distilled guidance
    packed = f"torch.nn.functional.pixel_unshuffle({{}}, {PATCH}).flatten(2).transpose(1, 2)"

    def __init__(self, settings: FluxSettings, folder: Path, device: torch.device) -> None:
        check_attention(settings, device, masked=False)
        super().__init__(settings, folder, device)
        switch_attention(self.module, settings.attention)
        self._guidance = settings.distilled_guidance if self.module.config.guidance_embeds else None
        self._text_encoder, self._tokenizer = self._load("text_encoder"), self._load("tokenizer")
        self._t5, self._t5_tokenizer = self._load("text_encoder_2"), self._load("tokenizer_2")
        self.text_width: int = self.module.config.joint_attention_dim
        self.max_tokens: int = min(settings.text_tokens, self._t5_tokenizer.model_max_length)
        _, height, width = self.latent_shape
        grid = self._grid = height // PATCH, width // PATCH
        rows, columns = torch.meshgrid(*(torch.arange(float(size), device=device) for size in grid), indexing="ij")
        self._places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        # Both kinds of block return (text, image).
        blocks = nn.ModuleList([*self.module.transformer_blocks, *self.module.single_transformer_blocks])
        names = watch_thirds(self._taps, blocks, lambda output: output[1].transpose(1, 2).unflatten(2, grid))
        self.tap_shapes = dict.fromkeys(names, (self.module.inner_dim, *grid))
        self.compile()

    @property
    def _patch(self) -> int:
        return PATCH

    def _text_encoders(self) -> Sequence[Any]:
        return [self._text_encoder, self._t5]

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """The tokens are T5's, and pooled is CLIP's vector of the prompt's beginning, up to 77 tokens."""
        settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        longest = min(self._tokenizer.model_max_length, self._text_encoder.config.max_position_embeddings)
        with self._tokenizing:
            short = self._tokenizer(list(prompts), max_length=longest, **settings).input_ids
            long = self._t5_tokenizer(list(prompts), max_length=self.max_tokens, **settings).input_ids
        tokens = self._t5(long.to(self._text_device)).last_hidden_state
        return Conditioning(tokens, self._text_encoder(short.to(self._text_device)).pooler_output)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """T5's."""
        with self._tokenizing:
            return count_tokens(self._t5_tokenizer, prompts)

    def call(self) -> dict[str, str]:
        height, width = self.image_size
        own = {"height": str(height), "width": str(width), "max_sequence_length": str(self.max_tokens)}
        return own if self._guidance is None else own | {"guidance_scale": repr(self._guidance)}

    def _network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        guidance = None if self._guidance is None else torch.full_like(sigma, self._guidance)
        velocity = self.module(
            F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2),
            encoder_hidden_states=conditioning.tokens,
            pooled_projections=conditioning.pooled,
            timestep=sigma * (self._num_timesteps / _TIMESTEPS),
            img_ids=self._places,
            txt_ids=self._places.new_zeros(conditioning.tokens.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return F.pixel_shuffle(velocity.transpose(1, 2).unflatten(2, self._grid), PATCH)

"""Z-Image: a diffusion transformer in the folder layout of diffusers' ZImagePipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from latentac.backbones import count_tokens
from latentac.backbones.attention import SwitchedSettings, check_attention, switch_attention
from latentac.backbones.flow import FlowTransformer, watch_thirds
from latentac.backbones.pipeline import PipelineSettings
from latentac.backbones.zimage_layout import CELLS, LONGEST, PATCH, ZIMAGE
from latentac.backbones.zimage_network import MULTIPLE, Places, velocity
from latentac.method.records import Conditioning
from latentac.system.errors import ConfigError, Problem
from latentac.system.modelfiles import chat

_TIMESTEPS = 1000  # by which the pipeline divides the scheduler's timestep


class ZImageSettings(SwitchedSettings):
    """How Z-Image computes."""

    text_tokens: Annotated[int, Field(ge=MULTIPLE, le=LONGEST, multiple_of=MULTIPLE)] = LONGEST
    """Tokens per prompt, 8 of them marks: a multiple of 32. Each forward pass computes all of them, so fewer save
    time."""


class ZImageBackbone(FlowTransformer):
    """Z-Image and Z-Image-Turbo, 1,024 x 1,024 pixels by default. Taps: `block_<i>`, the image tokens on their grid
    after one third, two thirds and all of the blocks in which image and text are one sequence."""

    Settings: ClassVar[type[PipelineSettings]] = ZImageSettings
    layout = ZIMAGE
    cells = CELLS
    unguided = 0.0

    def __init__(self, settings: ZImageSettings, folder: Path, device: torch.device) -> None:
        check_attention(settings, device, masked=True)
        super().__init__(settings, folder, device)
        switch_attention(self.module, settings.attention)
        self._text_encoder, self._tokenizer = self._load("text_encoder"), self._load("tokenizer")
        self.text_width: int = self.module.config.cap_feat_dim
        self.max_tokens: int = settings.text_tokens
        _, height, width = self.latent_shape
        grid = height // PATCH, width // PATCH
        _, rows, columns = self.module.config.axes_lens
        if grid[0] > rows or grid[1] > columns:
            unit = PATCH * self.image_size[0] // height
            problem = f"has more than {rows * unit} x {columns * unit} pixels"
            found = Problem("backbone.image_size", list(self.image_size), problem, "Use smaller images with this model")
            raise ConfigError([found])
        self._places = Places.of(self.module.rope_embedder, self.max_tokens, grid, device)
        cells = grid[0] * grid[1]
        names = watch_thirds(
            self._taps, self.module.layers, lambda output: output[:, :cells].transpose(1, 2).unflatten(2, grid)
        )
        self.tap_shapes = dict.fromkeys(names, (self.module.config.dim, *grid))
        self.compile()

    @property
    def _patch(self) -> int:
        return PATCH

    def compile(self) -> None:
        self._velocity = torch.compile(velocity) if self.settings.compile == "whole" else velocity
        if self.settings.compile == "blocks":
            super().compile()

    def _text_encoders(self) -> Sequence[Any]:
        return [self._text_encoder]

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """The states before the last layer. Zeros follow a prompt's last token."""
        with self._tokenizing:
            found = self._tokenizer(
                [chat(prompt) for prompt in prompts],
                padding="max_length",
                padding_side="right",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self._text_device)
        known = found.attention_mask.bool()
        output = self._text_encoder(input_ids=found.input_ids, attention_mask=known, output_hidden_states=True)
        return Conditioning(output.hidden_states[-2].masked_fill(~known[..., None], 0.0))

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """With those of the chat around the prompt."""
        with self._tokenizing:
            return count_tokens(self._tokenizer, [chat(prompt) for prompt in prompts])

    def call(self) -> dict[str, str]:
        height, width = map(str, self.image_size)
        return {"height": height, "width": width, "max_sequence_length": str(self.max_tokens)}

    def _network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        time = 1 - sigma * (self._num_timesteps / _TIMESTEPS)
        return -self._velocity(self.module, latents, time, conditioning.tokens, self._places)

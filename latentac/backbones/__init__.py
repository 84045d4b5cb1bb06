"""Denoisers: pretrained diffusion models behind one small protocol. One file a backbone, one row here."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from latentac.backbones.layout import Layout
from latentac.config.extensions import Table
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.method import diffusion
from latentac.method.records import Conditioning
from latentac.system.errors import ConfigError

# Importing a pipeline of diffusers imports image processors, which warn that torchvision is missing. None is used here.
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)


class Denoiser(Protocol):
    """A latent diffusion model in eval mode (no dropout), float32 in and out.

    Built as `Class(settings, folder, device)`, or `Class(folder, device)` without `Settings`. It may have a method
    `unconditional()`: the conditioning, one row, that classifier-free guidance takes in place of the empty prompt's.

    module: the trainable network          path: how signal and noise mix (`latentac.method.diffusion`)
    device: where it computes, and what it is given must be
    latent_shape: (channels, height, width) of one latent image
    tap_shapes: name -> (channels, height, width) of each feature map that `predict` hands to the critic
    text_width: C of the conditioning's tokens
    max_tokens: what the text encoder reads of a prompt; what `count_tokens` counts beyond it is cut off
    """

    module: nn.Module
    path: diffusion.Path
    device: torch.device
    latent_shape: tuple[int, int, int]
    tap_shapes: dict[str, tuple[int, int, int]]
    text_width: int
    max_tokens: int

    def schedule(self, num_steps: int) -> Tensor:
        """[K+1] float32 noise levels from the most noisy to 0."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Text to conditioning, one row a prompt, without gradient. Thread-safe."""
        ...

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, uncut, with the marks of its start and end. Thread-safe."""
        ...

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[diffusion.Prediction, dict[str, Tensor]]:
        """The prediction at latents [B, *latent], sigma [B], and the taps of that same forward. Thread-safe."""
        ...

    def images(self, latents: Tensor) -> Tensor:
        """Clean latents [B, *latent] to images, float32 [B, 3, H, W] in [0, 1], differentiable."""
        ...

    def decode(self, latents: Tensor) -> np.ndarray:
        """Clean latents [B, *latent] to images, uint8 [B, H, W, 3]."""
        ...

    def clone(self) -> Self:
        """Another denoiser with a copy of the module. What is never trained (autoencoder, text encoders) is shared."""
        ...

    def adapt(self, settings: PolicySettings) -> None:
        """Make the module trainable: all weights, or low-rank adapters on its attention."""
        ...

    def save(self, folder: FilePath) -> None:
        """A plain diffusers folder, adapters merged, safetensors only."""
        ...


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt for a tokenizer of transformers, uncut, its marks included. The caller holds its lock."""
    found = tokenizer(list(prompts), padding=False, truncation=False, return_attention_mask=False, verbose=False)
    return [len(ids) for ids in found.input_ids]


@torch.no_grad()
def to_arrays(images: Callable[[Tensor], Tensor], latents: Tensor) -> np.ndarray:
    """What `images` makes of latents, rounded to uint8 [B, H, W, 3] as diffusers' VaeImageProcessor does."""
    rounded = (images(latents) * 255).round().to(torch.uint8)
    array: np.ndarray = rounded.permute(0, 2, 3, 1).cpu().numpy()
    return array


BACKBONES = Table(
    "backbone",
    {
        "unet": "latentac.backbones.unet:UNetBackbone",
        "sdxl": "latentac.backbones.sdxl:SDXLBackbone",
        "dit": "latentac.backbones.dit:DiTBackbone",
        "flux": "latentac.backbones.flux:FluxBackbone",
        "zimage": "latentac.backbones.zimage:ZImageBackbone",
    },
)


def layout_of(extension: Extension) -> Layout | None:
    """The folder layout of the backbone that `extension` names; None for one that declares none."""
    kind = BACKBONES.load(extension.use, "backbone.use")
    if hasattr(kind, "layout_for"):  # it depends on the settings
        chosen: Layout = kind.layout_for(BACKBONES.settings(extension, "backbone"))
        return chosen
    layout: Layout | None = getattr(kind, "layout", None)
    return layout


def load_backbone(extension: Extension, folder: FilePath, device: torch.device) -> Denoiser:
    """The backbone that `extension` names, with the weights of a diffusers `folder`, on `device`.

    The folder is inspected first, whoever wrote it. Raises ConfigError with all that is wrong with it.
    """
    from latentac.backbones.inspection import inspect  # a part of this package, which knows its rows

    layout = layout_of(extension)
    problems = inspect(str(folder), folder, layout) if layout is not None else []
    if problems:
        raise ConfigError(problems)
    backbone: Denoiser = BACKBONES.make(extension, folder, device, path="backbone")
    return backbone

"""Classifier-free guidance: a denoiser that exaggerates what the prompt changes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from latentac.backbones import Denoiser
from latentac.config.learning import Policy
from latentac.method import diffusion
from latentac.method.records import Conditioning, join


class Guided:
    """u + scale (c - u) of a denoiser's predictions c with the prompt and u without (Ho and Salimans 2022,
    eq. 6, where scale is 1 + w), clean and noise alike, so that x = alpha x0 + sigma n stays true.

    Both come from one forward of twice the rows. The taps are those of the rows with the prompt: what a critic learned
    to read. Everything but `predict` is the denoiser's own.
    """

    def __init__(self, backbone: Denoiser, scale: float) -> None:
        self.backbone, self.scale = backbone, scale
        self.module, self.path, self.device = backbone.module, backbone.path, backbone.device
        self.latent_shape, self.tap_shapes = backbone.latent_shape, backbone.tap_shapes
        self.text_width, self.max_tokens = backbone.text_width, backbone.max_tokens
        self._empty = unconditional(backbone)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[diffusion.Prediction, dict[str, Tensor]]:
        size = len(latents)
        empty = self._empty.rows(torch.zeros(size, dtype=torch.int64, device=latents.device))
        twice = torch.cat([latents, latents]), torch.cat([sigma, sigma]), join([empty, conditioning])
        both, taps = self.backbone.predict(*twice)
        prediction = diffusion.Prediction(self._combined(both.clean), self._combined(both.noise))
        return prediction, {name: tap[size:] for name, tap in taps.items()}

    def _combined(self, both: Tensor) -> Tensor:
        without, given = both.chunk(2)
        return without + self.scale * (given - without)

    def schedule(self, num_steps: int) -> Tensor:
        return self.backbone.schedule(num_steps)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.backbone.encode(prompts)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.backbone.count_tokens(prompts)

    def images(self, latents: Tensor) -> Tensor:
        return self.backbone.images(latents)

    def decode(self, latents: Tensor) -> np.ndarray:
        return self.backbone.decode(latents)

    def clone(self) -> Self:
        return type(self)(self.backbone.clone(), self.scale)

    def adapt(self, settings: Policy) -> None:
        self.backbone.adapt(settings)

    def save(self, folder: Path) -> None:
        self.backbone.save(folder)


def unconditional(backbone: Denoiser) -> Conditioning:
    """What guidance takes for no prompt, one row: the backbone's `unconditional()` if it has that method, otherwise the
    empty prompt."""
    own: Callable[[], Conditioning] | None = getattr(backbone, "unconditional", None)
    return backbone.encode([""]) if own is None else own()


def guided(backbone: Denoiser, scale: float) -> Denoiser:
    """`backbone` with guidance of `scale`; at 1, which is no guidance, `backbone` itself and at its own cost."""
    return backbone if scale == 1 else Guided(backbone, scale)

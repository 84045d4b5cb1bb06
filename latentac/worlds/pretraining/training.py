"""The training of text encoders and denoiser together, on latents of captioned images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


class CaptionedDenoiser(Protocol):
    """What turns captions and noise into *scaled* latents, float32 [B, 4, h, w]."""

    @property
    def sampler(self) -> str:
        """How `sample` samples, for the record."""
        ...

    def parts(self) -> dict[str, nn.Module]:
        """What is trained, by the name of its folder."""
        ...

    def modules(self) -> nn.ModuleList:
        """The same as one module."""
        ...

    def with_modules(self, modules: nn.Module) -> Self:
        """This denoiser with other weights, in the order of `modules`."""
        ...

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """int64 [B, L], padded."""
        ...

    def loss(self, clean: Tensor, token_ids: Tensor) -> Tensor:
        """Of random noise at random levels on `clean`, a number; torch's global generator draws them."""
        ...

    def sample(self, texts: Sequence[str], steps: int, generator: torch.Generator) -> Tensor:
        """Latents for `texts`, without guidance and without gradient."""
        ...

    def save(self, folder: Path, autoencoder: AutoencoderKL) -> None:
        """A pipeline's folder, all weights float32 safetensors."""
        ...


@dataclass(frozen=True)
class DenoiserTraining:
    """`caption_dropout` is the share of captions replaced by the empty one, for classifier-free guidance. The learning
    rate falls linearly to the share `last_rate` of itself in `decay_steps`, and stays there.
    """

    batch: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 100
    decay_steps: int = 1
    last_rate: float = 1.0
    caption_dropout: float = 0.1
    ema_decay: float = 0.99


def train_denoiser(
    denoiser: CaptionedDenoiser,
    latents: tuple[Tensor, Tensor],
    token_ids: Tensor,
    training: DenoiserTraining,
    after_step: Callable[[int, float, nn.Module], bool],
) -> None:
    """Fits the denoiser's modules in place, until `after_step(step, loss, ema)` says stop.

    `latents`: mean and standard deviation of the *scaled* latents, float32 [N, 4, h, w] each; `token_ids` int64 [N, L].
    `ema` holds the averaged weights in the order of `modules`; they are put in at the end. Random numbers come from
    torch's global generator.
    """
    modules = denoiser.modules()
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=training.learning_rate, betas=training.betas, weight_decay=1e-4
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, 1.0, training.warmup_steps)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, training.last_rate, training.decay_steps)
    ema = torch.optim.swa_utils.AveragedModel(
        modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(training.ema_decay)
    )
    empty = denoiser.token_ids([""])
    shape = (training.batch, *latents[0].shape[1:])
    stop, step = False, 0
    while not stop:
        rows = torch.randint(len(token_ids), (training.batch,))
        dropped = torch.rand(training.batch, 1) < training.caption_dropout
        clean = latents[0][rows] + latents[1][rows] * torch.randn(shape)
        loss = denoiser.loss(clean, torch.where(dropped, empty, token_ids[rows]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        decay.step()
        ema.update_parameters(modules)
        step += 1
        stop = after_step(step, loss.item(), ema.module)
    modules.load_state_dict(ema.module.state_dict())

"""What flow-matching transformers share: their noise levels, the velocity, and where their taps are."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from latentac.backbones.pipeline import PipelineBackbone, PipelineSettings, Taps
from latentac.backbones.schedulers import flow_shift
from latentac.method import diffusion

_NUM_TAPS = 3


class FlowTransformer(PipelineBackbone):
    """A transformer that predicts the velocity n - x0 of x = (1 - sigma) x0 + sigma n.

    It knows float timesteps, sigma times their number, so a noise level needs no table here.
    """

    path: diffusion.Path = "flow"

    def __init__(self, settings: PipelineSettings, folder: Path, device: torch.device) -> None:
        super().__init__(settings, folder, device)
        _, height, width = self.latent_shape
        tokens = (height // self._patch) * (width // self._patch)
        self._shift, self._num_timesteps = flow_shift(folder, tokens)

    def schedule(self, num_steps: int) -> Tensor:
        """Even levels, shifted towards noise by the scheduler's `shift` (Esser et al. 2024, eq. 23)."""
        even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).float()
        return torch.cat([self._shift * even / (1 + (self._shift - 1) * even), torch.zeros(1)])

    def _prediction(self, latents: Tensor, sigma: Tensor, output: Tensor) -> diffusion.Prediction:
        level = diffusion.broadcast(sigma, latents)
        return diffusion.Prediction(latents - level * output, latents + (1 - level) * output)

    def _scheduler_of_schedule(self) -> Any:
        """It shifts as `schedule` does. Its spacing is its caller's: `sigmas=`."""
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=self._num_timesteps, shift=self._shift)


def watch_thirds(taps: Taps, blocks: nn.ModuleList, read: Callable[[Any], Tensor], prefix: str = "block") -> list[str]:
    """Watch the blocks at one third, two thirds and the end. Returns the taps' names, `<prefix>_<i>`."""
    places = sorted({math.ceil(len(blocks) * part / _NUM_TAPS) - 1 for part in range(1, _NUM_TAPS + 1)})
    for place in places:
        taps.watch(blocks[place], f"{prefix}_{place}", read)
    return [f"{prefix}_{place}" for place in places]

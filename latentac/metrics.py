"""What each logged number means, and the TensorBoard log of a run."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch.utils.tensorboard import SummaryWriter

DEFINITIONS = {
    "reward_mean": "mean of the first trained reward over the iteration's images, in its own unit",
    "policy_loss": "surrogate objective, mean over transitions, averaged over the iteration's updates",
    "value_loss": "0.5 (V - clamp(R))^2 in squared standard deviations of each reward, mean over the last pass",
    "kl": "KL(acting || present policy) of one denoising step in nats, mean over transitions and updates",
    "clip_share": "share of transitions whose gradient the trust region removed",
    "guidance": "KL(steered || present policy) of one step in nats: how far the actor is from what the critic asks for",
    "prediction_kl": "mean (prediction - the base's prediction)^2 over transitions and dimensions",
    "zero_std_share": "share of images in groups whose rewards are all equal, which were dropped",
    "ratio_deviation": "mean |ratio - 1|, in the unit of algorithm.log_prob_scale",
    "first_ratio_deviation": "ratio_deviation of the first update, which is 0 because nothing has changed yet",
    "gradient_norm": "L2 norm of the actor's gradient before clipping",
    "seconds": "wall time of the iteration",
    "rollout_seconds": "wall time of its rollouts, decoding and scoring included",
    "world_size": "workers that did the iteration together; an elastic app may have fewer than it asked for",
}
"""Scalars of the training history by name; an algorithm or a setting that has no such number leaves it out."""

STEPWISE = {
    "explained_variance": "1 - Var(R - V) / Var(R) of the main reward on the iteration's own rollouts",
    "rank_correlation": "Kendall's tau-b of V and R over the pairs of one prompt's rollouts, where there are such",
}
"""One number a denoising step, noise first."""


class TensorBoard:
    """Scalars and pictures of a training run below `folder`. Only the leading worker keeps one."""

    def __init__(self, folder: Path, iteration: int) -> None:
        # What a killed run wrote beyond its last checkpoint is dropped: it will be written again.
        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)

    def write(self, entry: Mapping[str, Any]) -> None:
        """One iteration's entry of the history."""
        step = entry["iteration"]
        for name in DEFINITIONS.keys() & entry.keys():
            self._writer.add_scalar(f"train/{name}", entry[name], step)
        for name, mean in entry["rewards"].items():
            self._writer.add_scalar(f"rewards/{name}", mean, step)
        for name in STEPWISE.keys() & entry.keys():
            for index, value in enumerate(entry[name]):
                self._writer.add_scalar(f"{name}/step_{index:02d}", value, step)

    def write_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """picture: uint8 [H, W, 3]."""
        self._writer.add_image(name, picture, iteration, dataformats="HWC")

    def flush(self) -> None:
        """Everything written so far is in the files."""
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

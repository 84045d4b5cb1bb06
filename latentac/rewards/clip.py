"""What the rewards that look through a CLIP have in common.

A reward of it says what it makes of a `Clip`, images and prompts; see `clip_score.py`.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latentac.rewards.learned import LearnedReward, LearnedSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from latentac.rewards.clip_folder import Clip


class ClipSettings(LearnedSettings):
    """Where a CLIP comes from and how it computes. Each reward has its own default for `source`."""

    source: str
    """A folder that CLIPModel and CLIPProcessor of transformers have saved (safetensors weights), an address of
    `latentac mirror`, or a hub id."""


class ClipReward(LearnedReward):
    """Base of the rewards that look through a CLIP."""

    conversion = ""
    """The kind of `latentac convert-weights` that makes its folder, "" for one that is published as a folder."""

    def locate(self) -> Path:
        from latentac.rewards.clip_folder import locate

        return locate(self._settings.source, self._settings.revision, self.conversion)

    def used(self, names: Collection[str]) -> set[str]:
        from latentac.rewards.clip_folder import files

        return files(names)

    def read(self, folder: Path, dtype: "torch.dtype") -> "Clip":
        from latentac.rewards.clip_folder import Clip

        return Clip(self._settings.source, folder, dtype)

    def cosines(self, clip: "Clip", images: np.ndarray, prompts: Sequence[str]) -> "Tensor":
        """float32 [B]: of the angle between each image's vector and its prompt's."""
        with self._turns:
            tokens = clip.tokenize(prompts)
        return (clip.image_vectors(clip.prepare(images)) * clip.text_vectors(tokens)).sum(dim=1)

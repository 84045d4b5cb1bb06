"""How much people prefer an image for its prompt: ImageReward (Xu et al., arXiv 2304.05977)."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latentac.rewards.learned import LearnedReward, LearnedSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from latentac.rewards.blip_folder import Scorer

_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072
"""Of the head's number, as published."""


class ImageReward(LearnedReward):
    """The number of the published head, less 0.1672 and divided by 1.0333, so that it has mean 0 and deviation 1 over
    the images that it was trained on. A prompt of more than 35 tokens loses its end."""

    unit = "ImageReward: standard deviations of its training set, 0 is its mean"

    class Settings(LearnedSettings):
        source: str
        """The folder that `latentac convert-weights --kind image_reward` has made of the published `ImageReward.pt`, or
        a hub id of such a one."""

    def locate(self) -> Path:
        from latentac.rewards.blip_folder import locate

        return locate(self._settings.source, self._settings.revision)

    def used(self, names: Collection[str]) -> set[str]:
        from latentac.rewards.blip_folder import files

        return files(names)

    def read(self, folder: Path, dtype: "torch.dtype") -> "Scorer":
        from latentac.rewards.blip_folder import Scorer

        return Scorer(self._settings.source, folder, dtype)

    def score(self, network: "Scorer", images: np.ndarray, prompts: Sequence[str]) -> "Tensor":
        with self._turns:
            tokens = network.tokenize(prompts)
        return (network.score(network.prepare(images), tokens) - _MEAN) / _DEVIATION

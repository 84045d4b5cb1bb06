"""How much people prefer an image for its prompt: HPS v2.1 (Wu et al., arXiv 2306.09341)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentac.config.sections import Rate
from latentac.rewards.clip import ClipReward, ClipSettings

if TYPE_CHECKING:
    from torch import Tensor

    from latentac.rewards.clip_folder import Clip


class Hpsv2(ClipReward):
    """`scale` times the cosine similarity of image and prompt, by a CLIP ViT-H/14 that was trained on which of several
    images people prefer. The published code returns the cosine. A prompt of more than 77 tokens loses its end."""

    conversion = "hpsv2"

    class Settings(ClipSettings):
        source: str
        """The folder that `latentac convert-weights --kind hpsv2` has made of the published `HPS_v2.1_compressed.pt`,
        or a hub id of such a one."""
        scale: Rate = 1.0
        """Factor on the cosine. 1 gives what the published code returns, 100 the unit of the published tables."""

    def __init__(self, settings: "Hpsv2.Settings") -> None:
        super().__init__(settings)
        self._scale = settings.scale
        factor = "" if settings.scale == 1 else f"{settings.scale:g} times "
        self.unit = f"{factor}HPS v2.1, a cosine that grows with people's preference"

    def score(self, clip: "Clip", images: np.ndarray, prompts: Sequence[str]) -> "Tensor":
        return self._scale * self.cosines(clip, images, prompts)

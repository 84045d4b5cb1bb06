"""How well an image goes with its prompt, in the eyes of any CLIP: CLIPScore (Hessel et al., arXiv 2104.08718)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentac.config.sections import Rate
from latentac.rewards.clip import ClipReward, ClipSettings

if TYPE_CHECKING:
    from torch import Tensor

    from latentac.rewards.clip_folder import Clip


class ClipScore(ClipReward):
    """`scale` times the cosine similarity of image and prompt, without CLIPScore's lower bound of 0 and its prefix "A
    photo depicts". A prompt of more than 77 tokens loses its end, as in CLIP itself."""

    class Settings(ClipSettings):
        source: str = "openai/clip-vit-large-patch14"
        scale: Rate = 1.0
        """Factor on the cosine. 1 gives the cosine itself, 2.5 the unit of CLIPScore, 100 / 30 that of Flow-GRPO with
        CLIP ViT-L/14."""

    def __init__(self, settings: "ClipScore.Settings") -> None:
        super().__init__(settings)
        self._scale = settings.scale
        factor = "" if settings.scale == 1 else f"{settings.scale:g} times the "
        self.unit = f"{factor}cosine similarity of image and prompt ({settings.source})"

    def score(self, clip: "Clip", images: np.ndarray, prompts: Sequence[str]) -> "Tensor":
        return self._scale * self.cosines(clip, images, prompts)

"""Which image people would pick for a prompt: PickScore (Kirstain et al., arXiv 2305.01569)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from latentac.config.sections import Rate
from latentac.rewards.clip import ClipReward, ClipSettings

if TYPE_CHECKING:
    from torch import Tensor

    from latentac.rewards.clip_folder import Clip


class PickScore(ClipReward):
    """exp(logit scale) times the cosine similarity of image and prompt, by a CLIP that was trained on which of two
    images people prefer, divided by `divisor`. A prompt of more than 77 tokens loses its end, as in CLIP itself."""

    class Settings(ClipSettings):
        source: str = "yuvalkirstain/PickScore_v1"
        divisor: Rate = 26.0
        """The score is divided by it. 26 is what Flow-GRPO divides by, so that scores are near 1; 1 gives the published
        score, which is about 18 to 26."""

    def __init__(self, settings: "PickScore.Settings") -> None:
        super().__init__(settings)
        self._divisor = settings.divisor
        part = "" if settings.divisor == 1 else f" / {settings.divisor:g}"
        self.unit = f"PickScore{part}, a difference of log-odds that people pick it"

    def score(self, clip: "Clip", images: np.ndarray, prompts: Sequence[str]) -> "Tensor":
        return clip.logit_scale.exp() * self.cosines(clip, images, prompts) / self._divisor

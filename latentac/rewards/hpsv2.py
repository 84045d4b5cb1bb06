"""How much people prefer an image for its prompt: HPS v2.1 (Wu et al., arXiv 2306.09341)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from latentac.config.sections import Rate
from latentac.rewards.clip import ClipReward, ClipSettings

if TYPE_CHECKING:
    from torch import Tensor

    from latentac.rewards.clip_folder import Clip


class Hpsv2(ClipReward):
    """`scale` times the cosine similarity of image and prompt, by a CLIP ViT-H/14 that was trained on which of several
    images people prefer. The published code returns the cosine. A prompt of more than 77 tokens loses its end. An image
    that is not square is seen whole, between black stripes."""

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
        return self._scale * self.cosines(clip, fitted(images, clip.size), prompts)


def fitted(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [B, size, size, 3] of `images` uint8 [B, H, W, 3]: the longer side made `size`, the rest black."""
    height, width = images.shape[1:3]
    scale = size / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    top, left = (size - rows) // 2, (size - columns) // 2
    found = np.zeros((len(images), size, size, 3), np.uint8)
    for whole, image in zip(found, images, strict=True):
        smaller = Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC)
        whole[top : top + rows, left : left + columns] = np.asarray(smaller)
    return found

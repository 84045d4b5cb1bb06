"""How large an image's JPEG file is: the incompressibility reward of DDPO (Black et al., arXiv 2305.13301)."""

from collections.abc import Sequence

import numpy as np

from latentac.rewards.jpeg_compressibility import JpegCompressibility


class JpegIncompressibility:
    """The size of the JPEG file at quality 95 (4:2:0, headers included), in kB of 1000 bytes. Noise has the highest
    reward."""

    unit = "kB (1000 bytes) of the JPEG file at quality 95"

    def __init__(self) -> None:
        self._opposite = JpegCompressibility()

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        images, prompts, answers = self._opposite.known()
        return images, prompts, -answers

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B], all positive, for `images` uint8 [B, H, W, 3]; the prompts play no part."""
        return -self._opposite(images, prompts)

"""How small an image's JPEG file is: the compressibility reward of DDPO (Black et al., arXiv 2305.13301)."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

QUALITY = 95
BYTES_PER_KILOBYTE = 1000


class JpegCompressibility:
    """Minus the size of the JPEG file at quality 95 (4:2:0, headers included), in kB of 1000 bytes."""

    unit = "minus kB (1000 bytes) of the JPEG file at quality 95"

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        grey = np.full((32, 32, 3), 127, np.uint8)
        ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (32, 32, 3))
        return np.stack([grey, ramp]), ["grey", "a ramp"], np.array([-0.642, -0.797], np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B], all negative, for `images` uint8 [B, H, W, 3]; the prompts play no part."""
        return np.array([-_jpeg_bytes(image) / BYTES_PER_KILOBYTE for image in images], np.float32)


def _jpeg_bytes(image: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return file.tell()

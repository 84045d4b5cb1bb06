"""How much of an image is written on: the share of pixels that stand out from the ground."""

from collections.abc import Sequence

import numpy as np

_LEAST = 48.0
"""Grey levels. Textures of the world of words differ by at most 18 from their ground, letters by 75 or more."""
_LUMINANCE = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601."""


class InkShare:
    """The share of pixels whose luminance differs from the image's median by at least 48 of 255 levels. It is watched
    beside a reward for text: a policy that fills the image, or thins its letters, changes it."""

    unit = "share of pixels that stand out from the ground, 0 to 0.5"

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        images = np.full((2, 32, 32, 3), 200, np.uint8)
        images[1, 8:24, 8:24] = 20
        return images, ["nothing", "a square"], np.array([0.0, 0.25], np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B], 0 to 0.5, for `images` uint8 [B, H, W, 3]; the prompts play no part."""
        luminance = (images @ _LUMINANCE).reshape(len(images), -1)
        ground = np.median(luminance, axis=1, keepdims=True)
        return np.asarray((np.abs(luminance - ground) >= _LEAST).mean(axis=1), np.float32)

"""How colourful an image looks: Hasler and Süsstrunk, "Measuring colourfulness in natural images", SPIE 5007, 2003."""

from collections.abc import Sequence

import numpy as np


class Colourfulness:
    """The measure M of Hasler and Süsstrunk on sRGB values: spread and mean of two opponent channels. Any saturated
    image has a high reward."""

    unit = "colourfulness M of 0 to 255 values (0 is grey, 45 average, 109 extremely colourful)"

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        grey = np.full((32, 32, 3), 127, np.uint8)
        flag = np.zeros((32, 32, 3), np.uint8)
        flag[:16, :, 0] = flag[16:, :, 2] = 255
        return np.stack([grey, flag]), ["grey", "red over blue"], np.array([0.0, 272.6187], np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B], none negative, for `images` uint8 [B, H, W, 3]; the prompts play no part."""
        return np.array([_colourfulness(image) for image in images], np.float32)


def _colourfulness(image: np.ndarray) -> float:
    """sqrt(s_rg^2 + s_yb^2) + 0.3 sqrt(m_rg^2 + m_yb^2): deviations s and means m of R - G and of (R + G) / 2 - B."""
    red, green, blue = image.reshape(-1, 3).astype(np.float64).T
    opponents = red - green, (red + green) / 2 - blue
    spread = np.hypot(*(channel.std() for channel in opponents))
    mean = np.hypot(*(channel.mean() for channel in opponents))
    return float(spread + 0.3 * mean)

"""1 where an image of the embedded world shows exactly what its caption says, 0 otherwise."""

from collections.abc import Sequence

import numpy as np

from latentac.system.errors import RewardError
from latentac.worlds.shapes.captions import CATEGORIES, Specification, parse_caption
from latentac.worlds.shapes.scenes import IMAGE_SIZE, sample_images
from latentac.worlds.shapes.verifier import verify


class ShapesVerifier:
    """1 if the image shows exactly what the prompt says, else 0, as in GenEval. `latentac.worlds.shapes.verifier`
    explains how it is decided."""

    unit = "share of images that show exactly what their caption says (0 or 1 per image)"

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        prompt = "a red circle left of a blue square"
        (image,) = sample_images([parse_caption(prompt)], np.random.default_rng(0))
        wrong = prompt.replace("left", "right")
        return np.stack([image, image]), [prompt, wrong], np.array([1, 0], np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B] of 0 and 1 for `images` uint8 [B, 32, 32, 3].

        Raises RewardError for a caption outside the shapes language, and for another size of image.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise RewardError(
                "images",
                f"are of shape {images.shape[1:]} and type {images.dtype}",
                f"Give it uint8 images of {IMAGE_SIZE} x {IMAGE_SIZE} x 3",
            )
        return verify(images, [self._parse(prompt) for prompt in prompts]).astype(np.float32)

    def _parse(self, prompt: str) -> Specification:
        try:
            return parse_caption(prompt)
        except ValueError as error:
            remedy = f"Use a caption of the categories {', '.join(CATEGORIES)}: see latentac/worlds/shapes/README.md"
            raise RewardError(f"prompt {prompt!r}", str(error), remedy) from error

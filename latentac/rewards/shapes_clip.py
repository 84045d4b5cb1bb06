"""How well an image of the embedded world goes with its caption, in the eyes of a tiny CLIP trained on that world."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from latentac.system.errors import RewardError
from latentac.worlds.shapes.captions import parse_caption, specifications
from latentac.worlds.shapes.scenes import IMAGE_SIZE, sample_images

WEIGHTS = Path(__file__).parents[1] / "worlds" / "shapes" / "weights" / "clip"
_WORDS = {word for spec in specifications() for word in spec.caption.split()}
_BATCH = 16  # scored together, a last part filled up: what an image gets does not hang on how many come with it


class ShapesClip:
    """CLIPScore (Hessel et al., arXiv 2104.08718) without its factor and its lower bound of 0. It is smooth and
    learned, so a policy can exploit it: it was trained on rendered images only, and its scores of other images are
    unreliable. It runs on the CPU in float32."""

    unit = "cosine similarity of image and caption, -1 to 1"

    def __init__(self) -> None:
        self._lock = Lock()
        self._loaded: tuple[Any, Any] | None = None

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        prompt = "a red circle left of a blue square"
        (image,) = sample_images([parse_caption(prompt)], np.random.default_rng(0))
        wrong = "three green triangles"
        return np.stack([image, image]), [prompt, wrong], np.array([0.91375, -0.74048], np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B] for `images` uint8 [B, 32, 32, 3].

        Raises RewardError for a word outside the shapes language, for another size of image, and without torch.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise RewardError(
                "images",
                f"are of shape {images.shape[1:]} and type {images.dtype}",
                f"Give it uint8 images of {IMAGE_SIZE} x {IMAGE_SIZE} x 3",
            )
        captions = [self._caption(prompt) for prompt in prompts]
        parts = [
            self._cosines(images[start : start + _BATCH], captions[start : start + _BATCH])
            for start in range(0, len(images), _BATCH)
        ]
        return np.concatenate(parts or [np.zeros(0, np.float32)])

    def _caption(self, prompt: str) -> str:
        words = prompt.lower().split()
        unknown = [word for word in words if word not in _WORDS]
        if unknown or not words:
            problem = f"has never seen {', '.join(map(repr, unknown)) or 'an empty caption'}"
            remedy = "Use the words of the shapes language: see latentac/worlds/shapes/README.md"
            raise RewardError(f"prompt {prompt!r}", problem, remedy)
        return " ".join(words)

    def _cosines(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """float32 [B] for at most _BATCH images and captions."""
        try:
            import torch

            from latentac.worlds.pretraining.clip import caption_features
            from latentac.worlds.pretraining.tokens import tokenize
            from latentac.worlds.shapes.contrastive import image_features
        except ImportError as error:  # a container image that only launches and decides has neither
            remedy = "Score where torch and transformers are installed"
            raise RewardError("packages", f"one is missing: {error}", remedy) from error

        clip, tokenizer = self._load()
        missing = _BATCH - len(images)
        filled = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)])
        with torch.no_grad():
            visual = image_features(clip, filled)
            texts = caption_features(clip, tokenize(tokenizer, captions + [""] * missing))
            return (visual * texts).sum(dim=1)[: len(images)].numpy()

    def _load(self) -> tuple[Any, Any]:
        """Model and tokenizer, read at the first call: a table of rewards is made without torch."""
        with self._lock:
            if self._loaded is None:
                from transformers import CLIPModel, CLIPTokenizer

                clip = CLIPModel.from_pretrained(WEIGHTS, local_files_only=True, use_safetensors=True)
                self._loaded = clip.float().eval(), CLIPTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
            return self._loaded

"""The two networks of GenEval as one: a detector, and a CLIP that tells colours apart."""

from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from latentac.rewards.clip_folder import Clip
from latentac.rewards.detector_folder import Detector
from latentac.rewards.geneval_tasks import COLOURS, Detection, class_name

_TEMPLATES = ("a photo of a {colour} {kind}", "a photo of a {colour}-colored {kind}", "a photo of a {colour} object")
_BLANK = 0x99
"""Grey of what is not the object, as published."""


class GenevalNetwork:
    """Calls of `colours` may come from several threads; those of `move` may not come beside them."""

    def __init__(self, detector: Detector, clip: Clip) -> None:
        self.detector, self.clip = detector, clip
        self.known = {class_name(label) for label in detector.labels}
        self._texts: dict[str, Tensor] = {}
        self._turns = Lock()

    @property
    def device(self) -> torch.device:
        return self.detector.device

    @property
    def dtype(self) -> torch.dtype:
        return self.detector.dtype

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        for each in (self.detector, self.clip):
            each.move(device, dtype)

    def colours(self, image: np.ndarray, kind: str, found: Sequence[Detection]) -> list[str]:
        """Of each object of a class in `image` uint8 [H, W, 3]: the colour whose descriptions CLIP finds nearest."""
        pixels = torch.cat([self.clip.prepare(cut_out(image, one)[None]) for one in found])
        nearest = (self.clip.image_vectors(pixels) @ self._described(kind).T).argmax(dim=1)
        return [COLOURS[number] for number in nearest.tolist()]

    def _described(self, kind: str) -> Tensor:
        """float32 [colours, width]: unit vectors, each the mean over the templates."""
        with self._turns:
            if kind not in self._texts:
                texts = [each.format(colour=colour, kind=kind) for colour in COLOURS for each in _TEMPLATES]
                vectors = self.clip.text_vectors(self.clip.tokenize(texts))
                means = vectors.unflatten(0, (len(COLOURS), len(_TEMPLATES))).mean(dim=1)
                self._texts[kind] = functional.normalize(means, dim=-1).cpu()
            return self._texts[kind].to(self.device)


def cut_out(image: np.ndarray, one: Detection) -> np.ndarray:
    """uint8 [h, w, 3]: what is in the object's box, grey where its mask is not."""
    left, top, right, bottom = (round(each) for each in one.box)
    own = image if one.mask is None else np.where(one.mask[..., None], image, np.uint8(_BLANK))
    return np.ascontiguousarray(own[top:bottom, left:right])

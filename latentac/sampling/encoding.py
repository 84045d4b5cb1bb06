"""The conditioning of many prompts: all at once where it is small, else encoded as it is asked for."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from latentac.backbones import Denoiser
from latentac.method.records import Conditioning, join

WHOLE_BYTES = 64 * 2**20
KEPT_BYTES = 2**30
HOST_BYTES = 8 * 2**30
"""Kept in the host's memory beside a GPU."""
_TOGETHER = 32


class Encoded:
    """What a backbone's text encoder makes of `texts`; `rows` is that of a `Conditioning` with all of them.

    Up to `whole_bytes` they are encoded now and stay on the backbone's device. Beyond that (20,000 prompts are 5 GB for
    Stable Diffusion 1.5, 110 GB for 3.5) a row is encoded when it is first asked for, and the last `kept_bytes` of them
    are kept in the host's memory: encoding a prompt costs a hundredth of a rollout of it. A batch that is not full is
    filled up: a network's rounding depends on a batch's shape, but not a row's on the other rows, so a row has the same
    bits whenever it is encoded, in a resumed run and on any worker. Not thread-safe.
    """

    def __init__(
        self,
        backbone: Denoiser,
        texts: Sequence[str],
        *,
        whole_bytes: int = WHOLE_BYTES,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._backbone, self._texts = backbone, texts
        row_bytes = _size(backbone.encode(texts[:1]))
        self._whole = backbone.encode(texts) if len(texts) * row_bytes <= whole_bytes else None
        self._most = kept_bytes // row_bytes
        self._kept: OrderedDict[int, Conditioning] = OrderedDict()

    def release_encoders(self) -> None:
        """Encode every text that is missing, and free the device of the text encoders, where all texts may be kept."""
        backbone = getattr(self._backbone, "backbone", self._backbone)  # below classifier-free guidance
        release = getattr(backbone, "release_text_encoders", None)
        if release is None or (self._whole is None and len(self._texts) > self._most):
            return
        if self._whole is None:
            for start in range(0, len(self._texts), _TOGETHER):
                self._kept |= self._encode(range(start, min(start + _TOGETHER, len(self._texts))))
        release()

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of the texts that `index`, int64 [N], names, on the backbone's device."""
        if self._whole is not None:
            return self._whole.rows(index)
        wanted = index.tolist()
        found = {row: self._kept[row] for row in wanted if row in self._kept}
        missing = [row for row in dict.fromkeys(wanted) if row not in found]
        for start in range(0, len(missing), _TOGETHER):
            found |= self._encode(missing[start : start + _TOGETHER])
        for row in dict.fromkeys(wanted):  # the last one used is dropped last
            self._kept[row] = found[row]
            self._kept.move_to_end(row)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return join([found[row] for row in wanted]).to(self._backbone.device)

    def _encode(self, rows: Sequence[int]) -> dict[int, Conditioning]:
        filled = [*rows, *[rows[-1]] * (_TOGETHER - len(rows))]
        host = self._backbone.encode([self._texts[row] for row in filled]).to(torch.device("cpu"))
        # A copy each: a part of the batch would keep all of it.
        return {row: host.rows(torch.tensor([place])) for place, row in enumerate(rows)}


def _size(conditioning: Conditioning) -> int:
    """Bytes."""
    parts = [conditioning.tokens] if conditioning.pooled is None else [conditioning.tokens, conditioning.pooled]
    return sum(part.numel() * part.element_size() for part in parts)

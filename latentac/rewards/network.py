"""What the rewards' networks have in common: one model, which is on one device in one dtype."""

from typing import Any

import torch


class ModelNetwork:
    """A `latentac.rewards.learned.Network` around `model`, a module of transformers. A subclass sets both attributes.

    dtype: that of the model's weights
    """

    model: Any
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """To `device`, in `dtype`. No other call may come beside it."""
        self.model.to(device=device, dtype=dtype)
        self.dtype = dtype

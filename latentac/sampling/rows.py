"""How many rows of a batch go through the network together, and what happens when memory runs out."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from latentac.system.errors import ResourceError

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class Rows:
    """The number of rows per forward pass. It changes results only by rounding.

    limit: at most so many; None for as many as the caller has. When a device runs out of memory, the limit is halved
    and stays so.
    fixed: the limit is never halved, because all workers have to do the same number of passes
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.fixed = limit, False

    def parts(self, count: int) -> list[range]:
        """`count` rows in consecutive parts of `limit`; the last one may be shorter."""
        size = self.limit or max(count, 1)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def run(self, count: int, function: Callable[[range], Result]) -> list[Result]:
        """`function` of each part, in order. A part that does not fit into memory is divided again."""
        results: list[Result] = []
        done = 0
        while done < count:
            part = range(done, min(done + (self.limit or count), count))
            try:
                results.append(function(part))
            except torch.OutOfMemoryError as error:
                self.halve(len(part), error)
                continue
            done = part.stop
        return results

    def halve(self, rows: int, error: Exception) -> None:
        """After `error`, which met a forward of `rows` rows. Raises ResourceError where a single row does not fit, or
        the limit is fixed."""
        tried, reason = min(rows, self.limit or rows), str(error).splitlines()[0]
        if self.fixed and tried > 1:
            remedy = f"Use train.micro_images={(tried + 1) // 2}: with train.sharding=full it is not halved by itself"
            raise ResourceError(
                "memory", f"is too small for {tried} rows per forward pass ({reason})", remedy
            ) from error
        if tried <= 1:
            remedy = (
                "Use policy.adaptation=lora, backbone.gradient_checkpointing=true, a smaller backbone.image_size, or a "
                "device with more memory"
            )
            raise ResourceError("memory", f"is too small for one image per forward pass ({reason})", remedy) from error
        self.limit = (tried + 1) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning("%d rows per forward pass do not fit into memory: from now on %d", tried, self.limit)

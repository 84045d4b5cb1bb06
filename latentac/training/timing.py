"""Where the seconds of an iteration go, on each worker."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from latentac.training.distributed import Mesh

PHASES = ("rollout", "policy", "critic", "waiting")
"""What is timed. `waiting` is a part of the others: time in collective operations, for other workers or for data."""


class Timing:
    """The phases of one iteration on this worker. It begins when it is made."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._began = mesh, time.monotonic()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        mesh.traffic.take()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - began

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def speed(self, images: int, seconds: float) -> dict[str, Any]:
        """What is logged of an iteration of `images` images, of all workers, that took `seconds`. All workers call it
        together.

        `phases`: of each phase the seconds of each worker, in rank order. `straggler`: the slowest worker's own time
        divided by the mean, without waiting; 1 where all are alike. `moved_bytes`: what each worker gave to collective
        operations; those within the passes of FSDP2 are not known here.
        """
        self._seconds["waiting"], moved = self._mesh.traffic.take()
        own = torch.tensor([[*self._seconds.values()]], dtype=torch.float64, device=self._mesh.device)
        each = self._mesh.gather(own).T.tolist()
        phases = dict(zip(self._seconds, each, strict=True))
        busy = [sum(parts) - 2 * parts[PHASES.index("waiting")] for parts in zip(*each, strict=True)]
        return {
            "images_per_second": images / seconds,
            "phases": phases,
            "straggler": max(busy) * len(busy) / sum(busy),
            "moved_bytes": moved,
        }

"""Many requests, one denoiser: images of one kind are drawn together, after a bounded wait in a bounded queue."""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from latentac.config.schema import Batching
from latentac.serving.generator import Drawn, Generator, Slot

Callback = Callable[[int, int, np.ndarray], None]
"""Gets the image's index, the step and float32 [N, M], its particles' values, in a thread of the batcher's."""

_NICENESS = 5


class Busy(Exception):
    """The queue is full. seconds: after which it is worth asking again."""

    def __init__(self, queued: int, seconds: int) -> None:
        super().__init__(f"{queued} images wait already")
        self.queued, self.seconds = queued, seconds


class _Abandoned(Exception):
    """Nobody waits for any image of a batch any more."""


@dataclass
class Job:
    """`count` images that are asked for together. future: of their `Drawn`, in order; ahead: images that waited
    when it came; waited: seconds until the first of its own was begun."""

    count: int
    ahead: int
    callback: Callback | None
    since: float
    future: Future[list[Drawn]] = field(default_factory=Future)
    waited: float = 0.0
    abandoned: bool = False
    drawn: dict[int, Drawn] = field(default_factory=dict)


@dataclass(frozen=True)
class _Waiting:
    job: Job
    slot: Slot
    since: float


class Batcher:
    """Workers that draw what is submitted, oldest first. A worker takes the oldest image and those of its kind that
    wait, and waits for more no longer than `batch_wait_seconds` after the oldest came."""

    def __init__(
        self, generator: Generator, settings: Batching, workers: int, drew: Callable[[int, float], None]
    ) -> None:
        """drew: gets of each batch the number of its images, and its seconds."""
        self._generator, self._settings, self._drew = generator, settings, drew
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._seconds_a_batch, self._closing = 0.0, False
        self._threads = [threading.Thread(target=self._work, name=f"draw-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Images that wait."""
        return len(self._waiting)

    def submit(self, requests: Sequence[tuple[Sequence[Slot], Callback | None]]) -> list[Job]:
        """A job for each, all of them or none. Raises Busy if they find no room."""
        now, wanted = time.monotonic(), sum(len(slots) for slots, _ in requests)
        with self._changed:
            queued = len(self._waiting)
            # An empty queue takes everything that one request may ask for.
            if queued and queued + wanted > self._settings.max_queued_images:
                raise Busy(queued, self._seconds_left())
            jobs = []
            for slots, callback in requests:
                job = Job(len(slots), len(self._waiting), callback, now)
                job.future.set_running_or_notify_cancel()  # whoever stops waiting abandons it instead
                self._waiting.extend(_Waiting(job, slot, now) for slot in slots)
                jobs.append(job)
            self._changed.notify_all()
        return jobs

    def abandon(self, job: Job) -> None:
        """Nobody waits for it any more: what is not begun is left out, and what is begun ends at its next step unless
        others share the batch."""
        with self._changed:
            job.abandoned = True
            self._waiting = deque(one for one in self._waiting if one.job is not job)
            self._changed.notify_all()

    def close(self) -> None:
        """Draw what waits, and end the workers."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _seconds_left(self) -> int:
        batches = sum(1 / self._generator.room(one.slot.kind) for one in self._waiting) / len(self._threads)
        return max(1, math.ceil(batches * self._seconds_a_batch))

    def _work(self) -> None:
        torch.set_num_threads(1)  # a worker a core: small networks gain nothing from splitting one operation
        with suppress(OSError, AttributeError):  # drawing gives way to answering probes, where the system lets it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while batch := self._next():
            started = time.monotonic()
            self._draw(batch, started)
            seconds = time.monotonic() - started
            weight = 0.2 if self._seconds_a_batch else 1.0  # of the newest in the running mean
            self._seconds_a_batch += weight * (seconds - self._seconds_a_batch)
            self._drew(len(batch), seconds)

    def _next(self) -> list[_Waiting]:
        """The next batch; nothing once it is closed and all is drawn."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                room = self._generator.room(oldest.slot.kind)
                mates = [one for one in self._waiting if one.slot.kind == oldest.slot.kind][:room]
                left = oldest.since + self._settings.batch_wait_seconds - time.monotonic()
                if len(mates) == room or left <= 0 or self._closing:
                    taken = {id(one) for one in mates}
                    self._waiting = deque(one for one in self._waiting if id(one) not in taken)
                    return mates
                self._changed.wait(left)

    def _draw(self, batch: list[_Waiting], started: float) -> None:
        jobs = {id(one.job): one.job for one in batch}.values()
        for job in jobs:
            job.waited = job.waited or started - job.since

        def observe(step: int, values: np.ndarray) -> None:
            if all(job.abandoned for job in jobs):
                raise _Abandoned
            for one, own in zip(batch, values, strict=True):
                if one.job.callback is not None:
                    one.job.callback(one.slot.index, step, own)

        try:
            drawn = self._generator.draw([one.slot for one in batch], observe)
        except _Abandoned:
            return
        except Exception as error:  # noqa: BLE001 - whoever waits for an image gets the reason
            for job in jobs:
                self._fail(job, error)
            return
        for one, image in zip(batch, drawn, strict=True):
            self._keep(one.job, one.slot, image)

    def _fail(self, job: Job, error: Exception) -> None:
        self.abandon(job)
        with self._changed:
            if not job.future.done():
                job.future.set_exception(error)

    def _keep(self, job: Job, slot: Slot, image: Drawn) -> None:
        with self._changed:
            job.drawn[slot.index] = image
            if len(job.drawn) == job.count and not job.future.done():
                job.future.set_result([job.drawn[index] for index in sorted(job.drawn)])

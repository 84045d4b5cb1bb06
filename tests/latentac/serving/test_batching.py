"""The queue between requests and the denoiser, with a real generator at its end."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from latentac.config.schema import Batching
from latentac.serving.batching import Batcher, Busy
from latentac.serving.generator import Generator
from latentac.serving.request import validated

SECONDS = 60.0


class World:
    """A batcher, and what it drew: the number of images of each batch."""

    def __init__(self, generator: Generator, **settings: Any) -> None:
        self.generator, self.batches = generator, list[int]()
        self.batcher = Batcher(generator, Batching(**settings), 1, lambda images, _: self.batches.append(images))

    def submit(self, *seeds: int, callback: Any = None, **fields: Any) -> list[Any]:
        """A job for each seed."""
        fields = {"prompt": "a red circle", "method": "none", "num_steps": 2} | fields
        requests = [validated(self.generator.forms.request, fields | {"seed": seed}) for seed in seeds]
        return self.batcher.submit([(self.generator.slots(request), callback) for request in requests])


@pytest.fixture
def world(generator: Generator) -> Iterator[World]:
    """Images wait long enough for each other that a slow machine makes no difference."""
    found = World(generator, batch_wait_seconds=0.3, max_queued_images=8)
    yield found
    found.batcher.close()


def test_images_of_one_kind_share_a_batch(world: World, generator: Generator) -> None:
    """As many as there is room for; each job has its own image, the one that it would get alone."""
    jobs = world.submit(0, 1, 2, 3, 4, 5)
    images = [job.future.result(SECONDS)[0].image for job in jobs]
    assert world.batches == [4, 2]
    for seed, image in enumerate(images):
        alone = generator.generate("a red circle", seed, num_steps=2, method="none").images[0]
        assert np.array_equal(image, alone)


def test_other_kinds_wait_their_turn(world: World) -> None:
    """Another number of steps cannot share; the oldest image decides what is drawn next."""
    first, other, later = world.submit(0) + world.submit(1, num_steps=3) + world.submit(2)
    done = [job.future.result(SECONDS) for job in (first, later, other)]
    assert world.batches == [2, 1]
    assert [len(images[0].values) for images in done] == [2, 2, 3]


def test_a_full_queue_takes_all_of_a_request_or_nothing(world: World) -> None:
    """With the seconds after which it is worth asking again; what had its place keeps it."""
    jobs = world.submit(0, num_steps=90) + world.submit(*range(6), num_steps=50)
    with pytest.raises(Busy) as caught:
        world.submit(6, 7, 8)
    assert (caught.value.queued, caught.value.seconds >= 1) == (len(jobs), True)
    assert len([job.future.result(SECONDS) for job in jobs]) == 7


def test_an_abandoned_job_is_not_drawn(world: World) -> None:
    """Neither while it waits, nor further once it has begun; others in its batch get their images."""
    begun = threading.Event()
    steps: list[int] = []

    def callback(index: int, step: int, values: np.ndarray) -> None:
        steps.append(step)
        begun.set()

    [drawn] = world.submit(0, num_steps=100, callback=callback)
    [waiting] = world.submit(1, num_steps=4)
    assert begun.wait(SECONDS)
    world.batcher.abandon(drawn)
    world.batcher.abandon(waiting)
    [mate, gone] = world.submit(2, 3)
    world.batcher.abandon(gone)
    assert len(mate.future.result(SECONDS)) == 1
    assert (waiting.future.done(), drawn.future.done(), len(steps) < 100) == (False, False, True)


def test_every_step_is_reported(world: World) -> None:
    """With the image's index and its particles' values; they end where the image's own do."""
    reported: list[tuple[int, int, tuple[int, ...]]] = []
    [job] = world.submit(
        0, count=2, method="best_of_n", particles=2, callback=lambda i, step, v: reported.append((i, step, v.shape))
    )
    job.future.result(SECONDS)
    assert sorted(reported) == [(index, step, (2, 2)) for index in (0, 1) for step in (0, 1)]


def test_a_failure_is_reported_to_those_it_concerns(world: World) -> None:
    """And the worker goes on."""

    def broken(index: int, step: int, values: np.ndarray) -> None:
        raise RuntimeError("broken")

    [job] = world.submit(0, callback=broken)
    with pytest.raises(RuntimeError, match="broken"):
        job.future.result(SECONDS)
    assert len(world.submit(1)[0].future.result(SECONDS)) == 1


def test_closing_draws_what_waits(generator: Generator) -> None:
    """At once, not after the wait for others."""
    world = World(generator, batch_wait_seconds=60.0)
    jobs, began = world.submit(0, 1), time.monotonic()
    world.batcher.close()
    assert all(job.future.done() for job in jobs)
    assert time.monotonic() - began < 50

"""The workers of a training job: which images each computes, and the collectives between them."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import cast

import torch
import torch.distributed
from torch import Tensor

from latentac.sampling.devices import pick_device

BUCKET_BYTES = 25 * 2**20
"""Of gradients that travel together."""


class PeerLost(RuntimeError):
    """Another worker went away in the middle of a collective. Nothing is wrong here: the elastic agent starts anew."""


class Traffic:
    """What this worker gave to collective operations, and the seconds that it spent in them."""

    def __init__(self) -> None:
        self._seconds, self._bytes = 0.0, 0

    @contextlib.contextmanager
    def operation(self, *sent: Tensor) -> Iterator[None]:
        """Count the body, in which `sent` leaves. What it raises comes from the other workers (`PeerLost`): each worker
        calls the same operations with the same shapes."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        finally:
            self._seconds += time.monotonic() - began
            self._bytes += sum(tensor.nbytes for tensor in sent)

    def take(self) -> tuple[float, int]:
        """Seconds and bytes since the last time."""
        taken = self._seconds, self._bytes
        self._seconds, self._bytes = 0.0, 0
        return taken


@dataclass(frozen=True)
class Mesh:
    """The workers of a training app. rank 0 leads: it alone writes."""

    rank: int
    size: int
    device: torch.device
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    @classmethod
    def join(cls, device_name: str) -> "Mesh":
        """Join the process group that the elastic agent announced (NCCL on GPUs, gloo on CPUs)."""
        device = pick_device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with Traffic().operation():
            torch.distributed.init_process_group(backend, timeout=timedelta(minutes=10))
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)

    @classmethod
    def single(cls, device: torch.device) -> "Mesh":
        """The mesh of one process that trains alone."""
        return cls(0, 1, device)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def own(self, blocks: int) -> range:
        """The blocks of this worker: consecutive, and at most one more for one worker than for another. Each worker has
        at least one if there are as many blocks as workers."""
        first, end = (rank * blocks // self.size for rank in (self.rank, self.rank + 1))
        return range(first, end)

    def gather(self, tensor: Tensor) -> Tensor:
        """The workers' tensors [N, ...] joined along the first axis, in rank order, on every worker. N may differ."""
        if self.size == 1:
            return tensor
        own = torch.tensor([len(tensor)], device=tensor.device)
        counts = [torch.empty_like(own) for _ in range(self.size)]
        with self.traffic.operation(own):
            torch.distributed.all_gather(counts, own)
            rows = torch.cat(counts).tolist()
        # A collective operation takes equal shapes.
        sent = tensor.new_zeros(max(rows), *tensor.shape[1:])
        sent[: len(tensor)] = tensor
        parts = [torch.empty_like(sent) for _ in rows]
        with self.traffic.operation(sent):
            torch.distributed.all_gather(parts, sent)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    def any(self, wanted: bool) -> bool:
        """Whether any worker wants it; the same answer on every worker."""
        return bool(self.gather(torch.tensor([float(wanted)], device=self.device)).any())

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over the workers. Buckets of BUCKET_BYTES travel one behind the other."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sent = [(bucket, _send(bucket, self.traffic)) for bucket in _buckets(gradients)]
        for bucket, travelling in sent:
            travelling.receive(bucket)


class GradientSum:
    """Sums gradients over the workers in the buckets of `Mesh.sum_gradients`, while a backward pass goes on.

    A bucket travels as soon as all its gradients are final, which they become in the last backward pass of an update:
    before it, gradients of several passes add up on each worker alone. All workers send the buckets in one order: that
    in which the first update of rank 0 completed them. The first update itself sends all of them at its end.

    Each bucket travels once per update. If a worker runs out of memory in its last backward pass and repeats its passes
    with fewer rows, then what it has sent stays as it is: these gradients were final, and the new ones differ from
    them by rounding. So no worker sends more buckets than another, nor in another order.
    """

    def __init__(self, mesh: Mesh, weights: Sequence[tuple[Tensor, Tensor]], *, active: bool) -> None:
        """weights: (weight of the network, weight of the optimizer, which has the gradient); active: whether this
        object sums at all."""
        self.active = active and mesh.size > 1
        self._mesh, self._weights = mesh, [own for _, own in weights]
        self._armed = False
        self._seen: list[int] = []  # of the weights, in the order in which the last backward pass finished them
        self._buckets: list[list[int]] = []  # in the order in which they are sent
        self._bucket_of: dict[int, int] = {}
        self._missing: list[int] = []  # of each bucket: gradients that are not final yet
        self._sent: list[_Travelling] = []
        if self.active:
            for index, (weight, _) in enumerate(weights):
                weight.register_post_accumulate_grad_hook(partial(self._finished, index))

    def begin(self) -> None:
        """An update begins."""
        self._sent = []

    @contextlib.contextmanager
    def last_pass(self, last: bool) -> Iterator[None]:
        """While the body does a pass: the last one of the update if `last`, for all that this worker knows."""
        self._armed, self._seen, self._missing = last, [], [len(bucket) for bucket in self._buckets]
        try:
            yield
        finally:
            self._armed = False

    def finish(self) -> None:
        """Send what was not sent, and replace each gradient by its sum."""
        if not self.active:
            return
        if not self._buckets:
            self._divide()
        for bucket in self._buckets[len(self._sent) :]:
            self._send(bucket)
        for bucket, travelling in zip(self._buckets, self._sent, strict=True):
            travelling.receive(self._gradients(bucket))
        new = [w for index, w in enumerate(self._weights) if w.grad is not None and index not in self._bucket_of]
        self._mesh.sum_gradients(new)  # none, unless the loss has changed what it depends on

    def _finished(self, index: int, weight: Tensor) -> None:
        if not self._armed:
            return
        self._seen.append(index)
        if index in self._bucket_of:
            self._missing[self._bucket_of[index]] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send(self._buckets[len(self._sent)])

    def _divide(self) -> None:
        """Find the buckets, and their order: rank 0's, though the same network completes them in the same order."""
        places = {index: place for place, index in enumerate(self._seen)}
        have = [index for index, weight in enumerate(self._weights) if weight.grad is not None]
        sizes = map(len, _buckets([self._weights[index] for index in have]))
        rest = iter(have)
        buckets = [list(itertools.islice(rest, size)) for size in sizes]
        order = sorted(range(len(buckets)), key=lambda one: max(places.get(index, -1) for index in buckets[one]))
        order = self._mesh.gather(torch.tensor([order], device=self._mesh.device))[0].tolist()
        self._buckets = [buckets[one] for one in order]
        self._bucket_of = {index: place for place, bucket in enumerate(self._buckets) for index in bucket}

    def _send(self, bucket: Sequence[int]) -> None:
        self._sent.append(_send(self._gradients(bucket), self._mesh.traffic))

    def _gradients(self, bucket: Sequence[int]) -> list[Tensor]:
        weights = [self._weights[index] for index in bucket]
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return [cast(Tensor, weight.grad) for weight in weights]


@dataclass(frozen=True)
class _Travelling:
    """The gradients of a bucket, joined, while the workers sum them."""

    flat: Tensor
    work: "torch.distributed.Work"
    traffic: Traffic

    def receive(self, bucket: Sequence[Tensor]) -> None:
        """Wait for the sum, and put it into the bucket's gradients."""
        with self.traffic.operation():
            self.work.wait()
        for gradient, part in zip(bucket, self.flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _send(bucket: Sequence[Tensor], traffic: Traffic) -> _Travelling:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    with traffic.operation(flat):
        work = cast("torch.distributed.Work", torch.distributed.all_reduce(flat, async_op=True))
    return _Travelling(flat, work, traffic)


@contextlib.contextmanager
def lost_peers() -> Iterator[None]:
    """Of collectives that others start, such as FSDP2's within a forward pass: what they raise, as PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error):  # gloo has no class of its own
            raise PeerLost(str(error)) from error
        raise


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of together at most BUCKET_BYTES; a larger one is alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket

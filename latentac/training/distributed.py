"""The workers of a training job: which images each computes, and the collectives between them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor

from latentac.sampling.devices import pick_device

BUCKET_BYTES = 25 * 2**20
"""Of gradients that travel together."""


class PeerLost(RuntimeError):
    """Another worker went away in the middle of a collective. Nothing is wrong here: the elastic agent starts anew."""


@dataclass(frozen=True)
class Mesh:
    """The workers of a training app. rank 0 leads: it alone writes."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device_name: str) -> "Mesh":
        """Join the process group that the elastic agent announced (NCCL on GPUs, gloo on CPUs)."""
        device = pick_device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        with _peers():
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
        with _peers():
            own = torch.tensor([len(tensor)], device=tensor.device)
            counts = [torch.empty_like(own) for _ in range(self.size)]
            torch.distributed.all_gather(counts, own)
            rows = torch.cat(counts).tolist()
            # A collective operation takes equal shapes.
            sent = tensor.new_zeros(max(rows), *tensor.shape[1:])
            sent[: len(tensor)] = tensor
            parts = [torch.empty_like(sent) for _ in rows]
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
        sent = []
        with _peers():
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                sent.append((bucket, flat, torch.distributed.all_reduce(flat, async_op=True)))
            for bucket, flat, work in sent:
                work.wait()
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))


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


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """What a collective raises comes from its peers: every worker calls the same ones with the same shapes."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error)) from error

"""Who computes what, and with which noise.

Every random draw is a function of what it is for: (seed, purpose, iteration, prompt, rollout). No generator's state
travels, so a resumed run and a run on another number of workers draw the same numbers.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from latentac.reading import whole_variable

Item = TypeVar("Item")
Result = TypeVar("Result")


def seed_for(seed: int, *purpose: object) -> int:
    """A seed that depends on `seed` and `purpose` alone."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on `seed` and `purpose` alone."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))


def noise_for(keys: Sequence[tuple[object, ...]], seed: int, num_steps: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal [len(keys), K+1, *shape]: the first latents and each step's draw of one rollout a key.

    Drawn one after the other, as a pipeline of diffusers does that is given the key's generator.
    """
    generators = [generator_for(seed, *key) for key in keys]
    draws = [[torch.randn(*shape, generator=each) for _ in range(num_steps + 1)] for each in generators]
    return torch.stack([torch.stack(steps) for steps in draws])


def uniforms_for(keys: Sequence[tuple[object, ...]], seed: int, num_steps: int) -> Tensor:
    """U(0, 1) [len(keys), K]: one number a step for whatever chooses among the candidates of an image."""
    return torch.stack([torch.rand(num_steps, generator=generator_for(seed, "uniforms", *key)) for key in keys])


def pick_device(name: str) -> torch.device:
    """`auto` is the worker's own GPU where there is one, else the CPU. Raises ConfigError where LOCAL_RANK, which the
    agent of the workers sets, names none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    last = max(torch.cuda.device_count() - 1, 0)
    return torch.device("cuda", whole_variable("LOCAL_RANK", 0, last, 0))


def map_blocks(function: Callable[[Item], Result], blocks: Sequence[Item], device: torch.device) -> list[Result]:
    """`function` of each block, in order. On a CPU, one thread a core with one arithmetic thread each: small networks
    gain nothing from splitting a single operation, and blocks are independent of each other bitwise."""
    if device.type != "cpu":
        return [function(block) for block in blocks]
    workers, threads = num_cores(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(function, blocks))
    finally:
        torch.set_num_threads(threads)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


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

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def own(self, blocks: int) -> range:
        """The blocks of this worker: consecutive, as many for each. `blocks` is a multiple of the size."""
        share = blocks // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def gather(self, tensor: Tensor) -> Tensor:
        """The workers' tensors joined along the first axis, in rank order, on every worker."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _peers():
            torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def any(self, wanted: bool) -> bool:
        """Whether any worker wants it; the same answer on every worker."""
        return bool(self.gather(torch.tensor([float(wanted)], device=self.device)).any())

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over the workers, in one message."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _peers():
            torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """What a collective raises comes from its peers: every worker calls the same ones with the same shapes."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error)) from error

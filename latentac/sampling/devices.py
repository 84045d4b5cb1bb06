"""Where a network computes: the device of a process, and the cores that it may use."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch

from latentac.system.errors import ConfigError, Problem
from latentac.system.reading import whole_variable

_CPU_WORKERS = 2
Item = TypeVar("Item")
Result = TypeVar("Result")


def pick_device(name: str) -> torch.device:
    """`auto` is the worker's own GPU where there is one, else the CPU. Raises ConfigError where LOCAL_RANK, which the
    agent of the workers sets, names none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    last = max(torch.cuda.device_count() - 1, 0)
    return torch.device("cuda", whole_variable("LOCAL_RANK", 0, last, 0))


def count_workers(wanted: int | Literal["auto"], num_blocks: int, device: str) -> int:
    """Workers on this machine. device: `cpu` or `cuda`.

    `auto` is the largest number that divides the blocks of an iteration: up to one per visible GPU, or two on a CPU.
    Raises ConfigError for more workers than GPUs.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if wanted == "auto":
        return max(count for count in range(1, (gpus or _CPU_WORKERS) + 1) if num_blocks % count == 0)
    if gpus and wanted > gpus:
        problem = f"each worker needs a GPU, and {gpus} {'is' if gpus == 1 else 'are'} visible here"
        remedy = "Use train.num_workers=auto, or backbone.device=cpu"
        raise ConfigError([Problem("train.num_workers", wanted, problem, remedy)])
    return wanted


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


@contextmanager
def few_threads() -> Iterator[None]:
    """One arithmetic thread on the CPU, or as many as OMP_NUM_THREADS says, while the body runs.

    An operation of a small network is too short to split: on a busy machine two threads can take twenty times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(whole_variable("OMP_NUM_THREADS", 1, 1024, 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)

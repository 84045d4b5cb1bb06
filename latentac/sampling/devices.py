"""Where a network computes: the device of a process, and the cores that it may use."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar

import torch

from latentac.system.errors import ConfigError, Problem
from latentac.system.reading import whole_variable

_CPU_WORKERS = 2
_WAITING_BLOCKS = 2  # so that the next block's scores are asked for before the last ones of this block have come
Item = TypeVar("Item")
Made = TypeVar("Made")
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

    `auto` is one per visible GPU, or two on a CPU, and at most one per block of an iteration.
    Raises ConfigError for more workers than GPUs.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if wanted == "auto":
        return min(gpus or _CPU_WORKERS, num_blocks)
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


def map_overlapped(
    make: Callable[[Item], Made],
    finish: Callable[[Made], Result],
    blocks: Sequence[Item],
    device: torch.device,
    alone: bool = True,
    outside: bool = False,
) -> list[Result]:
    """`finish(make(block))` of each block, in order.

    On a CPU as `map_blocks`. Where `finish` waits for other processes (`outside`), it does so in threads of its own,
    and `make` goes on with further blocks. On a GPU, and where other workers have the other cores (`alone` is false),
    `finish` of a block runs in a thread while `make` of the next one runs here: rewards are scored during the next
    rollouts. No more than two blocks are then held by both. What either raises is raised here, after the call that
    `finish` is in.
    """
    if alone and device.type == "cpu":
        if not outside:
            return map_blocks(lambda block: finish(make(block)), blocks, device)
        with ThreadPoolExecutor(_WAITING_BLOCKS) as others:
            pending = map_blocks(lambda block: others.submit(finish, make(block)), blocks, device)
            return [one.result() for one in pending]
    results: list[Result] = []
    running: _Running[Result] | None = None
    for block in blocks:
        made = make(block)
        if running is not None:
            results.append(running.result())
        running = _Running(finish, made)
    return results if running is None else [*results, running.result()]


class _Running(Generic[Result]):
    """A call in a thread that ends with the process: nobody waits for it who is interrupted."""

    def __init__(self, function: Callable[[Made], Result], argument: Made) -> None:
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, argument), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[Made], Result], argument: Made) -> None:
        try:
            self._result.append(function(argument))
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error

    def result(self) -> Result:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result[0]


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

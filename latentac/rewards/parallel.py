"""Work of one call in several threads: requests that wait for a server, engines that leave Python's lock alone."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def each_in_parallel(items: Iterable[T], work: Callable[[T], None], threads: int, name: str) -> None:
    """Call `work` with each of the items, from at most `threads` threads, the caller's among them.

    name: of the threads. Raises the first exception of `work`; items that have not begun by then are left out.
    """
    waiting, failed = deque(items), list[Exception]()

    def go_on() -> None:
        while not failed:
            try:
                item = waiting.popleft()
            except IndexError:
                return
            try:
                work(item)
            except Exception as error:  # noqa: BLE001 - raised below, in the thread that asked
                failed.append(error)

    others = [threading.Thread(target=go_on, name=name, daemon=True) for _ in range(min(len(waiting), threads) - 1)]
    for thread in others:
        thread.start()
    go_on()
    for thread in others:
        thread.join()
    if failed:
        raise failed[0]

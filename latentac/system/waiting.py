"""Waits for somebody else. Each of them ends.

The timeouts of HTTP clients bound the silence between two bytes. Whoever sends one byte a second is never silent, and
looking up a name has no timeout at all. So a call that talks to somebody else runs within a bound of its whole time.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, ClassVar, TypeVar, cast

T = TypeVar("T")
_Outcome = tuple[Any, BaseException | None]


class TimeUp(TimeoutError):
    """A call has not ended within its time."""


@dataclass(frozen=True)
class Bounds:
    """How long to ask a server. answer_seconds: for one whole answer; retry_seconds: no attempt begins later than this
    after the first one. So there is an answer or an error after `total_seconds`."""

    answer_seconds: float = 30.0
    retry_seconds: float = 30.0

    @property
    def total_seconds(self) -> float:
        return self.retry_seconds + self.answer_seconds


class _Worker:
    """A daemon thread that makes calls, one after another."""

    idle: ClassVar[deque["_Worker"]] = deque()

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[Callable[[], Any], SimpleQueue[_Outcome]]] = SimpleQueue()
        threading.Thread(target=self._work, name="latentac-within", daemon=True).start()

    def _work(self) -> None:
        while True:
            call, outcome = self.calls.get()
            try:
                ended: _Outcome = (call(), None)
            except BaseException as error:  # noqa: BLE001 - raised again, where it was asked for
                ended = (None, error)
            self.idle.append(self)
            outcome.put(ended)
            del call, outcome, ended  # they may hold much


os.register_at_fork(after_in_child=_Worker.idle.clear)  # their threads stayed in the parent


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. Raises TimeUp once it has taken `seconds`.

    The call runs in a daemon thread. One that is given up stays there until its own timeouts end it, and what it asked
    for may still be done.
    """
    outcome: SimpleQueue[_Outcome] = SimpleQueue()
    try:
        worker = _Worker.idle.pop()
    except IndexError:
        worker = _Worker()
    worker.calls.put((call, outcome))
    try:
        result, error = outcome.get(timeout=seconds)
    except Empty:
        raise TimeUp(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return cast(T, result)

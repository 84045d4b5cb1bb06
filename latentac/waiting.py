"""Waits for somebody else. Each of them ends.

The timeouts of HTTP clients bound the silence between two bytes. Whoever sends one byte a second is never silent, and
looking up a name has no timeout at all. So a call that talks to somebody else runs within a bound of its whole time.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


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


def within(seconds: float, call: Callable[[], T], moved_at: Callable[[], float] | None = None) -> T:
    """What `call` returns or raises. Raises TimeUp once it has taken `seconds`, or once `seconds` have passed since
    `moved_at()` (by `time.monotonic`), the last time that something moved.

    The call runs in a daemon thread. One that is given up stays there until its own timeouts end it, and what it asked
    for may still be done.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again, where it was asked for
            errors.append(error)
        finally:
            ended.set()

    began = time.monotonic()
    until = began + seconds
    threading.Thread(target=work, name="latentac-within", daemon=True).start()
    while not ended.wait(max(0.0, until - time.monotonic())):
        if moved_at is not None:
            until = max(began, moved_at()) + seconds
        if time.monotonic() >= until:
            raise TimeUp(f"no answer within {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]

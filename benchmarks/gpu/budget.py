"""The time of the run, dealt to its parts: a part that takes too long is stopped, and the others keep their share."""

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


class OverBudget(BaseException):
    """A part's time is used up. No error of the work, so nothing in between may take it for one."""


class Budget:
    """seconds: of the whole run; parts: the share of each part in seconds, in their order.

    A part gets what those before it have left over, but nothing of those behind it.
    """

    def __init__(self, seconds: float, parts: Mapping[str, float]) -> None:
        self._began, self._seconds = time.monotonic(), seconds
        self._waiting = dict(parts)
        self._end = self._began

    @property
    def spent(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds that the present part still has."""
        return self._end - time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Raises OverBudget within the body once the part's time is used up, and at once where nothing is left."""
        self._waiting.pop(name)
        limit = self._seconds - self.spent - sum(self._waiting.values())
        self._end = time.monotonic() + limit
        say(f"[{self.spent:5.0f} s] {name}: at most {max(limit, 0):.0f} s")
        reason = f"stopped: its time of {max(limit, 0):.0f} s was used up"
        if limit <= 0:
            raise OverBudget(reason)

        def stop(number: int, frame: FrameType | None) -> None:
            raise OverBudget(reason)

        began, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
        others, _ = signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            yield
        finally:
            # A timer that ran before, such as that of a test, goes on.
            remaining = max(others - (time.monotonic() - began), 1e-3) if others else 0.0
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, remaining)


def say(text: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()

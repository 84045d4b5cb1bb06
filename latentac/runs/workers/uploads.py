"""Uploads in the background: one runs, one waits, and the time without an answer of the store has a bound.

One thread uploads. What is submitted while it works waits, and something newer takes its place: what is behind never
grows. A store that does not answer is asked again, with pauses that grow and have jitter, and each time with the newest
upload. The owner goes on with its work, and learns from `check` that an upload failed for good, or that the store has
not answered for too long.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from latentac.system.errors import StoreUnavailable

THREAD = "latentac-uploads"
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 15.0
_POLL_SECONDS = 0.1
_QUIET_SECONDS = 5.0
"""Of a wait, until it is announced."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """what: its name in messages; action: does all of it, and may be repeated; iteration: whose state it is."""

    what: str
    action: Callable[[], object]
    iteration: int


class Uploads:
    """To the store at `where`, which may be without an answer for `max_seconds` (the value of the setting `setting`).

    kept: says in messages where the data is meanwhile.
    """

    def __init__(self, where: str, max_seconds: float, *, setting: str, kept: str) -> None:
        self._where, self._max_seconds, self._setting, self._kept = where, max_seconds, setting, kept
        self._changed = threading.Condition()
        self._running: Upload | None = None
        self._waiting: Upload | None = None
        self._error: Exception | None = None
        self._silent_since: float | None = None
        self._ended = False
        self._thread: threading.Thread | None = None

    def submit(self, upload: Upload) -> None:
        """Upload it after the one that runs, instead of one that waits. Returns at once."""
        with self._changed:
            self._waiting = upload
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def pending(self) -> list[Upload]:
        """What runs and what waits."""
        with self._changed:
            return [upload for upload in (self._running, self._waiting) if upload is not None]

    def check(self) -> None:
        """Raises the error of an upload that cannot succeed, and StoreUnavailable beyond the bound."""
        with self._changed:
            error, since = self._error, self._silent_since
        if error is not None:
            raise error
        silent = time.monotonic() - since if since is not None else 0.0
        if silent > self._max_seconds:
            problem = f"it has not answered for {silent:.0f} s, and {self._setting} = {self._max_seconds:g}"
            remedy = f"Resume the run when the store answers again. {self._kept}"
            raise StoreUnavailable(self._where, problem, remedy)

    def settle(self, ends_at: Callable[[], float] = lambda: float("inf")) -> bool:
        """Wait until nothing is pending. False if `ends_at`, by `time.monotonic`, came first; it may change meanwhile.

        Raises as `check` does, so a store that does not answer is waited for no longer than while training goes on.
        """
        began, announced = time.monotonic(), False
        while True:
            self.check()
            with self._changed:
                if self._running is None and self._waiting is None:
                    return True
                self._changed.wait(_POLL_SECONDS)
            now = time.monotonic()
            if now >= ends_at():
                return not self.pending()
            if now > began + _QUIET_SECONDS and not announced:
                announced = True
                waited = ", then ".join(upload.what for upload in self.pending())
                _log.warning("waiting until the store has %s", waited or "everything")

    def end(self, seconds: float) -> list[Upload]:
        """Start nothing any more, and wait for at most `seconds` for what is pending, if the store answers. Returns
        what was not uploaded; an upload that still runs ends with the process."""
        ends_at = time.monotonic() + seconds
        with self._changed:
            while self._error is None and self._silent_since is None and (self._running or self._waiting):
                if not self._changed.wait(ends_at - time.monotonic()) and time.monotonic() >= ends_at:
                    break
            self._ended = True
            self._changed.notify_all()
        return self.pending()

    def _work(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while (upload := self._next()) is not None:
            began = time.monotonic()
            try:
                upload.action()
            except StoreUnavailable as error:
                self._is_silent(upload, error, began)
                with self._changed:
                    self._changed.wait_for(lambda: self._ended, pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except Exception as error:  # noqa: BLE001 - raised again by `check`, in the owner's thread
                with self._changed:
                    self._error = error
                    self._running, self._waiting = None, self._waiting or upload
                    self._changed.notify_all()
                return
            else:
                self._is_done(upload)
                pause = _FIRST_PAUSE_SECONDS

    def _next(self) -> Upload | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._waiting is not None)
            if self._ended:
                return None
            self._running, self._waiting = self._waiting, None
            return self._running

    def _is_silent(self, upload: Upload, error: StoreUnavailable, began: float) -> None:
        with self._changed:
            self._running, self._waiting = None, self._waiting or upload
            first, self._silent_since = self._silent_since is None, self._silent_since or began
            self._changed.notify_all()
        if first:
            _log.warning(
                "%s. Training goes on without the store for at most %g s (%s). %s",
                str(error).rstrip("."), self._max_seconds, self._setting, self._kept,
            )  # fmt: skip

    def _is_done(self, upload: Upload) -> None:
        since = self._silent_since  # no other thread sets it
        if since is not None:  # said first: whoever waits may end the process
            seconds = time.monotonic() - since
            _log.warning("the store answers again, after %.0f s: %s is uploaded", seconds, upload.what)
        with self._changed:
            self._silent_since = self._running = None
            self._changed.notify_all()

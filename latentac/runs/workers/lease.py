"""The lease of a training job on a cluster. A job without a launching step that renews it ends by itself.

    leases/<run>.json   {"attempt", "token"}

The launching step writes a new token every few seconds. The leading worker reads it in a thread of its own. It
compares tokens and measures by its own monotonic clock, so the clocks of the pods need not agree. Time in which the
store cannot be read does not count: the launching step cannot renew the lease then either. An expired lease is final
when the worker has reported it to the store (`latentac.runs.failures`). So a store that can be read and not written
does not end a job.

On one machine there is no lease: workers die with the step that launched them (`latentac.system.lifetime`).
"""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from latentac.runs import failures
from latentac.store import Store, open_store
from latentac.system.errors import ArtifactNotFound, IntegrityError, LeaseExpired
from latentac.system.reading import whole_variable

SECONDS = "LATENTAC_LEASE_SECONDS"
"""Environment variable of the workers: seconds without a renewal after which training ends. Unset: never."""

MOST_SECONDS = 10**7
_POLLS = 10
"""Renewals, and reads, within the seconds of a lease."""

_MOST_POLL_SECONDS = 30.0
_log = logging.getLogger(__name__)


def poll_seconds(seconds: float) -> float:
    """Seconds between two renewals, and between two reads, of a lease of `seconds`."""
    return min(_MOST_POLL_SECONDS, seconds / _POLLS)


@contextlib.contextmanager
def renewed(store: Store, run: str, attempt: str, seconds: float) -> Iterator[None]:
    """Renew the lease of `attempt` of training `run` while the body runs. A failed renewal is a warning, and the next
    one may succeed. Two launching steps of one attempt may renew it at the same time."""
    ended, own = threading.Event(), open_store(store.url)

    def renew() -> None:
        failing = False
        while True:
            try:
                own.write_json(_key(run), {"attempt": attempt, "token": uuid.uuid4().hex})
                failing = False
            except Exception as error:  # noqa: BLE001 - whatever it is, the next renewal may succeed
                if not failing:
                    _log.warning("the lease of the training job could not be renewed, and is tried again: %s", error)
                failing = True
            if ended.wait(poll_seconds(seconds)):
                return

    threading.Thread(target=renew, name="latentac-lease", daemon=True).start()
    try:
        yield
    finally:
        ended.set()  # not joined: a store that does not answer shall not hold up the end of the step


@contextlib.contextmanager
def watched(store: Store, run: str, stop: Callable[[], None]) -> Iterator["Lease"]:
    """The lease of the training that this worker belongs to, watched while the body runs.

    stop: called from another thread when the lease has expired. Only the leading worker watches, and only where the
    environment says for how many seconds a lease lasts.
    """
    seconds, leads = whole_variable(SECONDS, 1, MOST_SECONDS, 0), os.environ.get("RANK") == "0"
    lease = Lease(open_store(store.url), run, float(seconds))
    ended = threading.Event()
    if seconds and leads:
        threading.Thread(target=lease.watch, args=(stop, ended), name="latentac-lease", daemon=True).start()
    try:
        yield lease
    finally:
        ended.set()


class Lease:
    """What a worker knows of the lease of its training. seconds: how long it lasts without a renewal."""

    def __init__(self, store: Store, run: str, seconds: float) -> None:
        self._store, self._run, self._seconds = store, run, seconds
        self._expired = threading.Event()
        self._token = ""
        self._age = 0.0
        self._read_at: float | None = None

    def check(self) -> None:
        """Raises LeaseExpired if the lease has expired."""
        if self._expired.is_set():
            raise self._error()

    def watch(self, stop: Callable[[], None], ended: threading.Event) -> None:
        """Read the lease until it expires, or until `ended`."""
        while not ended.wait(poll_seconds(self._seconds)):
            try:
                if self.age() < self._seconds:
                    continue
                failures.report(self._store, self._run, self._error(), 0)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is no reason to end a job
                self._read_at = None
                _log.warning("the lease of the training could not be read or ended, and is tried again: %s", error)
                continue
            self._expired.set()
            stop()
            return

    def age(self) -> float:
        """Read the lease. Seconds since it was last seen renewed, without those in which the store could not be read.

        A gap between two reads counts as two polls at most: a process that was suspended has seen nothing meanwhile.
        Raises LatentacError.
        """
        token, now = self._read(), time.monotonic()
        if token not in ("", self._token):
            self._token, self._age = token, 0.0
        elif self._read_at is not None:
            self._age += min(now - self._read_at, 2 * poll_seconds(self._seconds))
        self._read_at = now
        return self._age

    def _read(self) -> str:
        """The token, empty if there is none of this attempt."""
        try:
            record: Any = self._store.read_json(_key(self._run))
        except (ArtifactNotFound, IntegrityError):
            return ""
        sound = isinstance(record, dict) and record.get("attempt") == os.environ.get(failures.ATTEMPT)
        return str(record.get("token") or "") if sound else ""

    def _error(self) -> LeaseExpired:
        return LeaseExpired(
            f"training of {self._run}",
            f"no launching step has renewed its lease for {self._seconds:.0f} s, so the job ended by itself: the step "
            f"`train` was cancelled or lost",
            "Resume the run: it continues from its last checkpoint",
        )


def _key(run: str) -> str:
    return f"leases/{run}.json"

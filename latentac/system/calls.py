"""Calls of rewards in flight, written to files: whose call it was, if it ends the whole process.

A crash in native code and `os._exit` leave no exception. So each call leaves a file for as long as it lasts, and
whoever watches the process reads the files of one that is gone. A program that nobody watches watches itself:
`supervised`.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentac.system.errors import RewardError
from latentac.system.lifetime import go_on_in_child
from latentac.system.reading import read_json

FOLDER = "LATENTAC_REWARD_CALLS"
"""Environment variable: the folder of the files. Without it no file is written."""

CALLS = "reward-calls"
"""Name of that folder in a run's working folder."""

_STOPPED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)

_GRACE_SECONDS = 10.0
_deadlines: dict[int, float] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
    """End the process if the body takes `seconds` and some more, which only a call can cause that never releases the
    interpreter's lock: no other thread runs then. So it is faulthandler's, which needs no lock, that ends the process.
    Only where somebody reads the files of its calls."""
    if not os.environ.get(FOLDER):
        yield
        return
    with _lock:
        _deadlines[threading.get_ident()] = time.monotonic() + seconds + _GRACE_SECONDS
        _set_watch()
    try:
        yield
    finally:
        with _lock:
            del _deadlines[threading.get_ident()]
            _set_watch()


def _set_watch() -> None:
    faulthandler.cancel_dump_traceback_later()
    if _deadlines and sys.__stderr__ is not None:
        left = max(_deadlines.values()) - time.monotonic()
        faulthandler.dump_traceback_later(max(left, 1.0), exit=True, file=sys.__stderr__)


@contextlib.contextmanager
def in_flight(reward: str, prompts: Sequence[str], seconds: float) -> Iterator[None]:
    """While the body runs, a file says that `reward` is scoring images of `prompts`, and for how long it may."""
    folder = os.environ.get(FOLDER)
    if not folder:
        yield
        return
    file = Path(folder) / f"{os.getpid()}-{threading.get_native_id()}.json"
    call = {"reward": reward, "prompt": prompts[0] if prompts else "", "count": len(prompts)}
    call |= {"seconds": seconds, "until": time.time() + seconds}
    with contextlib.suppress(OSError):  # a full disk is reported by whoever writes something that matters
        file.write_text(json.dumps(call))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def supervised(folder: Path) -> tuple[int, RewardError | None] | None:
    """Go on in a child process whose calls leave their files in `folder`, so that its crash can be reported.

    None in the child. The caller itself gets, when the child has ended, its exit code and the error to report if it
    ended in a call. Call it from the main thread, before there are others.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    ended = go_on_in_child()
    if ended is None:
        _forget(folder, os.getpid())  # of a process that had this number before
        atexit.register(_forget, folder, os.getpid())  # who comes to that has not crashed
        faulthandler.enable()
        os.environ[FOLDER] = str(folder.resolve())
        return None
    pid, code = ended
    error = crash_of(folder, pid, code)
    _forget(folder, pid)
    return (code if code >= 0 else 128 - code), error


def _forget(folder: Path, pid: int) -> None:
    for file in folder.glob(f"{pid}-*.json"):
        file.unlink(missing_ok=True)


def fresh_calls(folder: Path) -> Path:
    """The folder of calls in a run's working folder, without the files of processes before."""
    calls = folder / CALLS
    calls.mkdir(exist_ok=True)
    for file in calls.glob("*.json"):
        file.unlink(missing_ok=True)
    return calls


def crash_of(folder: Path, pid: int, code: int) -> RewardError | None:
    """The error to report for the process `pid`, which ended with `code` (minus the signal that killed it): None if it
    was stopped from outside, or in no call."""
    if code in _STOPPED_FROM_OUTSIDE:
        return None
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return crash_in_call(folder, how, pid)


def crash_in_call(folder: Path, ending: str, pid: int | None = None) -> RewardError | None:
    """The error to report for a process that is gone, if it ended while it called a reward.

    ending: how it ended, for the message; pid: of that process, or None for whichever has left a file in `folder`.
    """
    for file in sorted(folder.glob(f"{'*' if pid is None else pid}-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            call = read_json(file)
            more = f" and {call['count'] - 1} more" if call["count"] > 1 else ""
            remedy = "Correct the reward, or run it behind a service that may fail by itself"
            if time.time() > call["until"]:
                ending = f"was ended, for it did not answer within {call['seconds']:g} s and let no other thread run"
            where = f"reward {call['reward']}, prompt {call['prompt']!r}{more}"
            return RewardError(where, f"the process that called it {ending}", remedy)
    return None

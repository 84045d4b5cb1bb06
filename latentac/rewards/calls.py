"""Calls of rewards in flight, written to files: whose call it was, if it ends the whole process.

A crash in native code and `os._exit` leave no exception. So each call leaves a file for as long as it lasts, and
whoever watches the process reads the files of one that is gone.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentac.errors import RewardError

FOLDER = "LATENTAC_REWARD_CALLS"
"""Environment variable: the folder of the files. Without it no file is written."""

CALLS = "reward-calls"
"""Name of that folder in a run's working folder."""


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
    """While the body runs, a file says that `reward` is scoring pictures of `prompts`, and for how long it may."""
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


def fresh_calls(folder: Path) -> Path:
    """The folder of calls in a run's working folder, without the files of processes before."""
    calls = folder / CALLS
    calls.mkdir(exist_ok=True)
    for file in calls.glob("*.json"):
        file.unlink(missing_ok=True)
    return calls


def crash_in_call(folder: Path, ending: str, pid: int | None = None) -> RewardError | None:
    """The error to report for a process that is gone, if it ended while it called a reward.

    ending: how it ended, for the message; pid: of that process, or None for whichever has left a file in `folder`.
    """
    for file in sorted(folder.glob(f"{'*' if pid is None else pid}-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            call = json.loads(file.read_text())
            more = f" and {call['count'] - 1} more" if call["count"] > 1 else ""
            remedy = "Correct the reward, or run it behind a service that may fail by itself"
            if time.time() > call["until"]:
                ending = f"was ended, for it did not answer within {call['seconds']:g} s and let no other thread run"
            where = f"reward {call['reward']}, prompt {call['prompt']!r}{more}"
            return RewardError(where, f"the process that called it {ending}", remedy)
    return None

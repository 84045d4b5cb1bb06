"""A reward in processes of its own (`rewards[].processes`): what ends one of them ends neither the worker nor the run.

Each process holds the reward as a worker would, and answers one request at a time over a socket pair. Messages are JSON
and the bytes of arrays; nothing is pickled. A process that crashes is replaced, and its images are scored again. One
that takes longer than `timeout_seconds` is killed. None outlives the process that started it.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from latentac.config.schema import Reward as RewardSettings
from latentac.rewards.failing import REMEDY
from latentac.system.errors import RewardError, describe, restore
from latentac.system.reading import parse_json

_PROCESSES = 3  # that one request is given to before its crashes end the run
_ENDING_SECONDS = 5.0
# Of a program that says nothing itself, so that `__main__` is not run again as multiprocessing would do.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from latentac.rewards.scoring_process import main; main(int(sys.argv[2]))"
)
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class _Crashed(Exception):
    """A process ended, or went away, before it answered."""


class _Hung(Exception):
    """A call took longer than it may."""


class Pool:
    """`processes` of one reward. The first is started here, the others when they are needed.

    unit, code: what the reward's class says, and the digest of its code
    """

    def __init__(self, settings: RewardSettings, index: int) -> None:
        self.size = settings.processes
        self._settings, self._index = settings, index
        self._restarts, self._lock = settings.max_restarts, threading.Lock()
        # The kernel ends a process with the *thread* that started it, and rewards are called from threads that end.
        self._starter = ThreadPoolExecutor(1, f"processes of {settings.name}")
        self._places: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        self._alive: set[_Process] = set()
        weakref.finalize(self, _end, self._alive, self._starter)
        for _ in range(self.size):
            self._places.put(None)
        facts = self.ask({"ask": "facts"}, "its constructor")[0]
        self.unit, self.code = str(facts["unit"]), str(facts["code"])

    def ask(self, asked: dict[str, Any], what: str, data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """The answer of whichever process is free first. Raises the errors that it names, and RewardError where it
        crashes or hangs. what: for the message then."""
        try:
            sent = json.dumps(asked, ensure_ascii=False).encode()
            parse_json(sent)  # as the process will
        except (TypeError, ValueError) as error:
            raise self._failed(what, f"its prompts or metadata cannot go to a process: {describe(error)}") from error
        for attempt in range(1, _PROCESSES + 1):
            try:
                answer, found = self._with_process(lambda process: process.ask(sent, data))
            except _Hung:
                limit = f"{self._settings.timeout_seconds:g} s (rewards.{self._settings.name}.timeout_seconds)"
                raise self._failed(what, f"did not answer within {limit}; its process was killed") from None
            except _Crashed as crash:
                self._check_restarts(what, str(crash), attempt)
                continue
            if "error" in answer:
                raise restore(answer["error"])
            return answer, found
        raise AssertionError("the loop returns or raises")

    def _with_process(self, work: "Callable[[_Process], Result]") -> Result:
        """`work` with a process that does nothing else meanwhile. One that fails in any way is not used again."""
        process = self._places.get()
        try:
            process = process or self._started()
            result = work(process)
        except BaseException:
            if process is not None:
                process.kill()
                self._alive.discard(process)
            self._places.put(None)
            raise
        self._places.put(process)
        return result

    def _started(self) -> "_Process":
        """A new process that has built the reward. Raises what the constructor raised."""
        process = self._starter.submit(_Process, self._settings.timeout_seconds).result()
        self._alive.add(process)
        here = {"processes": 0, "cached_scores": 0, "scores_folder": ""}
        fields = self._settings.model_dump() | here
        try:
            answer, _ = process.ask(json.dumps({"settings": fields, "index": self._index}, default=str).encode())
            if "error" in answer:
                raise restore(answer["error"])
        except BaseException:
            process.kill()
            self._alive.discard(process)
            raise
        return process

    def _check_restarts(self, what: str, crash: str, attempt: int) -> None:
        """Raises RewardError where no further process is to be started."""
        name, most = self._settings.name, self._settings.max_restarts
        if attempt == _PROCESSES:
            raise self._failed(what, f"{crash}, as were {attempt - 1} before it with the same images")
        with self._lock:
            self._restarts -= 1
            left = self._restarts
        if left < 0:
            raise self._failed(what, f"{crash}, and {most} were started again (rewards.{name}.max_restarts)")
        _log.warning("reward %s, %s: %s; a new process takes over, %d more may follow", name, what, crash, left)

    def _failed(self, what: str, problem: str) -> RewardError:
        return RewardError(f"reward {self._settings.name}, {what}", problem, REMEDY)


class _Process:
    """One process and the socket to it."""

    def __init__(self, seconds: float) -> None:
        """seconds: the time limit of each call of the reward."""
        self._seconds = seconds
        here, there = socket.socketpair()
        with here, there:
            arguments = json.dumps(sys.path), str(there.fileno())
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *arguments],
                pass_fds=(there.fileno(),),
                stdin=subprocess.DEVNULL,
                # A reward in the worker has one arithmetic thread, too.
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,  # so that Ctrl-C is the worker's affair, and what a reward starts ends with it
            )
            self._connection = Connection(here.detach())

    def ask(self, sent: bytes, data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """The answer to a request. Raises _Crashed, and _Hung where a call of the reward takes too long."""
        try:
            self._connection.send_bytes(sent)
            if data:
                self._connection.send_bytes(data)
            return self._answer()
        except (EOFError, OSError) as error:
            raise _Crashed(self._ending()) from error

    def _answer(self) -> tuple[dict[str, Any], bytes]:
        """A call of the reward is announced when it begins and when it ends; between, its time runs."""
        deadline = None
        while True:
            if deadline is not None and not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise _Hung
            answer = parse_json(self._connection.recv_bytes())
            if "begun" in answer:
                deadline = time.monotonic() + self._seconds if answer["begun"] else None
            else:
                return answer, self._connection.recv_bytes() if answer.get("data") else b""

    def kill(self) -> None:
        """End the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._connection.close()

    def _ending(self) -> str:
        try:
            code = self._popen.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        return (
            f"its process was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended with exit code {code}"
        )


def _end(processes: set[_Process], starter: ThreadPoolExecutor) -> None:
    for process in list(processes):
        process.kill()
    starter.shutdown(wait=False)

"""Programs that live no longer than the tests: started with a log, awaited until they answer, ended by their pid."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.golang import Unavailable

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # looked up before the fork: the child may not take the loader's lock


class Program:
    """One running program; its output is in `<folder>/<name>.log`. The kernel kills it when our thread ends."""

    def __init__(
        self, name: str, command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                preexec_fn=_end_with_parent,
                start_new_session=True,  # Ctrl-C at the terminal is for us: we stop it in the right order
            )

    def wait(self, ready: Callable[[], bool], seconds: float = 30.0) -> None:
        """Returns when `ready()` is true. Raises Unavailable with the log's end if the program ends or time is up."""
        deadline = time.monotonic() + seconds
        while not ready():
            ended = self.process.poll()
            if ended is not None or time.monotonic() >= deadline:
                problem = f"is not ready after {seconds:.0f} s" if ended is None else f"ended with {ended}"
                raise Unavailable(f"{self.name} {problem}:\n{self.tail()}")
            time.sleep(0.05)

    def tail(self, size: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-size:]

    def stop(self) -> None:
        """SIGKILL: nothing that it holds is kept, and an API server takes its time to say goodbye."""
        self.process.kill()
        self.process.wait()


def free_ports(number: int, address: str = "127.0.0.1") -> list[int]:
    """Different ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(number)]
        for listener in listeners:
            listener.bind((address, 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)

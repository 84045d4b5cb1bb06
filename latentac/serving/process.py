"""The model server as a child process: started, waited for, asked, stopped."""

import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from latentac.config.extensions import ALLOWED, operator_allows
from latentac.serving.client import Client
from latentac.serving.exported import read
from latentac.serving.server import HOST, NAME, bind
from latentac.system.errors import ServingError

POLL_SECONDS = 0.1
STOP_SECONDS = 30.0
SPARE_SECONDS = 15.0
"""For an answer beyond the time that the model gives itself: it says itself that it took too long."""

TAIL_BYTES = 16384


class ServerProcess:
    """`python -m latentac.serving` as a child, from entering the context until leaving it. It dies with this process.

    port 0 takes a free one; host is loopback; allowed: addresses of the user's own classes that the model may name,
    besides those of LATENTAC_ALLOW_EXTENSIONS. Enter it from a thread that outlives it (`lifetime.die_with_parent`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        ready_seconds: float,
        port: int = 0,
        device: str = "auto",
        name: str = NAME,
        allowed: Collection[str] = (),
    ) -> None:
        self.name, self.pid = name, 0
        self._environment = os.environ | {ALLOWED: ",".join(sorted({*operator_allows(), *allowed}))}
        self._folder, self._ready_seconds, self._port, self._device = folder, ready_seconds, port, device

    def __enter__(self) -> Self:
        """Start, and wait until ready. Raises ResourceError if the port is taken; ServingError if it ends, at once, or
        is not ready in time, with the end of its log."""
        self._log = tempfile.TemporaryFile("w+b")
        # Bound here and handed down, so there is no moment at which another process could take the port.
        with bind(HOST, self._port) as listener:
            self._host, self._port = listener.getsockname()[:2]
            command = [sys.executable, "-m", "latentac.serving", "--model", str(self._folder.absolute())]
            command += ["--name", self.name, "--device", self._device]
            command += ["--socket", str(listener.fileno()), "--die-with-parent"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=self._environment,
                pass_fds=[listener.fileno()],
            )  # fmt: skip
        self.pid = self._process.pid
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def address(self) -> str:
        return f"http://{self._host}:{self._port}"

    @property
    def endpoint(self) -> str:
        return self._client().endpoint

    def predict(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The prediction for one request (`serving/README.md`). Raises ServingError if there is none."""
        try:
            seconds = read(self._folder).batching.request_seconds + SPARE_SECONDS
            return Client(self.address, self.name, seconds=seconds).answer(request)
        except (OSError, http.client.HTTPException) as error:
            # A killed server breaks the connection a moment before it is gone.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            raise self._failure(f"did not answer ({type(error).__name__}: {error})") from error

    def wait(self, seconds: float) -> int:
        """The exit code, once the process has ended by itself. Raises subprocess.TimeoutExpired."""
        return self._process.wait(seconds)

    def log(self, most: int = TAIL_BYTES) -> str:
        """The end of what it has written so far, stdout and stderr together; at most so many bytes."""
        # pread, because the child writes at the offset that it shares with this descriptor.
        descriptor = self._log.fileno()
        tail = os.pread(descriptor, most, max(0, os.fstat(descriptor).st_size - most))
        return tail.decode(errors="replace")

    def _client(self) -> Client:
        return Client(self.address, self.name)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._failure("ended before it was ready")
            if self._client().ready(1.0):
                return
            time.sleep(POLL_SECONDS)
        raise self._failure(f"was not ready within {self._ready_seconds:g} s")

    def _failure(self, problem: str) -> ServingError:
        code = self._process.poll()
        if code is not None:
            problem += f"; it ended with {f'exit code {code}' if code >= 0 else signal.Signals(-code).name}"
        lines = [line for line in self.log().splitlines() if line.strip(" ^~")]
        tail = " | ".join(lines[-5:]) or "nothing"
        return ServingError(f"the model server for {self._folder}", problem, f"Its last words: {tail}")

    def _stop(self) -> None:
        """SIGTERM, so that it finishes what it answers; SIGKILL if it takes too long."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._log.close()

"""Servers of rewards for tests: the real one as a process, and one that answers what a test says."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

READY_SECONDS = 90.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RewardServer:
    """`latentac reward-server` as a process, on a port of its own that it keeps when it is started again."""

    def __init__(self, reward: str, *words: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._words = ["reward-server", "--reward", reward, "--port", str(self.port), *words]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "latentac.runs.cli", *self._words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def announced(self) -> str:
        """The line that it prints when it listens."""
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, number: int = signal.SIGKILL) -> tuple[int, str]:
        """Exit code and stderr."""
        assert self.process is not None
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr

    def __enter__(self) -> "RewardServer":
        self.start()
        assert "Serving reward" in self.announced()
        return self

    def __exit__(self, *arguments: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end()


Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@contextlib.contextmanager
def answering(
    score: Answer, health: Answer | None = None, context: ssl.SSLContext | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server that calls `score` for each question, and the questions that came. context: for TLS."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            (health or healthy)(self, {})

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(
                {**question, "headers": dict(self.headers), "from": self.client_address, "at": time.monotonic()}
            )
            with contextlib.suppress(OSError):
                score(self, question)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *arguments: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def send(
    handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, kind: str = "application/json", **headers: str
) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def healthy(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
    send(handler, json.dumps({"reward": "x", "unit": "units of x", "ready": True}).encode())


def counted(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
    """Of each image the length of its prompt."""
    send(handler, json.dumps({"scores": [len(prompt) for prompt in question["prompts"]]}).encode())


def certificate_of(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    from tests.latentac.test_store import _certificate

    made = _certificate(folder)
    return made / "public.crt", made / "private.key"

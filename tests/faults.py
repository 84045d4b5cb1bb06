"""A server on loopback that never gives a whole answer: silent, one byte at a time, reset, without an end."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

PAUSE_SECONDS = 0.05
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@dataclass
class Faulty:
    """address: `host:port`. accepted: how many connections there were; asked: what came on them."""

    address: str = ""
    accepted: int = 0
    asked: list[bytes] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"http://{self.address}"


def _silent(client: socket.socket, ended: threading.Event) -> None:
    ended.wait()


def _head(client: socket.socket, ended: threading.Event) -> None:
    """Its header never ends: no timeout between two bytes sees that."""
    client.sendall(_HEAD + b"X-Padding: ")
    while not ended.wait(PAUSE_SECONDS):
        client.sendall(b"a")


def _body(client: socket.socket, ended: threading.Event) -> None:
    """It promises a gigabyte and sends it byte by byte."""
    client.sendall(_HEAD + b"Content-Length: 1000000\r\n\r\n")
    while not ended.wait(PAUSE_SECONDS):
        client.sendall(b" ")


def _cut(client: socket.socket, ended: threading.Event) -> None:
    """It ends in the middle of its body."""
    client.sendall(_HEAD + b"Content-Length: 1000\r\n\r\nsome")


def _reset(client: socket.socket, ended: threading.Event) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _closed(client: socket.socket, ended: threading.Event) -> None:
    """Without a word, in order."""


FAULTS = {"silent": _silent, "head": _head, "body": _body, "cut": _cut, "reset": _reset, "closed": _closed}


@contextlib.contextmanager
def faulty(fault: str) -> Iterator[Faulty]:
    """One on a free port, until the context is left."""
    listener = socket.create_server(("127.0.0.1", 0))
    found, ended = Faulty(f"127.0.0.1:{listener.getsockname()[1]}"), threading.Event()

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            found.asked.append(client.recv(65_536))
            FAULTS[fault](client, ended)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                found.accepted += 1
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield found
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def seconds_of(began: float) -> float:
    return time.monotonic() - began

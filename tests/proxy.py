"""A TCP proxy on loopback whose connections go wrong as networks do: silent, slow, reset, cut, refused."""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

_CHUNK_BYTES = 65_536
_TICK_SECONDS = 0.02


@dataclass
class Proxy:
    """Between a client and the server at `target`. Its faults may be set at any time, also for open connections.

    silent: what the server says does not arrive; reset: connections end with RST; bytes_per_second: of a connection in
    each direction, None for no bound; cut_after: bytes of the server's, summed over connections, after which one reset
    happens. accepted, cuts: how many connections there were, and how many resets of this kind.
    """

    target: tuple[str, int]
    silent: bool = False
    reset: bool = False
    bytes_per_second: float | None = None
    cut_after: int | None = None
    accepted: int = 0
    cuts: int = 0
    _open: list[socket.socket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for each in (self._listener, *self._open):
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            self.accepted += 1
            try:
                server = socket.create_connection(self.target, timeout=5)
            except OSError:
                self._abort(client)
                continue
            server.settimeout(None)
            self._open += [client, server]
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self._size()):
                while answers and self.silent and not self.reset:
                    time.sleep(_TICK_SECONDS)
                if self.reset or (answers and self._cut(len(data))):
                    self._abort(source)
                    self._abort(sink)
                    return
                if self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _size(self) -> int:
        return max(1, int(self.bytes_per_second * _TICK_SECONDS)) if self.bytes_per_second else _CHUNK_BYTES

    def _cut(self, count: int) -> bool:
        if self.cut_after is None:
            return False
        self.cut_after -= count
        if self.cut_after > 0:
            return False
        self.cut_after = None
        self.cuts += 1
        return True

    @staticmethod
    def _abort(end: socket.socket) -> None:
        """Close with RST."""
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()

"""What a connection may cost: its headers have a size and a time, its answer is read or dropped, and there are so many.

uvicorn bounds none of these by itself: a connection that never sends a request stays for ever, and once the process has
no file descriptors left, nothing is accepted any more, probes included.
"""

import asyncio
import resource
import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 65_536
"""Of one request: its first line and its headers."""
HEADER_SECONDS = 10.0
"""From the connection, or from the first byte of a further request, to the end of the headers."""
UNREAD_SECONDS = 60.0
"""In which a caller must read something of its answer."""
MAX_CONNECTIONS = 1024
"""At most; fewer where the process may open fewer than four times as many files. The one that has waited longest for
its headers makes room for a new one."""
_POLL_SECONDS = 1.0


class Connection(H11Protocol):
    """uvicorn's connection, which knows since when it waits for headers (None: it does not), and how much of its
    answer is still unread, since when. How long one may rest between requests is uvicorn's `timeout_keep_alive`."""

    waiting_since: float | None = None
    unread = 0
    unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting_since = time.monotonic()
        if len(self.connections) > _most():
            waiting = [each for each in self.connections if each.waiting_since is not None]  # type: ignore[union-attr]
            min(waiting, key=lambda each: each.waiting_since).transport.abort()  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = time.monotonic()

    def check(self, now: float) -> None:
        """Drop the connection where one of the times is over."""
        unread = self.transport.get_write_buffer_size()
        if not unread or unread != self.unread:
            self.unread, self.unread_since = unread, now
        late = self.waiting_since is not None and now - self.waiting_since > HEADER_SECONDS
        if late or now - self.unread_since > UNREAD_SECONDS:
            self.transport.abort()


def bound(config: uvicorn.Config) -> None:
    """Let a server that was not started yet keep these bounds."""
    config.http, config.ws = Connection, "none"
    config.h11_max_incomplete_event_size = HEADER_BYTES


async def watch(server: uvicorn.Server) -> None:
    """Check each connection of a running server, until cancelled."""
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        now = time.monotonic()
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection):
                connection.check(now)


def _most() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(MAX_CONNECTIONS, max(files // 4, 16))

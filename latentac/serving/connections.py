"""What a connection may cost: its headers have a size and a time, its answer is read or dropped, and there are so many.

uvicorn bounds none of these by itself: a connection that never sends a request stays for ever, and once the process has
no file descriptors left, nothing is accepted any more, probes included.
"""

import asyncio
import fcntl
import resource
import termios
import time
from array import array

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 65_536
"""Of one request: its first line and its headers."""
HEADER_SECONDS = 10.0
"""From the connection, or from the first byte of a further request, to the end of the headers."""
UNREAD_SECONDS = 60.0
"""In which a caller must read something of its answer."""
READ_SECONDS = 300.0
"""In which a caller must have read everything that is written to it."""
MAX_CONNECTIONS = 1024
"""At most; fewer where the process may open fewer than four times as many files. The one that has waited longest for
its caller, and has no unread bytes of it, makes room for a new one."""
KEEP_ALIVE_SECONDS = 65
"""How long a connection may rest between two requests. Longer than the 60 s of common proxies, so that they close it
first."""
_POLL_SECONDS = 1.0


class Connection(H11Protocol):
    """uvicorn's connection, which knows since when it waits for headers (None: it does not), and how much of its
    answer is still unread, since when. uvicorn closes one that rests for KEEP_ALIVE_SECONDS.

    state_since: when it last began to wait for its caller, or to answer; one whose request has arrived and is being
    answered never makes room.
    """

    waiting_since: float | None = None
    unread = 0
    unread_since = 0.0
    state = "head"
    state_since = 0.0
    dropped = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waiting_since = self.state_since = time.monotonic()
        # One that was dropped stays in the set until the event loop comes to its end.
        held = [each for each in self.connections if isinstance(each, Connection) and not each.dropped]
        if len(held) > most_connections():
            idle = sorted((each for each in held if each.turn() != "answer"), key=lambda each: each.state_since)
            # Many connections can arrive before the event loop reads from any of them: a caller whose bytes wait in the
            # socket is not idle, unless it has an answer to read first. If all of them have sent something, the oldest
            # one still makes room.
            next((each for each in idle if each.state == "read" or not each.has_unread_bytes()), idle[0]).drop()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = time.monotonic()
        self.turn()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.turn()

    def turn(self) -> str:
        """What it waits for: its caller to send a "head" or a "body", to have "read" an answer, or to go on after a
        "rest"; or the server to "answer"."""
        if self.transport.get_write_buffer_size():
            state = "read"
        elif self.cycle is None or self.cycle.response_complete:
            state = "rest" if self.waiting_since is None else "head"
        else:
            state = "body" if self.conn.their_state is h11.SEND_BODY else "answer"
        if state != self.state:
            self.state, self.state_since = state, time.monotonic()
        return state

    def has_unread_bytes(self) -> bool:
        """Whether the operating system holds bytes of the caller that the event loop has not read yet."""
        count = array("i", [0])
        fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
        return count[0] > 0

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP. Where the request before it has been answered, or is being answered, there is
        none to give: the connection ends."""
        if self.conn.our_state is h11.SEND_RESPONSE:  # the body is damaged: its reader gets the end of the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def check(self, now: float) -> None:
        """Drop the connection where one of the times is over."""
        self.turn()
        unread = self.transport.get_write_buffer_size()
        if not unread or unread != self.unread:
            self.unread, self.unread_since = unread, now
        late = self.waiting_since is not None and now - self.waiting_since > HEADER_SECONDS
        slow = self.state == "read" and now - self.state_since > READ_SECONDS
        if late or slow or now - self.unread_since > UNREAD_SECONDS:
            self.drop()

    def drop(self) -> None:
        """End it at once, whatever is still unread."""
        self.dropped = True
        self.transport.abort()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: a caller that asks for WebSockets or HTTP/2 is answered as any other."""


def bound(config: uvicorn.Config) -> None:
    """Let a server that was not started yet keep these bounds."""
    config.http, config.ws = Connection, "none"
    config.h11_max_incomplete_event_size = HEADER_BYTES
    config.timeout_keep_alive = KEEP_ALIVE_SECONDS


async def watch(server: uvicorn.Server) -> None:
    """Check each connection of a running server, until cancelled."""
    while True:
        await asyncio.sleep(_POLL_SECONDS)
        now = time.monotonic()
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection):
                connection.check(now)


def most_connections() -> int:
    """MAX_CONNECTIONS, or what the process may open files for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(MAX_CONNECTIONS, max(files // 4, 16))

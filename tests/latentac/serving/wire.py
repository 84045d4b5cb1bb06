"""HTTP/1.1 by the byte: what no client library sends, and a strict reading of what comes back."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
import httptools

from latentac.serving.process import ServerProcess

LAST = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
"""A request after which the server closes the connection: its answer is the last one."""


@dataclass(frozen=True)
class Answer:
    """One response; names of headers are in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str:
        """Its values, joined by commas; "" where there is none."""
        return ",".join(value for key, value in self.headers if key == name.lower())


def answers_in(data: bytes, methods: Iterable[str] = ()) -> list[Answer]:
    """The final answers that these bytes are, up to the end of the connection; the last may be cut off there.

    methods: of the requests, in order; GET beyond them. Raises h11.RemoteProtocolError where the bytes are anything
    else.
    """
    found, asked = [], iter(methods)
    while data:
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=next(asked, "GET"), target="/", headers=[("Host", "x")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(data)
        status, body = 0, b""
        headers: tuple[tuple[str, str], ...] = ()
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                reader.receive_data(b"")  # the connection has ended here
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = tuple((key.decode(), value.decode("latin-1")) for key, value in event.headers)
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        found.append(Answer(status, headers, body))
        data = reader.trailing_data[0]
    return found


def requests_in(data: bytes) -> tuple[int, str]:
    """How many whole requests another, strict parser (llhttp) finds, and what stops it, "" for nothing."""
    whole = 0

    class Counting:
        def on_message_complete(self) -> None:
            nonlocal whole
            whole += 1

    try:
        httptools.HttpRequestParser(Counting()).feed_data(data)
    except httptools.HttpParserUpgrade as upgrade:  # this server upgrades nothing, and reads on
        more, stopped = requests_in(data[upgrade.args[0] :])
        return whole + more, stopped
    except httptools.HttpParserError as error:
        return whole, str(error)
    return whole, ""


def connect(server: ServerProcess, seconds: float = 30.0) -> socket.socket:
    """A connection whose every wait is bounded by `seconds`."""
    place = urlsplit(server.address)
    return socket.create_connection((place.hostname, place.port), timeout=seconds)


def read_to_end(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection. A reset is an end as well."""
    got = b""
    try:
        while data := connection.recv(65_536):
            got += data
    except ConnectionResetError:
        pass
    return got


def said(server: ServerProcess, sent: bytes, *, half_closed: bool = False, seconds: float = 30.0) -> bytes:
    """What the server says to these bytes. half_closed: nothing more will come, and it is told so."""
    with connect(server, seconds) as connection:
        try:
            connection.sendall(sent)
            if half_closed:
                connection.shutdown(socket.SHUT_WR)
        except (ConnectionResetError, BrokenPipeError):
            pass  # it was refused before its end
        return read_to_end(connection)


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    """A request as it should be. headers: lines beside those that it needs."""
    lines = [f"POST {path} HTTP/1.1".encode(), b"Host: localhost", b"Content-Type: application/json"]
    lines += [b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body

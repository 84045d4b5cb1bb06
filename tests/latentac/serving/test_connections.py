"""Callers that keep connections idle, send headers without an end, or do not read: others are answered."""

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from latentac.serving import connections

LARGE = 50_000_000


async def answer(request: Request) -> Response:
    return PlainTextResponse("x" * (LARGE if request.url.path == "/large" else 1))


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a real uvicorn with bounds of half a second and 20 connections, in a thread."""
    for name, value in {
        "HEADER_SECONDS": 0.5,
        "UNREAD_SECONDS": 0.5,
        "_POLL_SECONDS": 0.1,
        "MAX_CONNECTIONS": 20,
    }.items():
        monkeypatch.setattr(connections, name, value)
    config = uvicorn.Config(Starlette(routes=[Route("/{path:path}", answer)]), log_config=None, timeout_keep_alive=2)
    connections.bound(config)
    server = uvicorn.Server(config)

    async def serve() -> None:
        watching = asyncio.ensure_future(connections.watch(server))
        await server.serve(sockets=[listener])
        watching.cancel()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(30)


def probe(port: int) -> float:
    """Seconds to an answer."""
    began = time.monotonic()
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
    return time.monotonic() - began


def is_closed(end: socket.socket) -> bool:
    """Within three seconds."""
    end.settimeout(3)
    try:
        while end.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nX: ", b"\r\n"], ids=["nothing", "half a header", "a line"])
def test_connections_without_a_request_end_and_hold_nobody_up(port: int, sent: bytes) -> None:
    """Four times as many as are allowed: each probe is answered, the oldest make room, and all end in time."""
    with ExitStack() as stack:
        held = []
        for _ in range(80):
            held.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
            held[-1].sendall(sent)
        assert max(probe(port) for _ in range(5)) < 1
        assert all(is_closed(each) for each in held)
        assert probe(port) < 1


def send_until_closed(end: socket.socket, data: bytes, most: int, pause: float = 0.0) -> int:
    """How many bytes went, up to `most`, until the server closed the connection."""
    sent = 0
    end.settimeout(10)
    try:
        while sent < most:
            end.sendall(data)
            sent += len(data)
            time.sleep(pause)
    except (ConnectionResetError, BrokenPipeError):
        pass
    return sent


def read_until_closed(end: socket.socket, pause: float = 0.0) -> int:
    """How many bytes came."""
    got = 0
    while data := end.recv(2**20):
        got += len(data)
        time.sleep(pause)
    return got


def test_a_header_that_dribbles_ends(port: int) -> None:
    """Each byte in time, the whole not. Also as a further request on a connection that was used before."""
    for before in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as end:
            end.sendall(before)
            if before:
                assert end.recv(65_536).startswith(b"HTTP/1.1 200")
            assert send_until_closed(end, b"G", most=100, pause=0.05) < 40  # of 0.5 s, 0.1 s and a busy machine


def test_a_header_without_an_end_is_refused(port: int) -> None:
    """At 64 KiB, and not when it has filled the memory."""
    with socket.create_connection(("127.0.0.1", port)) as end:
        end.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert send_until_closed(end, b"a" * 65_536, most=200_000_000) < 20_000_000  # what the system buffers
    assert probe(port) < 1


def test_an_answer_that_nobody_reads_is_dropped(port: int) -> None:
    """And its memory with it; a caller that reads slowly gets all of it."""
    with socket.create_connection(("127.0.0.1", port)) as end:
        end.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.5)
        assert read_until_closed(end) < LARGE
    with socket.create_connection(("127.0.0.1", port)) as end:
        end.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_until_closed(end, pause=0.02) > LARGE


def test_a_connection_may_rest_between_requests(port: int) -> None:
    """For longer than headers may take."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        for _ in range(2):
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"x"
            time.sleep(1)

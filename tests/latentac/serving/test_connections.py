"""Callers that keep connections idle, send headers without an end, or do not read: others are answered."""

import asyncio
import contextlib
import http.client
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from latentac.serving import bodies, connections
from latentac.serving.refusals import Refused

LARGE = 50_000_000
MIDDLE = 8_000_000
"""More than the system keeps for a connection."""


async def answer(request: Request) -> Response:
    if request.url.path == "/body":
        with contextlib.suppress(ClientDisconnect):
            await request.body()
    if request.url.path == "/read":
        try:
            await bodies.body_of(request, LARGE)
        except Refused as refused:
            return PlainTextResponse(str(refused), refused.status)
    if request.url.path == "/block":
        time.sleep(1)
    if request.url.path == "/slow":
        await asyncio.sleep(2)
    if request.url.path == "/stream":
        return StreamingResponse("x" * 65_536 for _ in range(MIDDLE // 65_536))
    return PlainTextResponse("x" * {"/large": LARGE, "/middle": MIDDLE}.get(request.url.path, 1))


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a real uvicorn with bounds of half a second, two seconds of rest, and 20 connections, in a thread."""
    for name, value in {
        "HEADER_SECONDS": 0.5,
        "UNREAD_SECONDS": 0.5,
        "_POLL_SECONDS": 0.1,
        "MAX_CONNECTIONS": 20,
        "KEEP_ALIVE_SECONDS": 2,
    }.items():
        monkeypatch.setattr(connections, name, value)
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.5)
    config = uvicorn.Config(Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])]), log_config=None)
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


def test_a_header_below_the_bound_is_read(port: int) -> None:
    """In pieces, too: a proxy may add long ones."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as end:
        end.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 50_000)
        time.sleep(0.1)
        end.sendall(b"\r\n\r\n")
        assert end.recv(65_536).startswith(b"HTTP/1.1 200")


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


def test_a_connection_does_not_rest_without_an_end(port: int) -> None:
    """It is closed after its own time: not that of headers, and not that of uvicorn, which is longer here."""
    with socket.create_connection(("127.0.0.1", port)) as end:
        end.sendall(RESTING)
        assert end.recv(65_536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        assert is_closed(end)
        assert 1.5 < time.monotonic() - began < 3.5


HEAD = b" HTTP/1.1\r\nHost: x\r\n"
RESTING = b"GET /" + HEAD + b"\r\n"
UNFINISHED = b"POST /body" + HEAD + b"Content-Length: 10\r\n\r\nabc"
UNREAD = b"GET /middle" + HEAD + b"\r\n"


@pytest.mark.parametrize("sent", [RESTING, UNFINISHED, UNREAD, UNREAD.replace(b"x\r", b"x\r\nConnection: close\r", 1)])
def test_whoever_lets_the_server_wait_makes_room(port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Four times as many as are allowed rest after an answer, leave a body unfinished or an answer unread, all within
    their times: each probe is answered."""
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 60.0)
    with ExitStack() as stack:
        for _ in range(80):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            held.sendall(sent)
            if sent != UNFINISHED:  # one that the server still works for makes no room
                assert held.recv(100)
        assert max(probe(port) for _ in range(30)) < 1


def test_unread_requests_do_not_keep_the_place_of_who_does_not_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads no further request of a caller that does not read its answer, so its bytes stay unread. Who
    rests between two requests is not dropped instead."""
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 60.0)
    with ExitStack() as stack, closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as honest:

        def take_a_place() -> None:
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            for _ in range(10):
                held.sendall(UNREAD)
                time.sleep(0.02)

        for _ in range(19):
            take_a_place()
        for _ in range(5):
            honest.request("GET", "/")
            assert honest.getresponse().read() == b"x"
            take_a_place()


def test_an_answer_that_is_read_too_slowly_ends(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However steadily: a whole answer has its time."""
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 60.0)
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
        slow.sendall(b"GET /large" + HEAD + b"\r\n")
        got = 0
        for _ in range(100):
            got += len(slow.recv(2000))
            time.sleep(0.02)
        assert got + read_until_closed(slow) < LARGE  # what the system had taken over still comes


def test_who_waits_for_an_answer_does_not_make_room(port: int) -> None:
    """Whatever others do."""
    with socket.create_connection(("127.0.0.1", port)) as patient, ExitStack() as stack:
        patient.sendall(b"GET /slow" + HEAD + b"Connection: close\r\n\r\n")
        time.sleep(0.2)
        for _ in range(80):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        patient.settimeout(10)
        assert read_until_closed(patient) > 0


@pytest.mark.parametrize("path", ["/", "/body", "/slow", "/large"])
def test_a_body_that_is_none_ends_the_connection(port: int, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Be it before the answer, while it is written or after it: one answer at most, and no fault of the server."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as end:
        end.sendall(b"POST " + path.encode() + HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        time.sleep(0.2)
        end.sendall(b"no size\r\n\r\n")
        got = b""
        while data := end.recv(2**20):
            got += data
    assert got.count(b"HTTP/1.1 ") == 1
    assert got.startswith(b"HTTP/1.1 200" if path in ("/", "/large") else b"HTTP/1.1 400")
    time.sleep(0.2)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    assert probe(port) < 1


def test_an_upgrade_is_not_made_and_not_worth_a_line_in_the_log(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """The request is answered as if it did not ask for it."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as end:
        end.sendall(b"GET /" + HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert end.recv(65_536).startswith(b"HTTP/1.1 200")
    assert caplog.records == []


def test_a_body_that_dribbles_is_refused(port: int) -> None:
    """Each byte in time, the whole not."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as end:
        end.sendall(b"POST /read" + HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(12):
            end.sendall(b" ")
            time.sleep(0.05)
        assert end.recv(65_536).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(("files", "most"), [(10, 16), (1024, 256), (1_048_576, 1024)])
def test_connections_leave_files_for_others(files: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of those that the process may open, within bounds."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connections.most_connections() == most


def is_open(end: socket.socket) -> bool:
    """At this moment."""
    end.setblocking(False)
    try:
        return end.recv(65_536) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_no_more_connections_are_held_than_are_allowed(
    port: int, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """The newest stay, as many as are allowed, and all before them are dropped without any time being over."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 60.0)
    with ExitStack() as stack:
        if at_once:
            busy = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            busy.sendall(b"GET /block" + HEAD + b"Connection: close\r\n\r\n")
            time.sleep(0.3)
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(80)]
        if at_once:
            assert read_until_closed(busy) > 0
        deadline = time.monotonic() + 10
        while any(map(is_open, held[:60])) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        assert not any(map(is_open, held[:60]))
        assert all(map(is_open, held[61:]))
        assert at_once or is_open(held[60])  # the busy one may have had its place


@pytest.mark.parametrize("sent", [RESTING, UNFINISHED, UNREAD], ids=["rest", "body", "answer"])
def test_whoever_lets_the_server_wait_holds_no_file_for_long(
    port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Of four times as many as are allowed the server keeps so many open, before any time is over."""
    for name in ("HEADER_SECONDS", "UNREAD_SECONDS"):
        monkeypatch.setattr(connections, name, 60.0)
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        for _ in range(80):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            held.sendall(sent)
            if sent != UNFINISHED:
                assert held.recv(100)
        deadline = time.monotonic() + 1
        while (kept := len(os.listdir("/proc/self/fd")) - before - 80) > 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert kept <= 20


@pytest.mark.parametrize("sent", [UNFINISHED, b"GET /stream" + HEAD + b"\r\n"], ids=["body", "stream"])
def test_requests_that_wait_for_their_callers_keep_nobody_away(
    port: int, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """As many as are allowed, in the middle of a body or of a stream: the server is not done with them, and could not
    go on either."""
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 60.0)
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(sent)
        time.sleep(1)
        deadline = time.monotonic() + 15
        while True:  # until what the system keeps of each stream is full
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert probe(port) < 1
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_who_has_waited_longest_makes_room(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not who came first: a connection that is used stays."""
    for name in ("HEADER_SECONDS", "_POLL_SECONDS"):
        monkeypatch.setattr(connections, name, 60.0)
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as used, ExitStack() as stack:
        used.connect()
        end = used.sock
        for _ in range(3):
            used.request("GET", "/")
            assert used.getresponse().read() == b"x"
            for _ in range(19):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            time.sleep(0.1)
        assert used.sock is end, "the client had to connect again"


def test_what_is_no_body_after_the_answer_ends_the_connection_at_once(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any time is over."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 60.0)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as end:
        end.sendall(b"POST /" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        time.sleep(0.2)
        end.sendall(b"no size\r\n\r\n")
        assert read_until_closed(end) > 0

"""Callers that misuse their connections, while others ask as they should: a real server, over loopback."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentac.serving.connections import HEADER_SECONDS, most_connections
from latentac.serving.process import ServerProcess
from tests.latentac.serving.fuzzing import counted, faults, fuzzed
from tests.latentac.serving.test_protocols import ask
from tests.latentac.serving.test_robustness import resident
from tests.latentac.serving.wire import LAST, answers_in, connect, post, read_to_end

pytestmark = [pytest.mark.slow, pytest.mark.fuzz, pytest.mark.timeout(3600)]

PROBE_SECONDS = 5.0
"""In which a probe is answered, whatever others do; a machine that does nothing else takes some milliseconds."""
GROWTH_KB = 64_000
"""Of the server's memory over all misuse, at most."""
HONEST = {"prompt": "a red circle", "seed": 11, "num_steps": 2}
PREDICT, STREAM = "/v1/models/latentac:predict", "/v1/images/stream"
DRAW = post(PREDICT, json.dumps({"instances": [HONEST]}).encode())
WRONG = post(PREDICT, b'{"instances": [{"prompt": 1}]}')
EVENTS = post(STREAM, json.dumps(HONEST | {"num_steps": 3}).encode())
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
NOWHERE = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = LIVE.replace(b"GET", b"HEAD")
LARGE = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKS = post(PREDICT, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
FOREIGN = CHUNKS.replace(b"application/json", b"text/plain")

Misuse = Callable[[ServerProcess, st.DataObject], None]


class Others:
    """While it is entered: a caller that probes, and one that draws the same image again and again. What they got
    is judged at the end."""

    def __init__(self, server: ServerProcess, right: dict[str, Any]) -> None:
        self._server, self._right, self._stop = server, right, threading.Event()
        self.slowest = 0.0
        self.wrong: list[Any] = []
        self._threads = [threading.Thread(target=self._until_stopped, args=(do,)) for do in (self._probe, self._draw)]

    def _until_stopped(self, do: Callable[[], None]) -> None:
        while True:
            try:
                do()
            except Exception as error:  # noqa: BLE001 - told by the main thread
                self.wrong.append(error)
            if self._stop.wait(0.02):
                return

    def _probe(self) -> None:
        began = time.monotonic()
        with closing(http.client.HTTPConnection(urlsplit(self._server.address).netloc, timeout=30)) as connection:
            connection.request("GET", "/v2/health/live")
            answer = connection.getresponse()
            if (answer.status, answer.read()) != (200, b'{"live":true}'):
                self.wrong.append(answer.status)
        self.slowest = max(self.slowest, time.monotonic() - began)
        counted("connections: others", [answer.status], connections=1)

    def _draw(self) -> None:
        if self._server.predict(HONEST) != self._right:
            self.wrong.append("another image")
        counted("connections: others", [200], connections=1)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def descriptors(server: ServerProcess) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def reset(connection: socket.socket) -> None:
    """Close it with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def ended(connection: socket.socket, how: str) -> None:
    if how == "reset":
        reset(connection)
    elif how == "half closed":
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        answers = answers_in_part(read_to_end(connection))
        assert all(200 <= status < 500 for status in answers), answers
    connection.close()


def answers_in_part(data: bytes) -> list[int]:
    """The statuses of answers of which the last may be cut."""
    return [int(line[9:12]) for line in data.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


def trickle(server: ServerProcess, data: st.DataObject) -> None:
    """Bytes one at a time, or in pieces of any size: the answer is that of the whole."""
    sent, size = data.draw(st.sampled_from([(DRAW, 200), (WRONG, 422), (LIVE, 200)])), data.draw(st.integers(1, 40))
    pause = data.draw(st.sampled_from([0.0, 0.0005]))
    with connect(server) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        whole = sent[0] + LAST
        for start in range(0, len(whole), size):
            connection.sendall(whole[start : start + size])
            time.sleep(pause)
        answers = answers_in(read_to_end(connection))
    counted("connections", [answer.status for answer in answers], connections=1)
    assert [answer.status for answer in answers] == [sent[1], 200]


def cut(server: ServerProcess, data: st.DataObject) -> None:
    """Ended anywhere in a request, in its head or its body, in each way there is."""
    sent = data.draw(st.sampled_from([DRAW, EVENTS, WRONG, CHUNKS + b"ff\r\n", FOREIGN + b"ff\r\nabc"]))
    with connect(server) as connection:
        connection.sendall(sent[: data.draw(st.integers(0, len(sent)))])
        time.sleep(data.draw(st.floats(0, 0.05)))
        ended(connection, data.draw(st.sampled_from(["closed", "reset", "half closed"])))
    counted("connections", connections=1, requests=1)


def damaged(server: ServerProcess, data: st.DataObject) -> None:
    """A body that turns out to be none: before its answer, after it, or behind a request that is answered."""
    before = data.draw(st.sampled_from([CHUNKS, FOREIGN, LIVE, WRONG, DRAW, EVENTS]))
    known = st.sampled_from([b"zz\r\n", b"-1\r\n", b"\0\0\0", b"3\r\nabcdef\r\n", b"f" * 30 + b"\r\n"])
    damage = data.draw(known | st.binary(min_size=1, max_size=50))
    with connect(server) as connection:
        connection.sendall(before)
        time.sleep(data.draw(st.sampled_from([0.0, 0.01, 0.1])))
        with contextlib.suppress(OSError):
            connection.sendall(damage + b"\r\n\r\n")
        ended(connection, "half closed")
    counted("connections", connections=1, requests=1)


def pipelined(server: ServerProcess, data: st.DataObject) -> None:
    """Many requests at once: as many answers, in their order."""
    table = {LIVE: 200, HEAD: 200, WRONG: 422, NOWHERE: 404, DRAW: 200, LARGE: 200}
    sent = data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=12))
    with connect(server) as connection:
        connection.sendall(b"".join(sent) + LAST)
        answers = answers_in(read_to_end(connection), ["HEAD" if each == HEAD else "GET" for each in sent])
    counted("connections", [answer.status for answer in answers], connections=1)
    assert [answer.status for answer in answers] == [table[each] for each in sent] + [200]


def kept(server: ServerProcess, data: st.DataObject) -> None:
    """Many requests one after another."""
    with closing(http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=30)) as connection:
        for path in data.draw(
            st.lists(st.sampled_from(["/v2/health/live", "/nowhere", "/v2"]), min_size=1, max_size=60)
        ):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            counted("connections", [answer.status])
            assert answer.status == (404 if path == "/nowhere" else 200)
    counted("connections", connections=1)


def idle(server: ServerProcess, data: st.DataObject) -> None:
    """Hundreds that say nothing, or half a head, or half a body, or rest after an answer."""
    number = data.draw(st.integers(50, 400))
    sent = data.draw(st.sampled_from([b"", LIVE[:20], CHUNKS, LIVE, DRAW[:-5], b"\r\n"]))
    how = data.draw(st.sampled_from(["closed", "reset"]))
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(connection := connect(server))
            connection.sendall(sent)
            if how == "reset":
                stack.callback(reset, connection)
        time.sleep(0.3)
    counted("connections", connections=number, requests=number if sent else 0)


def unread(server: ServerProcess, data: st.DataObject) -> None:
    """Large answers, or a stream, of which nothing is read, or the beginning."""
    sent = data.draw(st.sampled_from([LARGE * 60, EVENTS, DRAW * 5, LARGE * 60 + LIVE[:10]]))
    with connect(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(sent)
        if data.draw(st.booleans()):
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        time.sleep(data.draw(st.floats(0, 0.3)))
        if data.draw(st.booleans()):
            reset(connection)
    counted("connections", connections=1, requests=max(1, sent.count(b" HTTP/1.1\r\n")))


def after_the_last(server: ServerProcess, data: st.DataObject) -> None:
    """Requests behind `Connection: close`: they have no answer."""
    with connect(server) as connection:
        connection.sendall(LAST + data.draw(st.sampled_from([LIVE, DRAW, b"\0", LIVE * 50])))
        answers = answers_in(read_to_end(connection))
    counted("connections", [answer.status for answer in answers], connections=1)
    assert [answer.status for answer in answers] == [200]


MISUSES: list[Misuse] = [trickle, cut, cut, damaged, damaged, pipelined, kept, idle, unread, after_the_last]


@pytest.fixture(scope="module")
def right(small: ServerProcess) -> dict[str, Any]:
    """What an honest caller gets."""
    return small.predict(HONEST)


@pytest.fixture(scope="module", autouse=True)
def bounded(small: ServerProcess, right: dict[str, Any]) -> Iterator[None]:
    """Over all misuse of this module: memory stays within its bound, descriptors return to what they were, and the
    log tells no fault."""
    for _ in range(5):
        ask(small, "GET", "/openapi.json")
    held, memory = descriptors(small), resident(small)
    yield
    deadline = time.monotonic() + 30
    while descriptors(small) > held and time.monotonic() < deadline:
        time.sleep(0.1)
    print(f"descriptors {held} -> {descriptors(small)}, memory {memory} kB -> {resident(small)} kB")
    assert descriptors(small) <= held
    assert resident(small) - memory < GROWTH_KB
    assert faults(small) == []


@fuzzed(0.25)
@given(data=st.data())
def test_who_misuses_connections_disturbs_nobody(
    small: ServerProcess, right: dict[str, Any], data: st.DataObject
) -> None:
    """Meanwhile and afterwards probes are answered in time, and whoever asks for an image gets the right one."""
    with Others(small, right) as others:
        for misuse in data.draw(st.lists(st.sampled_from(MISUSES), min_size=1, max_size=3)):
            misuse(small, data)
    assert others.wrong == []
    assert others.slowest < PROBE_SECONDS
    assert small.predict(HONEST) == right


def test_who_leaves_in_the_middle_of_a_body_is_no_fault_of_the_server(small: ServerProcess) -> None:
    """Counted as gone, 499, on every route; not as a failure of the server."""
    for number, path in enumerate((PREDICT, STREAM, "/v1/images/generations", "/v2/models/latentac/infer")):
        with connect(small) as connection:
            connection.sendall(post(path, b"x" * 100, b"X-Request-Id: left-%d" % number)[:-50])
            time.sleep(0.1)
        deadline, found = time.monotonic() + 10, None
        while not found and time.monotonic() < deadline:
            found = re.search(rf'"request": "left-{number}".*"status": (\d+)', small.log(2**30))
        assert found, path
        assert found[1] == "499", path
    assert faults(small) == []


def test_a_half_head_ends_in_its_time(small: ServerProcess) -> None:
    """On the server as it runs, with its own bounds: after ten seconds, and not before half of them."""
    began = time.monotonic()
    with connect(small, 60) as connection:
        connection.sendall(LIVE[:-2])
        assert read_to_end(connection) == b""
    assert HEADER_SECONDS / 2 < time.monotonic() - began < HEADER_SECONDS * 5


def test_more_connections_than_are_allowed_do_not_keep_a_probe_away(
    small: ServerProcess, right: dict[str, Any]
) -> None:
    """More than are allowed, each kind at once: silent, resting, with half a body, with an answer that is not read."""
    kinds, number = [b"", LIVE, CHUNKS, LARGE * 60], most_connections() + 100
    with ExitStack() as stack, Others(small, right) as others:
        for index in range(number):
            connection = stack.enter_context(connect(small))
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(kinds[index % len(kinds)])
    counted("connections", connections=number, requests=number)
    assert others.wrong == []
    assert others.slowest < PROBE_SECONDS


def test_a_request_that_has_arrived_keeps_its_connection_in_a_burst(small: ServerProcess) -> None:
    """The server is busy (here: stopped) while a request arrives, and then more silent connections than are allowed."""
    os.kill(small.pid, signal.SIGSTOP)
    try:
        with ExitStack() as stack, connect(small) as honest:
            honest.sendall(LAST)
            for _ in range(most_connections() + 100):
                stack.enter_context(connect(small))
            os.kill(small.pid, signal.SIGCONT)
            assert [answer.status for answer in answers_in(read_to_end(honest))] == [200]
    finally:
        os.kill(small.pid, signal.SIGCONT)

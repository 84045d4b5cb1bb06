"""A store whose answers come late, piece by piece: what begins in time is read to its end, and no longer than that."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from latentac.store import Store, open_store
from latentac.store.blobs import Patience, Stream
from latentac.store.places import connect
from latentac.system.errors import StoreUnavailable

PATIENCE = Patience(retries=3, back_off_seconds=0.05, timeout_seconds=2.0, idle_seconds=0.5)
"""An answer may begin after half a second, and a read of it takes up to two."""

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\n"
LIST = b"<ListBucketResult><Name>bucket</Name></ListBucketResult>"
OPERATIONS: dict[str, tuple[Callable[[Store], object], bytes, object]] = {
    "list": (lambda store: store.keys(), LIST, []),
    "read": (lambda store: store.read_json("registry/x.json"), b"{}", {}),
}


@contextlib.contextmanager
def in_pieces(pieces: list[bytes], pause: float, asked: list[bytes] | None = None) -> Iterator[str]:
    """The address of a server that sends them to each caller, and waits before each. asked: what the callers said."""
    listener, asked = socket.create_server(("127.0.0.1", 0)), [] if asked is None else asked

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            asked.append(client.recv(65_536))
            for piece in pieces:
                time.sleep(pause)
                client.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture
def store_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Store]:
    def opened(address: str) -> Store:
        monkeypatch.setenv("LATENTAC_S3_ENDPOINT", f"http://{address}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret")
        return open_store("s3://bucket/store", PATIENCE)

    return opened


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_answer_that_begins_late_is_read_to_its_end(store_at: Callable[[str], Store], operation: str) -> None:
    """Its first half comes after more than may pass without a byte, and its second half after twice as much."""
    ask, body, expected = OPERATIONS[operation]
    with in_pieces([HEAD, b"Content-Length: %d\r\n\r\n%s" % (len(body), body)], 1.0) as address:
        began = time.monotonic()
        assert ask(store_at(address)) == expected
        assert time.monotonic() - began > 3 * PATIENCE.idle_seconds


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_read_begins_that_could_end_after_the_bound(store_at: Callable[[str], Store], operation: str) -> None:
    """Each piece comes in time for a read, and the answer as a whole too late."""
    with in_pieces([HEAD, *[b"X: x\r\n"] * 9], 1.6) as address:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"given up after \d"):
            OPERATIONS[operation][0](store_at(address))
        assert time.monotonic() - began < PATIENCE.bound_seconds


def test_a_download_that_begins_fast_and_then_dribbles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came in a second before does not count for this one."""
    patience = Patience(retries=3, timeout_seconds=2.0, idle_seconds=1.0, bytes_per_second=65_536)
    body = b"Content-Length: 100000000\r\n\r\n" + bytes(4 * 2**20)
    asked: list[bytes] = []
    with in_pieces([HEAD + body, *[b"x"] * 400], 0.05, asked) as address:
        monkeypatch.setenv("LATENTAC_S3_ENDPOINT", f"http://{address}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret")
        store, began = connect("s3://bucket/store", patience), time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"only \d+ bytes came within 1 s"):
            store.get("weights", Stream(None))
        assert time.monotonic() - began < 8
    assert len(asked) == 1, "it was asked for again"


def test_a_download_that_never_gives_a_byte_is_asked_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer begins at once and breaks off: no attempt begins later than what may pass without a byte."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret")
    patience = Patience(retries=6, back_off_seconds=0.5, timeout_seconds=2.0, idle_seconds=1.5)
    with in_pieces([HEAD + b"Content-Length: 1000\r\n\r\n"], 0.0) as address:
        monkeypatch.setenv("LATENTAC_S3_ENDPOINT", f"http://{address}")
        store, began = connect("s3://bucket/store", patience), time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no answer \(\w+\), given up after"):
            store.get("weights", Stream(None))
        assert time.monotonic() - began < 4

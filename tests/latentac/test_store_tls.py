"""A store behind TLS, or behind a name: connections have a bound as a whole, and answers have those of plain HTTP."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from latentac.store import Store, open_store
from latentac.store.blobs import Patience
from latentac.system.errors import StoreAccessError, StoreUnavailable
from tests import faults
from tests.latentac.test_store import _certificate
from tests.latentac.test_store_hostile import Liar, item, page

SHORT = Patience(retries=6, back_off_seconds=0.1, timeout_seconds=1.0, idle_seconds=2.0)
MARGIN_SECONDS = 1.0
"""Of a busy machine."""


def _handshake(client: socket.socket, ended: threading.Event) -> None:
    """A record of 16 KiB, byte by byte."""
    client.sendall(b"\x16\x03\x03\x40\x00")
    while not ended.wait(faults.PAUSE_SECONDS):
        client.sendall(b"\x02")


@pytest.fixture
def store_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Store]:
    def opened(endpoint: str) -> Store:
        monkeypatch.setenv("LATENTAC_S3_ENDPOINT", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret")
        return open_store("s3://bucket/store", SHORT)

    return opened


def test_a_handshake_of_single_bytes_is_given_up_within_the_bound(
    store_at: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time, and the connection is never made."""
    monkeypatch.setitem(faults.FAULTS, "handshake", _handshake)
    with faults.faulty("handshake") as server:
        store, began = store_at(f"https://{server.address}"), time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no answer \(\w+\), given up after"):
            store.keys()
        assert time.monotonic() - began < SHORT.bound_seconds + MARGIN_SECONDS


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_name_that_is_looked_up_without_an_end_is_given_up(
    store_at: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """The system's resolver has bounds of its own, which may be minutes."""
    found = socket.getaddrinfo

    def slow(*arguments: object, **options: object) -> object:
        time.sleep(10)
        return found(*arguments, **options)  # type: ignore[arg-type]

    store, began = store_at(f"{scheme}://127.0.0.1:9"), time.monotonic()
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(StoreUnavailable, match=r"no answer \(ConnectTimeoutError\), given up after"):
        store.keys()
    assert time.monotonic() - began < SHORT.bound_seconds + MARGIN_SECONDS


def dribble(request: BaseHTTPRequestHandler) -> None:
    """A head that does not end."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
    for _ in range(600):
        request.wfile.write(b"a")
        time.sleep(faults.PAUSE_SECONDS)


def too_long(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "application/xml")
    request.end_headers()
    request.wfile.write(page(item()) + b" " * 9 * 2**20)


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., None]], str]]:
    """The endpoint of a server with a trusted certificate that answers so."""
    folder, servers = _certificate(tmp_path / "certificates"), list[Liar]()
    monkeypatch.setenv("LATENTAC_S3_CA", str(folder / "public.crt"))

    def started(answer: Callable[[BaseHTTPRequestHandler], None]) -> str:
        server = Liar(answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "public.crt", folder / "private.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"https://{server.address}"

    yield started
    for server in servers:
        server.shutdown()
        server.socket.close()


def test_an_answer_of_single_bytes_over_tls_is_given_up(
    secured: Callable[[Callable[..., None]], str], store_at: Callable[[str], Store]
) -> None:
    """As over plain HTTP."""
    store, began = store_at(secured(dribble)), time.monotonic()
    with pytest.raises(StoreUnavailable, match="given up after"):
        store.keys()
    assert time.monotonic() - began < SHORT.bound_seconds + MARGIN_SECONDS


def test_an_answer_over_tls_that_is_too_long_is_refused(
    secured: Callable[[Callable[..., None]], str], store_at: Callable[[str], Store]
) -> None:
    """As over plain HTTP."""
    with pytest.raises(StoreAccessError, match="an answer has more than 8 MiB"):
        store_at(secured(too_long)).keys()


def test_a_certificate_that_is_not_trusted_is_reported_at_once(
    secured: Callable[[Callable[..., None]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting does not make it trusted."""
    monkeypatch.setenv("LATENTAC_S3_ENDPOINT", secured(too_long))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret")
    monkeypatch.delenv("LATENTAC_S3_CA")
    store = open_store("s3://bucket/store", Patience(retries=6, back_off_seconds=1.0))
    began = time.monotonic()
    with pytest.raises(StoreAccessError, match=r"no trusted TLS connection.*LATENTAC_S3_CA"):
        store.keys()
    assert time.monotonic() - began < 4

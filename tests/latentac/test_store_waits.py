"""Every wait for a store has a bound and a message, and nobody reads more than was promised."""

import os
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest

from latentac.errors import IntegrityError, StoreError, StoreUnavailable
from latentac.store import Manifest, Store, open_store
from latentac.store.blobs import Overrun, Patience, Stream
from latentac.store.manifest import is_inside
from tests.latentac.test_store import KEY, bulk, publish, use, write
from tests.minio import Server
from tests.proxy import Proxy

SHORT = Patience(retries=6, back_off_seconds=0.1, timeout_seconds=1.0, idle_seconds=2.0, bytes_per_second=65_536)
MARGIN_SECONDS = 1.0
"""Of a busy machine."""


@pytest.fixture
def proxy(minio_server: Server) -> Iterator[Proxy]:
    """In front of a real MinIO."""
    with Proxy(("127.0.0.1", minio_server.port)) as made:
        yield made


@pytest.fixture
def published(proxy: Proxy, minio_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store behind the proxy, with an artifact of 4 MiB in it, asked with little patience."""
    url = use(minio_server, monkeypatch)
    monkeypatch.setenv("LATENTAC_S3_ENDPOINT", f"http://{proxy.address}")
    store = open_store(url, SHORT)
    publish(store, write(tmp_path / "artifact", {"weights": bulk(4)}))
    return store


OPERATIONS: dict[str, Callable[[Store, Path], object]] = {
    "manifest": lambda store, folder: store.manifest(KEY),
    "fetch": lambda store, folder: store.fetch(KEY, folder / "out"),
    "publish": lambda store, folder: publish(store, folder / "artifact", "run-1/again"),
    "keys": lambda store, folder: store.keys(),
    "write_json": lambda store, folder: store.write_json("registry/x.json", {}),
}


@pytest.mark.minio
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_that_stays_silent_is_given_up_within_the_bound(
    proxy: Proxy, published: Store, tmp_path: Path, operation: str
) -> None:
    """It accepts and never answers: exit code 75, with the server and what was waited for."""
    proxy.silent = True
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"127.0.0.1.*no answer \(ReadTimeoutError\), given up after"):
        OPERATIONS[operation](published, tmp_path)
    assert time.monotonic() - began < SHORT.bound_seconds + MARGIN_SECONDS
    assert proxy.accepted > 1, "it was not tried again"


@pytest.mark.minio
def test_a_fetch_that_dribbles_is_given_up(proxy: Proxy, published: Store, tmp_path: Path) -> None:
    """Each byte that arrives is an answer, but 4 MiB at 1 kB/s take more than an hour. No folder appears."""
    proxy.bytes_per_second = 1_000
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"only \d+ bytes came within \d+ s, given up after"):
        published.fetch(KEY, tmp_path / "out")
    assert time.monotonic() - began < 2 * SHORT.bound_seconds + MARGIN_SECONDS  # the manifest, and then the file
    assert not (tmp_path / "out").exists()


@pytest.mark.minio
def test_a_slow_store_is_waited_for_while_it_moves(proxy: Proxy, published: Store, tmp_path: Path) -> None:
    """Longer than any silence may last."""
    proxy.bytes_per_second = 1_000_000
    began = time.monotonic()
    published.fetch(KEY, tmp_path / "out")
    assert time.monotonic() - began > SHORT.bound_seconds
    assert (tmp_path / "out" / "weights").read_bytes() == bulk(4)


@pytest.mark.minio
def test_a_connection_that_breaks_is_made_again(proxy: Proxy, published: Store, tmp_path: Path) -> None:
    """In the middle of a file: what appears is whole."""
    proxy.cut_after = 2**21
    published.fetch(KEY, tmp_path / "out")
    assert proxy.cuts == 1
    assert (tmp_path / "out" / "weights").read_bytes() == bulk(4)


def claimed(tmp_path: Path) -> tuple[Store, Manifest, Path]:
    """A store in a folder, an artifact of one byte in it, and the file that holds this byte."""
    store = open_store(f"file://{tmp_path}/store")
    manifest = publish(store, write(tmp_path / "artifact", {"weights": b"x"}))
    return store, manifest, tmp_path / "store" / manifest.folder / "weights"


@pytest.mark.parametrize("kind", ["large", "sparse", "pipe", "endless", "folder"])
def test_no_more_is_read_than_was_claimed(tmp_path: Path, kind: str) -> None:
    """A file of one byte that is something else now: it is refused at once, and the disk stays as it was."""
    store, _, file = claimed(tmp_path)
    file.unlink()
    match kind:
        case "large":
            file.write_bytes(bytes(2**26))
        case "sparse":
            with file.open("wb") as stream:
                stream.truncate(2**42)
            file.chmod(0o444)
        case "pipe":
            os.mkfifo(file, 0o444)
        case "endless":
            file.symlink_to("/dev/zero")
        case "folder":
            file.mkdir()
    began = time.process_time()
    with pytest.raises((IntegrityError, StoreError)):
        store.fetch(KEY, tmp_path / "out")
    assert time.process_time() - began < 1
    assert not (tmp_path / "out").exists()


def test_a_manifest_without_an_end_is_refused(tmp_path: Path) -> None:
    """Nobody's memory is filled by it."""
    store, *_ = claimed(tmp_path)
    with (tmp_path / "store" / KEY / "manifest.json").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(IntegrityError, match="more than 8 MiB"):
        store.manifest(KEY)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a//evil", "a/\\..\\evil"])
def test_an_object_whose_name_leads_elsewhere_is_left_out(tmp_path: Path, name: str) -> None:
    """Whoever may write to a bucket may name an object anything."""
    assert not is_inside(name)


def test_a_stream_stops_at_its_limit() -> None:
    """Before the byte that is too many is written."""
    sink = BytesIO()
    stream = Stream(sink, limit=4)
    stream.write(b"abcd")
    with pytest.raises(Overrun):
        stream.write(b"e")
    assert sink.getvalue() == b"abcd"

"""Every wait for a store has a bound and a message, and nobody reads more than was promised."""

import contextlib
import itertools
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest

from latentac.store import Manifest, Store, bucket, open_store
from latentac.store.blobs import Entry, Folder, Overrun, Patience, Stream
from latentac.store.bootstrap import patience_of
from latentac.store.manifest import commit, is_inside
from latentac.system.errors import ArtifactNotFound, IntegrityError, StoreAccessError, StoreError, StoreUnavailable
from tests.faults import faulty
from tests.latentac.test_store import KEY, bulk, publish, use, write
from tests.proxy import Proxy
from tools.minio import Server

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
    """Each byte that arrives is an answer, but 4 MiB at 8 kB/s take nine minutes. No folder appears."""
    proxy.bytes_per_second = 8_000
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


def asked(address: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store at `address`, asked with little patience."""
    monkeypatch.setenv("LATENTAC_S3_ENDPOINT", f"http://{address}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret")
    return open_store("s3://bucket/store", SHORT)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", ["head", "body"])
def test_an_answer_of_single_bytes_is_given_up_within_the_bound(
    fault: str, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes in time, and an answer never does."""
    write(tmp_path / "artifact", {"weights": b"x"})
    with faulty(fault) as server:
        store, began = asked(server.address, monkeypatch), time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"127.0.0.1.*given up after \d"):
            OPERATIONS[operation](store, tmp_path)
        assert time.monotonic() - began < SHORT.bound_seconds + MARGIN_SECONDS


def test_an_answer_that_breaks_off_again_and_again_is_asked_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt begins later than what may pass without a byte."""
    with faulty("cut") as server:
        store, began = asked(server.address, monkeypatch), time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no answer \(ProtocolError\), given up after"):
            store.keys()
        assert time.monotonic() - began < SHORT.idle_seconds + MARGIN_SECONDS
        assert server.accepted > 2


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "the same again": lambda: itertools.repeat("store/a"),
    "always another": lambda: (f"store/{number:09}" for number in itertools.count()),
    "empty": lambda: itertools.repeat(""),
}


@contextlib.contextmanager
def endless_list(
    names: Iterator[str], body: int = 0, root: str = "<Name>bucket</Name>", pause: float = 0.0
) -> Iterator[str]:
    """The address of a server whose list has a next page as long as there are names. body: bytes of white space in
    each; pause: seconds before each."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(pause)
            name = next(names, None)
            item = f"<Contents><Key>{name}</Key><Size>1</Size></Contents>" if name else ""
            more = f"<IsTruncated>{str(name is not None).lower()}</IsTruncated>"
            more += "<NextContinuationToken>x</NextContinuationToken>"
            start, end = f"<ListBucketResult>{root}{item}", f"{more}</ListBucketResult>"
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(start) + body + len(end)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(start.encode())
                for _ in range(body >> 20):
                    self.wfile.write(b" " * 2**20)
                self.wfile.write(end.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("pages", PAGES)
def test_a_list_without_an_end_is_refused(pages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers for the store may always name a next page."""
    monkeypatch.setattr(bucket, "MOST_OBJECTS", 20)
    with endless_list(PAGES[pages]()) as address:
        store, began = asked(address, monkeypatch), time.monotonic()
        with pytest.raises(StoreError, match=r"comes twice|over 20 objects|no answer.*given up"):
            store.keys()
        assert time.monotonic() - began < SHORT.bound_seconds + MARGIN_SECONDS


def test_a_long_list_is_waited_for_while_names_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than any silence may last."""
    with endless_list((f"store/{number}/manifest.json" for number in range(7)), pause=0.7) as address:
        store, began = asked(address, monkeypatch), time.monotonic()
        assert store.keys() == [str(number) for number in range(7)]
        assert time.monotonic() - began > SHORT.bound_seconds


@pytest.mark.parametrize("fault", ["silent", "head"])
def test_a_probe_is_less_patient(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A run that could not publish is to end before it begins, within seconds."""
    monkeypatch.setattr("latentac.store.artifacts._PROBE_SECONDS", (0.3, 0.6))
    with faulty(fault) as server:
        asked(server.address, monkeypatch)
        store, began = open_store("s3://bucket/store", Patience(timeout_seconds=4, idle_seconds=8)), time.monotonic()
        with pytest.raises(StoreUnavailable, match="given up after"):
            store.probe()
        assert time.monotonic() - began < 0.6 + 2 * 0.3 + MARGIN_SECONDS < 4


def test_a_list_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is XML, and lacks what each list has."""
    with (
        endless_list(PAGES["the same again"](), root="") as address,
        pytest.raises(StoreAccessError, match="no S3 answers"),
    ):
        asked(address, monkeypatch).keys()


def test_a_page_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it fills the memory."""
    with endless_list(PAGES["empty"](), body=2**27) as address:
        store = asked(address, monkeypatch)
        with pytest.raises(StoreAccessError, match="an answer has more than 8 MiB"):
            store.keys()


def test_the_bootstrap_waits_as_long_as_it_should() -> None:
    """The chart says two minutes: a server may be slower to start than a step may be to wait."""
    assert patience_of(120).idle_seconds == 120
    assert patience_of(120).bound_seconds == 140
    assert patience_of(120).retries * patience_of(120).back_off_max_seconds >= 120


def test_a_plain_object_whose_name_leads_elsewhere_is_not_written(tmp_path: Path) -> None:
    """Whoever may write to a bucket may name an object anything; a folder's store has no such name."""
    store = open_store(f"file://{tmp_path}/store")
    (tmp_path / "store" / "tensorboard" / "run").mkdir(parents=True)
    (tmp_path / "store" / "evil").write_bytes(b"x")
    named = {"tensorboard/run/../../evil": Entry(1, 0.0, "")}
    store._backend.entries = lambda prefix: named  # type: ignore[method-assign]
    store.read_files("tensorboard/run", tmp_path / "a" / "b")
    assert not (tmp_path / "evil").exists()


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


def test_no_more_is_kept_in_memory_than_was_claimed(tmp_path: Path) -> None:
    """A file of one byte that has a hundred million now: neither is all of it read, by whoever only checks it."""
    store, manifest, file = claimed(tmp_path)
    file.unlink()
    file.write_bytes(bytes(10**8))
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="found a larger file"):
            store.read(KEY, "weights")
        with pytest.raises(IntegrityError, match="found a larger file"):
            store.verify(manifest)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_pipe_in_a_store_is_no_object(tmp_path: Path) -> None:
    """It is not there, for whoever reads: neither waited for, nor an empty file."""
    store, *_ = claimed(tmp_path)
    (tmp_path / "store" / "registry").mkdir()
    os.mkfifo(tmp_path / "store" / "registry" / "x.json")
    with pytest.raises(ArtifactNotFound):
        store.read_json("registry/x.json")
    assert store.pointers("registry") == []


def test_the_list_of_a_folder_has_neither_what_is_being_written_nor_what_links_lead_to(tmp_path: Path) -> None:
    """A killed writer leaves the first; of a link the list tells its own size, for that is what goes with it."""
    store, *_ = claimed(tmp_path)
    (tmp_path / "store" / ".partial").mkdir(exist_ok=True)
    (tmp_path / "store" / ".partial" / "a").write_bytes(b"x")
    (tmp_path / "large").write_bytes(bytes(10**6))
    (tmp_path / "store" / "link").symlink_to(tmp_path / "large")
    found = store.entries()
    assert not [name for name in found if name.startswith(".")]
    assert found["link"].size < 1000


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


def test_what_is_sent_again_is_what_was_sent() -> None:
    """A pointer or a manifest comes from memory, which can be written to: it is not emptied for another attempt."""
    source = Stream(BytesIO(b"abc"))
    assert source.read() == b"abc"
    source.rewind()
    assert source.read() == b"abc"
    sink = BytesIO()
    stream = Stream(sink)
    stream.write(b"abc")
    stream.rewind()
    stream.write(b"d")
    assert sink.getvalue() == b"d"


@pytest.mark.parametrize("command", ["ls-files", "describe"])
def test_a_git_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """The commit is `unknown` then, or what LATENTAC_COMMIT says."""
    (tmp_path / "git").write_text(f'#!/bin/sh\ncase "$*" in *{command}*) exec sleep 20;; esac\n')
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("LATENTAC_COMMIT", "c0ffee")
    monkeypatch.setattr("latentac.store.manifest._GIT_SECONDS", 0.3)
    began = time.monotonic()
    assert commit.__wrapped__() == "c0ffee"
    assert time.monotonic() - began < 5


def test_a_stream_stops_at_its_limit() -> None:
    """Before the byte that is too many is written."""
    sink = BytesIO()
    stream = Stream(sink, limit=4)
    stream.write(b"abcd")
    with pytest.raises(Overrun):
        stream.write(b"e")
    assert sink.getvalue() == b"abcd"


def test_a_stream_says_when_its_last_byte_passed() -> None:
    """That nothing came, or that the end was reached, is not movement: the server is given up by it."""
    stream = Stream(BytesIO(b"ab"))
    moved = stream.moved_at
    time.sleep(0.01)
    stream.read(0)
    assert stream.moved_at == moved
    stream.read(2)
    assert stream.moved_at > moved
    moved = stream.moved_at
    time.sleep(0.01)
    assert (stream.read(), stream.moved_at) == (b"", moved)


def test_a_folder_is_written_and_listed_while_others_empty_it(tmp_path: Path) -> None:
    """Several runs in one store: a folder that another one just removed, being empty, is made again, and is no error
    for who lists."""
    blobs, end = Folder(tmp_path), time.monotonic() + 1.5

    def write_and_remove(name: str) -> None:
        while time.monotonic() < end:
            blobs.put(f"a/b/{name}", Stream(BytesIO(b"x")), 1)
            blobs.remove(f"a/b/{name}")

    def look() -> None:
        while time.monotonic() < end:
            assert set(blobs.names("")) <= {f"a/b/{name}" for name in "0123"}

    with ThreadPoolExecutor(5) as pool:
        tasks = [*(pool.submit(write_and_remove, name) for name in "0123"), pool.submit(look)]
        for task in tasks:
            task.result()

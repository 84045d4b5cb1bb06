"""A store that lies: an S3 server that says anything, and a folder that somebody else writes to."""

import hashlib
import itertools
import json
import os
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from latentac.store import Store, open_store
from latentac.store.blobs import Entry, Patience, Stream
from latentac.store.manifest import clashes
from latentac.store.mirror import Mirror
from latentac.store.places import connect
from latentac.system.errors import IntegrityError, StoreAccessError, StoreError
from tests.latentac.test_store import KEY, publish, write

PATIENCE = Patience(retries=1, back_off_seconds=0.05, timeout_seconds=5.0, idle_seconds=5.0)
SPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
MOST_MEMORY = 256 * 2**20

Answer = Callable[[BaseHTTPRequestHandler], None]


class Liar(ThreadingHTTPServer):
    """An S3 server that answers as it is told. seen: the requests' lines and headers."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        self.seen: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(inner) -> None:  # noqa: N805
                inner.rfile.read(int(inner.headers.get("content-length") or 0))
                self.seen.append(f"{inner.requestline}\n{inner.headers}")
                try:
                    answer(inner)
                except ConnectionError:  # the client has had enough
                    inner.close_connection = True

            do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = do_GET  # noqa: N815

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


@contextmanager
def lying(answer: Answer) -> Iterator[Liar]:
    with Liar(answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Store]]:
    """A store at a server that answers so, and keys to it that are temporary."""
    servers = []

    def made(answer: Answer) -> Store:
        server = lying(answer)
        servers.append(server)
        monkeypatch.setenv("LATENTAC_S3_ENDPOINT", f"http://{server.__enter__().address}")
        return open_store("s3://bucket", PATIENCE)

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"canary-{name}")
    yield made
    for server in servers:
        server.__exit__(None, None, None)


def says(status: int, body: bytes = b"", **headers: str) -> Answer:
    """An answer, as XML unless the headers say otherwise."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        given = {"Content-Type": "application/xml", "Content-Length": str(len(body))}
        for name, value in (given | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    return answer


def page(*items: str, more: str = "") -> bytes:
    """A page of a listing; more: the token of the next one."""
    found = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{more}</NextContinuationToken>" if more else ""
    return f'<ListBucketResult xmlns="{SPACE}"><Name>b</Name>{found}{"".join(items)}</ListBucketResult>'.encode()


def item(key: str = "a/manifest.json", size: str = "1", changed: str = "2026-01-01T00:00:00.000Z") -> str:
    fields = {"Key": key, "LastModified": changed, "ETag": "x", "Size": size}
    return f"<Contents>{''.join(f'<{name}>{text}</{name}>' for name, text in fields.items())}</Contents>"


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read_json("registry/p.json"),
    "write": lambda store: store.write_json("registry/p.json", {}),
    "list": lambda store: store.keys(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_leads_nowhere(ask: Callable[[Answer], Store], status: int, operation: str) -> None:
    """Neither the session token nor what is uploaded goes to a host that the operator did not name."""
    with lying(says(200, b"{}")) as other:
        store = ask(says(status, Location=f"http://{other.address}/elsewhere"))
        with pytest.raises(StoreError):
            OPERATIONS[operation](store)
        assert not other.seen


def test_a_redirect_to_no_address_is_an_error_of_ours(ask: Callable[[Answer], Store]) -> None:
    """No traceback of the client."""
    with pytest.raises(StoreError):
        ask(says(307, Location="http://[bad")).read_json("registry/p.json")


@pytest.mark.parametrize(
    "body",
    [
        page(item(size="abc")),
        page(item(size="9" * 5000)),
        page(item(changed="yesterday")),
        page("<Contents></Contents>"),
        b"<Other/>",
        b"",
        b"{}",
        bytes(range(256)),
        '<?xml version="1.0" encoding="utf-16"?><a/>'.encode("utf-16"),
    ],
)
def test_a_listing_that_cannot_be_read_is_an_error_of_ours(ask: Callable[[Answer], Store], body: bytes) -> None:
    """With the address of the server, as any other answer that makes no sense."""
    with pytest.raises(StoreAccessError, match=r"127\.0\.0\.1.*it gives no S3 answers"):
        ask(says(200, body)).keys()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("body", [b"<Error>\xff</Error>", b"<Error", bytes(range(256))])
def test_an_error_that_cannot_be_read_is_an_error_of_ours(
    ask: Callable[[Answer], Store], body: bytes, operation: str
) -> None:
    """So is one whose text is none."""
    with pytest.raises(StoreAccessError):
        OPERATIONS[operation](ask(says(400, body)))


def endless(status: int, **headers: str) -> Answer:
    """An answer of a GiB, without its length unless the headers say it."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in ({"Content-Type": "application/xml"} | headers).items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        block = bytes(2**20)
        for _ in range(1024):
            request.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if "Transfer_Encoding" in headers else block)

    return answer


def bomb(status: int) -> Answer:
    """A GiB in a few bytes."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        packer = zlib.compressobj(1)
        blocks = [packer.compress(bytes(2**20)) for _ in range(1024)]
        says(status, b"".join([*blocks, packer.flush()]), Content_Encoding="deflate")(request)

    return answer


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "answer",
    [
        endless(200),
        endless(403),
        endless(503),
        endless(200, Content_Length=str(2**40)),
        endless(200, Transfer_Encoding="chunked"),
        endless(500, Transfer_Encoding="chunked"),
        bomb(200),
        bomb(403),
    ],
    ids=["body", "403", "503", "length", "chunks", "500", "bomb", "403 bomb"],
)
def test_an_answer_without_an_end_fills_no_memory(
    ask: Callable[[Answer], Store], answer: Answer, operation: str
) -> None:
    """Whatever the status, the length that is claimed, and the compression."""
    store = ask(answer)
    tracemalloc.start()
    try:
        with suppress(StoreError):  # an answer to a write is not looked at
            OPERATIONS[operation](store)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def test_an_error_is_reported_in_few_words(ask: Callable[[Answer], Store]) -> None:
    """A megabyte of reasons is none."""
    body = b"<Error><Code>" + b"A" * 10**6 + b"</Code><Message>" + b"B" * 10**6 + b"</Message></Error>"
    with pytest.raises(StoreError) as caught:
        ask(says(400, body)).read_json("registry/p.json")
    assert len(str(caught.value)) < 2000


class Lies:
    """Blobs of which the list says one thing and the bytes another."""

    def __init__(self, **listed: int) -> None:
        self.listed, self.content = listed, dict.fromkeys(listed, b"x" * 64)

    def entries(self, prefix: str) -> dict[str, Entry]:
        return {f"{prefix}{name}": Entry(size, 1.0, "x") for name, size in self.listed.items()}

    def get(self, name: str, sink: Stream) -> None:
        sink.write(self.content[name.partition("/")[2]])


def mirrored(folder: Path, listed: dict[str, int], most: int = 2**20) -> list[str]:
    """The files of a mirror, after a pass, below its folder."""
    Mirror(Lies(**listed), "tensorboard", folder, most).refresh()  # type: ignore[arg-type]
    return sorted(set(content(folder)) - {".partial"})


@pytest.mark.parametrize(
    "name",
    [
        "",
        "run/",
        "a//b",
        "../evil",
        "/evil",
        "a/./b",
        "a\\..\\b",
        "a\nb",
        "x" * 256,
        "\u00e4" * 200,
        "d/" * 600 + "f",
        "run",
    ],
)
def test_a_mirror_copies_what_can_be_files_of_one_folder(tmp_path: Path, name: str) -> None:
    """A bucket has names that no folder has, and one name can be another's folder. The others are copied all the
    same."""
    assert mirrored(tmp_path / "logs", {name: 64, "run/events": 64}) == ["run/events"]
    assert not (tmp_path / "evil").exists()


def test_a_mirror_keeps_its_bound_whatever_the_list_says(tmp_path: Path) -> None:
    """A file has no more bytes than are claimed for it; no size is negative, and an empty file takes room too."""
    assert mirrored(tmp_path / "a", {"small": 1, "negative": -(2**40), "right": 64}) == ["right"]
    assert len(mirrored(tmp_path / "b", {f"f{number}": 64 for number in range(99)}, 10 * 4096)) == 10


def test_a_mirror_follows_a_name_that_becomes_a_file(tmp_path: Path) -> None:
    """And one that becomes a folder."""
    blobs = Lies(**{"a/b": 64})
    mirror = Mirror(blobs, "tensorboard", tmp_path, 2**20)  # type: ignore[arg-type]
    for listed in ({"a/b": 64}, {"a": 64}, {"a/b/c": 64}):
        blobs.listed, blobs.content = listed, dict.fromkeys(listed, b"x" * 64)
        assert mirror.refresh() == list(listed)


def test_clashing_paths_are_found() -> None:
    """Equal ones, and files that are folders as well, but not what only begins alike."""
    assert clashes(["a", "a.b", "a-b", "ab", "a0/c", "b/c", "b/d"]) == []
    assert clashes(["a", "x", "a"]) == ["a"]
    assert sorted(clashes(["a/b/c", "a", "a-b", "a.b", "a/b"])) == ["a", "a/b"]


def store_of(root: Path) -> Store:
    return open_store(f"file://{root}/store")


def put_manifest(root: Path, files: list[dict[str, Any]], **changes: Any) -> Path:
    """A manifest as latentac writes it; the folder of its files, which is not made."""
    fields = {
        "schema": "latentac/artifact/1",
        "key": KEY,
        "run": "run-1",
        "step": "prepare",
        "commit": "c",
        "config_hash": "h",
        "created": "2026-01-01T00:00:00+00:00",
        "files": files,
        "parents": [],
        "metrics": {},
    } | changes
    place = root / "store" / KEY
    place.mkdir(parents=True)
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    (place / "manifest.json").write_text(f"{text}\n")
    content = json.dumps([[each["path"], each["size"], each["sha256"]] for each in files])
    return place / f"files-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def claimed(path: str, size: int = 1) -> dict[str, Any]:
    return {"path": path, "size": size, "sha256": "a" * 64}


@pytest.mark.parametrize(
    "files",
    [
        [claimed("/".join("a" * 100_000))],
        [claimed("/".join("a" * 600))],
        [claimed("a", 10**30)],
        [claimed("a"), claimed("a")],
        [claimed("a"), claimed("a-b"), claimed("a/b")],
    ],
    ids=["endless", "deep", "huge", "twice", "folder"],
)
def test_a_manifest_that_claims_the_impossible_is_refused(tmp_path: Path, files: list[dict[str, Any]]) -> None:
    """At once, and before anything is made."""
    put_manifest(tmp_path, files)
    with pytest.raises(IntegrityError):
        store_of(tmp_path).fetch(KEY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_many_deep_paths_cost_no_more_than_their_text(tmp_path: Path) -> None:
    """The folders of each are not spelt out."""
    put_manifest(tmp_path, [claimed("/".join("a" * 300) + f"/{number}") for number in range(5000)])
    tracemalloc.start()
    try:
        assert len(store_of(tmp_path).manifest(KEY).files) == 5000
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    """Its size has a bound for the writer too."""
    folder = write(tmp_path / "artifact", {"weights": b"x"})
    with pytest.raises(IntegrityError, match="more than 8 MiB"):
        store_of(tmp_path).publish(KEY, folder, run="r", step="s", config_hash="h", metrics={"x": "y" * 9 * 2**20})


def test_a_file_that_is_read_into_memory_has_a_bound(tmp_path: Path) -> None:
    """Whatever its manifest claims."""
    place = put_manifest(tmp_path, [claimed("report.json", 3 * 10**9)])
    place.mkdir()
    with (place / "report.json").open("wb") as stream:
        stream.truncate(3 * 10**9)
    with pytest.raises(IntegrityError, match="no more than 64 MiB are read"):
        store_of(tmp_path).read(KEY, "report.json")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of somebody else, which looks like an artifact's."""
    folder = tmp_path / "elsewhere"
    write(folder / "prepare" / "files-abc", {"keep": b"mine"})
    (folder / "prepare" / "manifest.json").write_text("mine")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TOUCHES: dict[str, Callable[[Store, Path], object]] = {
    "delete": lambda store, root: store.delete(KEY),
    "remove": lambda store, root: store.remove([f"{KEY}/manifest.json"]),
    "publish": lambda store, root: publish(store, write(root / "artifact", {"weights": b"x"})),
    "write_json": lambda store, root: store.write_json(f"{KEY}/new.json", {}),
    "manifest": lambda store, root: store.manifest(KEY),
}


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("link", ["run-1", KEY])
def test_a_store_that_is_a_folder_follows_no_link(tmp_path: Path, elsewhere: Path, touch: str, link: str) -> None:
    """Who may write to it shall not have others read, write and delete elsewhere."""
    before = content(elsewhere)
    place = tmp_path / "store" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere if link == "run-1" else elsewhere / "prepare")
    with pytest.raises(StoreError) as caught:
        TOUCHES[touch](store_of(tmp_path), tmp_path)
    assert "mine" not in str(caught.value)
    assert content(elsewhere) == before


def test_a_pointer_that_is_a_link_is_not_read(tmp_path: Path, elsewhere: Path) -> None:
    """What it leads to is told nobody."""
    place = tmp_path / "store" / KEY
    place.mkdir(parents=True)
    (place / "manifest.json").symlink_to(elsewhere / "prepare" / "manifest.json")
    with pytest.raises(StoreError) as caught:
        store_of(tmp_path).manifest(KEY)
    assert "mine" not in str(caught.value)


@pytest.mark.parametrize("link", [".objects", ".objects/ab"])
def test_the_shared_files_are_swept_in_their_own_folder_alone(tmp_path: Path, link: str) -> None:
    """And of what is there only what has a name of ours."""
    target = write(tmp_path / "elsewhere" / "ab", {"ab" * 32: b"mine"})
    place = tmp_path / "store" / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target if link.endswith("ab") else target.parent)
    store = store_of(tmp_path)
    assert store.sweep() == 0
    publish(store, write(tmp_path / "artifact", {"weights": b"x"}))
    assert content(target.parent) == {f"ab/{'ab' * 32}": b"mine"}
    own = write(tmp_path / "other" / "store" / ".objects" / "ab", {"notes": b"mine", "ab" * 32: b"ours"})
    assert store_of(tmp_path / "other").sweep() == 4
    assert content(own) == {"notes": b"mine"}


def test_the_stores_own_folder_may_be_a_link(tmp_path: Path) -> None:
    """It is the operator's word."""
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "store")
    publish(store_of(tmp_path), write(tmp_path / "artifact", {"weights": b"x"}))
    assert store_of(tmp_path).keys() == [KEY]


@pytest.mark.parametrize("listed", [{"events": 1}, {"events": 2**40}])
def test_plain_objects_have_the_bytes_that_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: dict[str, int]
) -> None:
    """A resumed run fetches its event files, and no disk is filled by them."""
    store = store_of(tmp_path)
    monkeypatch.setattr(store, "_backend", Lies(**listed))
    with pytest.raises(IntegrityError, match=r"more (bytes )?than"):
        store.read_files("tensorboard", tmp_path / "out")
    assert sum(len(data) for data in content(tmp_path / "out").values()) <= 1


def test_a_pointer_of_hostile_json_is_one_error(tmp_path: Path) -> None:
    """Nested without end, and with half a character."""
    place = tmp_path / "store" / "registry"
    place.mkdir(parents=True)
    for text in ("[" * 100_000, '{"a": "\\ud800"}'):
        (place / "p.json").write_text(text)
        with pytest.raises(IntegrityError, match="it is not JSON"):
            store_of(tmp_path).read_json("registry/p.json")


def test_what_no_pointer_can_be_called_is_none(tmp_path: Path) -> None:
    """Whoever may write to a store may name a file anything."""
    for name in ("p.json", "a b", "\x1b[2J", ".hidden"):
        write(tmp_path / "store" / "registry", {name: b"{}"})
    assert store_of(tmp_path).pointers("registry") == ["registry/p.json"]


def test_an_artifact_with_many_ways_to_one_parent_reads_it_once(tmp_path: Path) -> None:
    """Each names the one before twice: two to the power of their number are the ways."""
    store, folder = store_of(tmp_path), write(tmp_path / "artifact", {"weights": b"x"})
    last = publish(store, folder, "run-1/0")
    for number in range(1, 30):
        last = publish(store, folder, f"run-1/{number}", parents=[last, last])
    began = time.monotonic()
    store.verify(last, files=False)
    assert time.monotonic() - began < 10


def test_a_size_below_nothing_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is what bounds the disk."""
    store = store_of(tmp_path)
    monkeypatch.setattr(store, "_backend", Lies(large=2**40, negative=-(2**50)))
    with pytest.raises(IntegrityError, match="there are more than 4 GiB"):
        store.read_files("tensorboard", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_store_that_gives_back_other_bytes_is_found_out(ask: Callable[[Answer], Store]) -> None:
    """By the probe, before a run begins."""
    with pytest.raises(IntegrityError, match="returns bytes other"):
        ask(says(200, b"other")).probe()


def test_names_of_a_listing_are_taken_once(ask: Callable[[Answer], Store]) -> None:
    """A page after a page, as long as they bring objects."""
    pages = itertools.chain(
        (page(item(f"a{number}/manifest.json"), more="t") for number in range(3)),
        itertools.repeat(page(item("b/manifest.json"))),
    )

    def answer(request: BaseHTTPRequestHandler) -> None:
        says(200, next(pages))(request)

    assert ask(answer).keys() == ["a0", "a1", "a2", "b"]
    assert connect("file:///nowhere", PATIENCE).names("") == []


def test_a_list_without_a_length_is_refused_where_it_is_too_long(ask: Callable[[Answer], Store]) -> None:
    """Its end is cut off by the bound, and what is left of it may look like a whole one."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/xml")
        request.end_headers()
        request.wfile.write(page(item()) + b" " * 9 * 2**20)

    with pytest.raises(StoreAccessError, match="an answer has more than 8 MiB"):
        ask(answer).keys()


@pytest.mark.parametrize("body", [page(item(changed="y" * 10**6)), page(*[item("a" * 10**6)] * 2)])
def test_what_a_listing_says_wrongly_is_reported_in_few_words(ask: Callable[[Answer], Store], body: bytes) -> None:
    """Its dates and names may be as long as an answer."""
    with pytest.raises(StoreAccessError) as caught:
        ask(says(200, body)).keys()
    assert len(str(caught.value)) < 2000

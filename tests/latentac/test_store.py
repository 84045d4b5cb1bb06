"""The store on a folder and on a real MinIO server: whole or not at all, verified, with errors that help."""

import json
import logging
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from latentac.store import Manifest, Patience, Store, access, commit, open_store
from latentac.store.blobs import Stream
from latentac.store.places import connect
from latentac.system.errors import (
    ArtifactNotFound,
    ConfigError,
    IntegrityError,
    LatentacError,
    ResourceError,
    StoreAccessError,
    StoreError,
    StoreUnavailable,
)
from tools.minio import Server

HASTY = Patience(retries=3, back_off_seconds=0.05, back_off_max_seconds=0.2)
STUBBORN = Patience(retries=80, back_off_seconds=0.1, back_off_max_seconds=0.5, idle_seconds=60.0)
KEY = "run-1/train"
CONTENT = {"policy/weights.safetensors": b"\x00weights\xff" * 1000, "history.json": b"[]", "leer zeichen/ü.txt": b""}


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.minio)])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of its own for each test, once in a folder and once on the server."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return use(request.getfixturevalue("minio_server"), monkeypatch)


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url, HASTY)


@pytest.fixture(scope="module")
def mortal_server(minio_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mortal") / "minio")
    yield server
    server.kill()


@pytest.fixture
def own_server(mortal_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A running server that the test may kill, without traces of the test before; its variables are set."""
    if mortal_server.process is None:
        mortal_server.start()
    shutil.rmtree(mortal_server.folder / ".minio.sys" / "multipart", ignore_errors=True)
    use(mortal_server, monkeypatch)
    return mortal_server


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write(tmp_path / "artifact", CONTENT)


def use(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.bucket}/{uuid.uuid4().hex}/nested"


def write(folder: Path, content: dict[str, bytes]) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def bulk(mebibytes: int) -> bytes:
    """Many bytes, no two MiB of them alike."""
    return b"".join(number.to_bytes(4) * 2**18 for number in range(mebibytes))


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(store: Store, folder: Path, key: str = KEY, **more: Any) -> Manifest:
    return store.publish(key, folder, **{"run": "run-1", "step": "train", "config_hash": "c0ffee", **more})


def overwrite(url: str, name: str, data: bytes) -> None:
    """What a disk that rots or a stranger with credentials does: bytes changed behind the manifest's back."""
    connect(url, HASTY).put(name, Stream(BytesIO(data)), len(data))


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def says(error: LatentacError, *words: str) -> None:
    """The message has all of `words`, and neither it nor its traceback has a secret."""
    message = str(error)
    assert [word for word in words if word not in message] == [], message
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY")
    assert secret is None or secret not in "".join(traceback.format_exception(error))


def test_what_was_published_is_fetched(store: Store, artifact: Path, tmp_path: Path) -> None:
    """Every byte and path comes back, and the manifest says what it is and where it comes from."""
    parent = publish(store, artifact, "run-1/prepare", step="prepare")
    manifest = publish(store, artifact, parents=[parent], metrics={"reward": 0.5, "curve": [0, 1]})
    assert store.fetch(KEY, tmp_path / "fetched" / "train") == manifest == store.manifest(KEY)
    assert read(tmp_path / "fetched" / "train") == CONTENT
    assert [entry.name for entry in (tmp_path / "fetched").iterdir()] == ["train"]
    answer = json.loads(manifest.to_json())
    assert answer["parents"] == [{"key": "run-1/prepare", "sha256": sha256(parent.to_json()).hexdigest()}]
    assert {file["path"]: file["sha256"] for file in answer["files"]} == {
        path: sha256(data).hexdigest() for path, data in CONTENT.items()
    }
    assert tuple(answer[key] for key in ("run", "step", "config_hash", "commit")) == (
        "run-1",
        "train",
        "c0ffee",
        commit(),
    )
    assert answer["metrics"] == {"reward": 0.5, "curve": [0, 1]}
    assert datetime.fromisoformat(answer["created"]).utcoffset() == timedelta(0)


def test_the_digest_is_the_sha256_of_what_lies_in_the_store(store: Store, url: str, artifact: Path) -> None:
    """Anyone can check a parent with sha256sum, and find the files as a plain folder."""
    manifest = publish(store, artifact)
    sink = BytesIO()
    connect(url, HASTY).get(f"{KEY}/manifest.json", Stream(sink))
    assert sha256(sink.getvalue()).hexdigest() == manifest.digest
    names = connect(url, HASTY).names(f"{manifest.folder}/")
    assert sorted(name.removeprefix(f"{manifest.folder}/") for name in names) == sorted(CONTENT)


def test_the_same_again_is_published_once(store: Store, artifact: Path) -> None:
    """A step that runs again after a crash leaves the artifact, its date included, as it is."""
    first = publish(store, artifact, metrics={"reward": 0.5})
    time.sleep(1.1)  # dates count whole seconds
    assert publish(store, artifact, metrics={"reward": 0.5}) == first == store.manifest(KEY)
    assert publish(store, artifact, metrics={"reward": 0.6}) != first


def test_only_what_is_wanted_is_read(store: Store, artifact: Path, tmp_path: Path) -> None:
    """Each file of it verified as ever; the others may be missing. So with a single file, which comes as bytes."""
    manifest = publish(store, artifact)
    store._backend.remove(f"{manifest.folder}/policy/weights.safetensors")
    for _ in range(2):  # what is there already is left as it is
        assert store.fetch_files(KEY, tmp_path / "some", lambda path: not path.endswith(".safetensors")) == manifest
    assert read(tmp_path / "some") == {name: CONTENT[name] for name in ("history.json", "leer zeichen/ü.txt")}
    assert store.read(KEY, "history.json") == b"[]"
    with pytest.raises(IntegrityError, match=r"policy/weights\.safetensors: .*found no such file"):
        store.fetch(KEY, tmp_path / "whole")
    with pytest.raises(IntegrityError, match="has no other"):
        store.read(KEY, "other")
    store._backend.put(f"{manifest.folder}/history.json", Stream(BytesIO(b"{}")), 2)
    for attempt in (lambda: store.read(KEY, "history.json"), lambda: store.fetch_files(KEY, tmp_path / "x", bool)):
        with pytest.raises(IntegrityError, match=r"history\.json: expected size 2, sha256"):
            attempt()
    assert not (tmp_path / "x").exists()


def test_other_content_replaces_at_one_stroke(store: Store, artifact: Path, tmp_path: Path) -> None:
    """A reader that began with the old manifest can still read every file that it names."""
    old = publish(store, artifact)
    new = publish(store, write(tmp_path / "other", {"history.json": b"[1]"}))
    store.fetch(KEY, tmp_path / "fetched")
    assert read(tmp_path / "fetched") == {"history.json": b"[1]"}
    assert old.folder != new.folder
    store._read_files(old, None)


def test_racing_publishers_never_mix(store: Store, url: str, tmp_path: Path) -> None:
    """Whoever reads while two write the same key gets one of the two, whole."""
    folders = [write(tmp_path / name, {"a": name.encode() * 9, "b": name.encode() * 99}) for name in ("one", "two")]
    publish(store, folders[0])
    stop, failures = threading.Event(), []

    def keep_publishing(folder: Path) -> None:
        mine = open_store(url, HASTY)
        while not stop.is_set():
            try:
                publish(mine, folder)
            except LatentacError as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=keep_publishing, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    seen = []
    for turn in range(25):
        store.fetch(KEY, tmp_path / f"fetched-{turn}")
        seen.append(read(tmp_path / f"fetched-{turn}"))
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [content for content in seen if content not in [read(folder) for folder in folders]] == []


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        pytest.param(lambda data: data[:-5], "size 8995", id="truncated"),
        pytest.param(lambda data: data[:-1] + b"\x01", "size 9000", id="tampered"),
    ],
)
def test_a_damaged_file_is_refused(
    store: Store, url: str, artifact: Path, tmp_path: Path, damage: Callable[[bytes], bytes], found: str
) -> None:
    """Fetching and verifying name key and file, what was expected and found, and the remedy; nothing is left behind."""
    manifest = publish(store, artifact)
    name = "policy/weights.safetensors"
    damaged = damage(CONTENT[name])
    overwrite(url, f"{manifest.folder}/{name}", damaged)
    for use_it in (lambda: store.fetch(KEY, tmp_path / "out" / "train"), lambda: store.verify(manifest)):
        with pytest.raises(IntegrityError) as caught:
            use_it()
        expected = sha256(CONTENT[name]).hexdigest()
        says(caught.value, KEY, name, "size 9000", expected, found, sha256(damaged).hexdigest(), f"Delete {KEY}")
    assert list((tmp_path / "out").iterdir()) == []
    store.delete(KEY)  # the remedy helps
    assert publish(store, artifact).files == manifest.files
    store.verify(store.manifest(KEY))


def test_a_missing_file_is_refused(store: Store, url: str, artifact: Path, tmp_path: Path) -> None:
    """A manifest whose files were cleaned away by somebody is not believed."""
    manifest = publish(store, artifact)
    connect(url, HASTY).remove(f"{manifest.folder}/history.json")
    with pytest.raises(IntegrityError) as caught:
        store.fetch(KEY, tmp_path / "fetched")
    says(caught.value, "history.json", "no such file")
    assert not (tmp_path / "fetched").exists()


def changed(**fields: object) -> Callable[[bytes], bytes]:
    """A damage: fields of the manifest replaced, and the rest in the very form that latentac writes."""

    def damage(raw: bytes) -> bytes:
        text = json.dumps({**json.loads(raw), **fields}, indent=2, sort_keys=True, ensure_ascii=False)
        return f"{text}\n".encode()

    return damage


def entry(path: str, **fields: object) -> dict[str, object]:
    return {"path": path, "size": 1, "sha256": "0" * 64, **fields}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda raw: raw[: len(raw) // 2], "JSON", id="cut-off"),
        pytest.param(lambda raw: b"\x80\x04\x95pickle", "JSON", id="not-json"),
        pytest.param(lambda raw: b"[]", "object", id="not-an-object"),
        pytest.param(lambda raw: raw.replace(b"{", b"{ ", 1), "edited since", id="edited"),
        pytest.param(changed(surprise=1), "edited since", id="unknown-field"),
        pytest.param(lambda raw: b"[" * 100_000, "JSON", id="nested"),
        pytest.param(lambda raw: raw.replace(b'"commit": "', b'"commit": "\\ud800'), "JSON", id="half-a-character"),
        pytest.param(changed(metrics={"a": float("inf")}), "cannot be written as JSON", id="infinity"),
        pytest.param(changed(metrics={"a": float("nan")}), "cannot be written as JSON", id="no-number"),
        pytest.param(changed(created="yesterday"), "created", id="no-time"),
        pytest.param(changed(schema="latentac/artifact/9"), "schema", id="unknown-schema"),
        pytest.param(changed(key="run-2/train"), "run-2/train", id="of-another-key"),
        pytest.param(changed(files=[entry("../outside")]), "inside the artifact", id="climbs-out"),
        pytest.param(changed(files=[entry("/etc/passwd")]), "inside the artifact", id="absolute"),
        pytest.param(changed(files=[entry("a\\..\\b")]), "inside the artifact", id="backslash"),
        pytest.param(changed(files=[entry("a"), entry("a")]), "twice", id="file-twice"),
        pytest.param(changed(files=[entry("a"), entry("a/b")]), "as a folder", id="file-and-folder"),
        pytest.param(changed(files=[entry("a", size=-1)]), "files.0.size", id="negative-size"),
        pytest.param(changed(files=[entry("a", size="1")]), "files.0.size", id="size-as-text"),
        pytest.param(changed(files=[entry("a", sha256="123")]), "files.0.sha256", id="no-sha256"),
        pytest.param(changed(files=[entry("a", sha256="G" * 64)]), "files.0.sha256", id="no-hexadecimal"),
        pytest.param(changed(parents=[{"key": "../up", "sha256": "0" * 64}]), "parents.0.key", id="parent-climbs-out"),
    ],
)
def test_a_damaged_manifest_is_refused(
    tmp_path: Path, artifact: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    """Whatever is wrong with it, nothing of it is used, and publishing again puts it right."""
    url = f"file://{tmp_path}/store"
    store = open_store(url)
    manifest = publish(store, artifact)
    overwrite(url, f"{KEY}/manifest.json", damage(manifest.to_json()))
    for use_it in (lambda: store.manifest(KEY), lambda: store.fetch(KEY, tmp_path / "out" / "train")):
        with pytest.raises(IntegrityError) as caught:
            use_it()
        says(caught.value, f"{KEY}/manifest.json", words, f"Delete {KEY}")
    assert not (tmp_path / "out").exists()
    publish(store, artifact)
    store.verify(store.manifest(KEY))


def test_parents_are_verified_recursively(store: Store, url: str, artifact: Path) -> None:
    """A grandparent with a changed file, replaced, or gone, is found from the grandchild."""
    first = publish(store, artifact, "run-1/prepare")
    second = publish(store, artifact, "run-1/train", parents=[first])
    third = publish(store, artifact, "run-1/evaluate", parents=[second, first])
    store.verify(third)
    overwrite(url, f"{first.folder}/history.json", b"[")
    store.verify(third, files=False)
    with pytest.raises(IntegrityError) as caught:
        store.verify(third)
    says(caught.value, "run-1/prepare", "history.json")
    publish(store, artifact, "run-1/prepare", metrics={"other": 1})
    with pytest.raises(IntegrityError) as caught:
        store.verify(third, files=False)
    says(caught.value, "run-1/prepare", "was replaced", first.digest)
    store.delete("run-1/prepare")
    with pytest.raises(ArtifactNotFound):
        store.verify(third, files=False)


def test_fetching_twice_and_over_something_else(store: Store, artifact: Path, tmp_path: Path) -> None:
    """The same again is left alone, an empty folder is filled, anything else is never overwritten."""
    publish(store, artifact)
    (tmp_path / "out").mkdir()
    store.fetch(KEY, tmp_path / "out")
    before = (tmp_path / "out").stat().st_ino
    store.fetch(KEY, tmp_path / "out")
    assert (tmp_path / "out").stat().st_ino == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ResourceError) as caught:
        store.fetch(KEY, tmp_path / "out")
    says(caught.value, str(tmp_path / "out"), KEY)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_pointers(store: Store, url: str) -> None:
    """A pointer is JSON that is replaced whole; without one, or with a damaged one, the reader is told."""
    with pytest.raises(ArtifactNotFound) as caught:
        store.read_json("checkpoints/run-1/LATEST")
    says(caught.value, url, "checkpoints/run-1/LATEST")
    for iteration in (1, 2):
        store.write_json("checkpoints/run-1/LATEST", {"iteration": iteration})
        assert store.read_json("checkpoints/run-1/LATEST") == {"iteration": iteration}
    overwrite(url, "checkpoints/run-1/LATEST", b'{"iteration": ')
    with pytest.raises(IntegrityError):
        store.read_json("checkpoints/run-1/LATEST")
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        store.write_json("registry/candidate.json", {"reward": float("nan")})


def test_growing_files_are_plain_objects(store: Store, url: str, tmp_path: Path) -> None:
    """Event files lie where a reader without manifests looks; what has not grown is not sent again."""
    folder = tmp_path / "tensorboard"
    (folder / "sub").mkdir(parents=True)
    (folder / "events.1").write_bytes(b"one")
    (folder / "sub" / "events.2").write_bytes(b"two")
    store.write_files(folder, "tensorboard/run")
    (folder / "events.1").write_bytes(b"one more")
    (folder / "sub" / "events.2").write_bytes(b"TWO")  # of the same size
    store.write_files(folder, "tensorboard/run")

    found = {}
    for name in connect(url, Patience()).names("tensorboard/run/"):
        sink = BytesIO()
        connect(url, Patience()).get(name, Stream(sink))
        found[name] = sink.getvalue()
    assert found == {"tensorboard/run/events.1": b"one more", "tensorboard/run/sub/events.2": b"two"}
    assert store.keys() == []


def test_keys_and_delete(store: Store, tmp_path: Path) -> None:
    """Only whole artifacts are listed, below the prefix's own name, and one is deleted without its neighbours."""
    folder = write(tmp_path / "artifact", {"manifest.json": b"{}", "state": b"1"})
    for key in ("checkpoints/run-1/000001", "checkpoints/run-1/000002", "checkpoints/run-10/000001"):
        publish(store, folder, key)
    store.write_json("checkpoints/run-1/LATEST", {"iteration": 2})
    assert store.keys("checkpoints/run-1") == ["checkpoints/run-1/000001", "checkpoints/run-1/000002"]
    assert len(store.keys()) == 3
    store.delete("checkpoints/run-1/000002")
    store.delete("checkpoints/run-1/000002")
    assert store.keys("checkpoints") == ["checkpoints/run-1/000001", "checkpoints/run-10/000001"]
    with pytest.raises(ArtifactNotFound):
        store.manifest("checkpoints/run-1/000002")
    assert store.read_json("checkpoints/run-1/LATEST") == {"iteration": 2}


def test_a_deleted_artifact_leaves_no_folders(tmp_path: Path, artifact: Path) -> None:
    """Hundreds of checkpoints come and go: what `ls` shows is what is there."""
    store = open_store(f"file://{tmp_path}/store")
    for key in ("checkpoints/run-1/000001", "checkpoints/run-1/000002"):
        publish(store, artifact, key)
    store.delete("checkpoints/run-1/000001")
    assert [entry.name for entry in (tmp_path / "store" / "checkpoints" / "run-1").iterdir()] == ["000002"]
    store.delete("checkpoints/run-1/000002")
    assert [entry.name for entry in (tmp_path / "store").iterdir()] == [".partial"]


def test_probe_leaves_nothing(store: Store, url: str) -> None:
    """A store that works says nothing and keeps nothing of the probe."""
    store.probe()
    assert connect(url, HASTY).names("") == []


def test_a_damaged_manifest_is_reported_in_few_words(tmp_path: Path, artifact: Path) -> None:
    """However long the value is that is wrong."""
    store = open_store(f"file://{tmp_path}/store")
    damage = changed(files=[entry("a", sha256="x" * 100_000)])
    overwrite(store.url, f"{KEY}/manifest.json", damage(publish(store, artifact).to_json()))
    with pytest.raises(IntegrityError, match=r"files\.0\.sha256") as caught:
        store.manifest(KEY)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "key",
    [
        *("", "/run", "run/", "../run", "run/../x", "run//x", ".partial/x", "a b", "run/files-x/y", "run\n"),
        *("run/manifest.json", "manifest.json/x", "x" * 251, "/".join("a" * 11)),
    ],
)
def test_an_unsafe_key_is_refused(tmp_path: Path, artifact: Path, key: str) -> None:
    """A run's name becomes a path: it cannot lead anywhere else."""
    store = open_store(f"file://{tmp_path}/store")
    for use_it in (lambda: publish(store, artifact, key), lambda: store.read_json(key), lambda: store.delete(key)):
        with pytest.raises(ConfigError) as caught:
            use_it()
        assert caught.value.problems[0].path == "key"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "bad", ["", "store", "/store", "file://", "http://x/y", "s3://", "s3://B_d/x", "s3://ok-ok/../x"]
)
def test_a_bad_url_is_a_problem_of_the_configuration(bad: str) -> None:
    """The field's path is `store`, and credentials in a URL are not repeated."""
    for url in (bad, "s3://user:hunter2@bucket/x"):
        with pytest.raises(ConfigError) as caught:
            open_store(url)
        assert caught.value.problems[0].path == "store"
        says(caught.value, "file://<folder>")
        assert "hunter2" not in str(caught.value)


def test_what_cannot_be_published(tmp_path: Path) -> None:
    """Nothing, a link to a folder, and metrics that are not numbers are refused before anything is written."""
    store = open_store(f"file://{tmp_path}/store")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(StoreError, match="no file to publish"):
            publish(store, folder)
    folder = write(tmp_path / "artifact", {"a": b"1"})
    with pytest.raises(StoreError, match="as JSON"):
        publish(store, folder, metrics={"reward": float("nan")})
    (folder / "linked-file").symlink_to(folder / "a")
    assert len(publish(store, folder).files) == 2
    (folder / "linked-folder").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="linked-folder"):
        publish(store, folder)


def test_a_folder_that_changes_while_it_is_published(tmp_path: Path) -> None:
    """The artifact would not be what its manifest says, so there is none."""
    folder = write(tmp_path / "artifact", {"a": b"1", "b": b"2"})
    store = open_store(f"file://{tmp_path}/store")
    backend = store._backend

    class Meddler:
        """A writer that is not finished: it touches b while a is copied."""

        def keep(self, *arguments: Any) -> str:
            (folder / "b").write_bytes(b"3")
            return backend.keep(*arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

    store._backend = Meddler()
    with pytest.raises(IntegrityError) as caught:
        publish(store, folder)
    says(caught.value, str(folder / "b"), "changed while it was published")
    with pytest.raises(ArtifactNotFound):
        store.manifest(KEY)


def test_what_is_deleted_in_part_is_there_no_more(tmp_path: Path, artifact: Path) -> None:
    """No reader starts on files that are going; and what is published below it stays."""
    store = open_store(f"file://{tmp_path}/store")
    below = publish(store, artifact, "run-1/train")
    publish(store, artifact, "run-1")
    backend, left = store._backend, [1]

    class Ending:
        """Whose process is killed after the first removal."""

        def remove(self, name: str) -> None:
            if not left:
                raise StoreAccessError(name, "killed", "Run it again")
            left.pop()
            backend.remove(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

    store._backend = Ending()
    with pytest.raises(StoreAccessError):
        store.delete("run-1")
    store = open_store(store.url)
    with pytest.raises(ArtifactNotFound):
        store.manifest("run-1")
    store.delete("run-1")
    store.verify(below)


def test_what_fails_leaves_the_files_of_the_artifact_before(tmp_path: Path, artifact: Path) -> None:
    """They are the same ones: a new manifest that could not be written costs the old one nothing."""
    store = open_store(f"file://{tmp_path}/store")
    before = publish(store, artifact)
    backend = store._backend

    class Refusing:
        """Takes no manifest."""

        def put(self, name: str, *arguments: Any) -> None:
            raise StoreAccessError(name, "no", "Ask")

        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

    store._backend = Refusing()
    with pytest.raises(StoreAccessError):
        publish(store, artifact, metrics={"other": 1})
    open_store(store.url).verify(before)


def drawn(terminal: int, within_seconds: float) -> str:
    """What was written to the terminal since; the kernel may take a moment to bring it to this side."""
    return os.read(terminal, 2**16).decode() if select.select([terminal], [], [], within_seconds)[0] else ""


def test_large_transfers_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 8 MiB on a bar in MiB follows each transfer; small ones are silent."""
    master, slave = pty.openpty()
    monkeypatch.setenv("LATENTAC_PROGRESS", os.ttyname(slave))
    store = open_store(f"file://{tmp_path}/store")
    publish(store, write(tmp_path / "small", {"a": bytes(2**20)}), "run-1/small")
    silent = drawn(master, 0.2) == ""
    publish(store, write(tmp_path / "large", {"a": bytes(9 * 2**20)}), "run-1/large")
    shown = drawn(master, 5)
    store.fetch("run-1/large", tmp_path / "fetched")
    shown += drawn(master, 5)
    os.close(slave)
    os.close(master)
    assert silent
    assert "publish run-1/large" in shown
    assert "fetch run-1/large" in shown
    assert "MiB" in shown


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"a small file system needs root: {done.stderr.strip() if done else 'no mount here'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    """Publishing and fetching say where, how much is free and what to do; what was there before stays readable."""
    store = open_store(f"file://{small_disk}/store")
    small = publish(store, write(tmp_path / "small", {"a": bytes(2**20)}), "run-1/small")
    large = write(tmp_path / "large", {"A": b"1" * 2**20, "a": bytes(8 * 2**20)})
    with pytest.raises(ResourceError) as caught:
        publish(store, large)
    says(caught.value, str(small_disk / "store" / KEY), "8.0 MiB to write, 2.0 MiB free", "Free space")
    with pytest.raises(ArtifactNotFound):
        store.manifest(KEY)
    store.verify(small)
    assert {path.name for path in (small_disk / "store").rglob("*") if path.is_file()} == {
        "a",
        "manifest.json",
        small.files[0].sha256,
    }, "what was written of the large one takes no room"

    roomy = open_store(f"file://{tmp_path}/store")
    publish(roomy, large)
    with pytest.raises(ResourceError) as caught:
        roomy.fetch(KEY, small_disk / "out")
    says(caught.value, str(small_disk / "out"), "9.0 MiB to write, 3.0 MiB free")
    assert [entry.name for entry in small_disk.iterdir()] == ["store"]


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    """A store where a file is in the way, and one without permission, are errors with the path."""
    (tmp_path / "file").write_text("in the way")
    for bad in (tmp_path / "file" / "store", Path("/proc/latentac")):
        with pytest.raises(StoreError) as caught:
            open_store(f"file://{bad}").probe()
        says(caught.value, str(bad))


@pytest.mark.slow
def test_a_publisher_that_is_killed_leaves_nothing_readable(tmp_path: Path) -> None:
    """SIGKILL in the middle of a publish to a folder: no artifact; the next publish makes it whole."""
    folder = write(tmp_path / "artifact", {f"{number:02d}": bulk(1) for number in range(32)})
    code = (
        "import sys; from latentac.store import open_store\n"
        "open_store(sys.argv[1]).publish('run-1/train', sys.argv[2], run='r', step='train', config_hash='c')"
    )
    url, root = f"file://{tmp_path}/store", tmp_path / "store" / KEY
    child = subprocess.Popen([sys.executable, "-c", code, url, str(folder)])
    eventually(lambda: len(list(root.rglob("*"))) > 5)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was finished before it was killed"
    store = open_store(url)
    with pytest.raises(ArtifactNotFound):
        store.fetch(KEY, tmp_path / "out")
    assert store.keys() == []
    publish(store, folder)
    store.fetch(KEY, tmp_path / "out")
    assert read(tmp_path / "out") == read(folder)


@pytest.mark.minio
@pytest.mark.parametrize(
    ("variable", "code"),
    [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId")],
)
def test_wrong_credentials(
    minio_server: Server, monkeypatch: pytest.MonkeyPatch, artifact: Path, tmp_path: Path, variable: str, code: str
) -> None:
    """Every operation fails at once and names endpoint and bucket, never the secret."""
    url = use(minio_server, monkeypatch)
    monkeypatch.setenv(variable, "not-the-right-one")
    store, started = open_store(url), time.monotonic()
    operations: list[Callable[[], object]] = [
        store.probe,
        store.keys,
        lambda: publish(store, artifact),
        lambda: store.fetch(KEY, tmp_path / "out"),
        lambda: store.delete(KEY),
        lambda: store.write_json("registry/candidate.json", {}),
    ]
    for operation in operations:
        with pytest.raises(StoreAccessError) as caught:
            operation()
        says(caught.value, minio_server.endpoint, minio_server.bucket, code, variable)
        assert caught.value.exit_code == 3
    assert time.monotonic() - started < 15  # retries would take half a minute each


@pytest.mark.minio
def test_a_missing_bucket(minio_server: Server, monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    """A bucket is not made by us: its absence is said with endpoint and name."""
    use(minio_server, monkeypatch)
    store = open_store("s3://no-such-bucket/x", HASTY)
    for operation in (store.probe, store.keys, lambda: publish(store, artifact), lambda: store.manifest(KEY)):
        with pytest.raises(StoreAccessError) as caught:
            operation()
        says(caught.value, minio_server.endpoint, "no-such-bucket", "no such bucket")


def test_missing_variables_are_named_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has set none of them learns it in one go; a secret in the endpoint is not repeated."""
    for name in ("LATENTAC_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "LATENTAC_S3_CA"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as caught:
        open_store("s3://bucket/x")
    names = [problem.path for problem in caught.value.problems]
    assert names == ["LATENTAC_S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("LATENTAC_S3_CA", "/no/such/file.pem")
    for endpoint in ("localhost:9000", "http://user:hunter2@localhost:9000", "https://host/path"):
        monkeypatch.setenv("LATENTAC_S3_ENDPOINT", endpoint)
        with pytest.raises(ConfigError) as caught:
            open_store("s3://bucket/x")
        assert [problem.path for problem in caught.value.problems] == ["LATENTAC_S3_ENDPOINT", "LATENTAC_S3_CA"]
        says(caught.value, "/no/such/file.pem")


@pytest.mark.minio
@pytest.mark.slow
def test_a_server_that_comes_back_while_uploading(own_server: Server, tmp_path: Path) -> None:
    """SIGKILL of the server in the middle of an upload, back after a second: the publish succeeds by itself."""
    folder = write(tmp_path / "artifact", {"weights": bulk(32), "config.json": b"{}"})
    url = f"s3://{own_server.bucket}/comes-back"
    store, published = open_store(url, STUBBORN), []
    thread = threading.Thread(target=lambda: published.append(publish(store, folder)))
    thread.start()
    eventually(lambda: _uploading(own_server))
    own_server.kill()
    assert thread.is_alive(), "it was finished before the server was killed"
    time.sleep(1.0)
    own_server.start()
    thread.join(60)
    assert published == [store.fetch(KEY, tmp_path / "fetched")]
    assert read(tmp_path / "fetched") == read(folder)


@pytest.mark.minio
@pytest.mark.slow
def test_a_server_that_does_not_come_back(own_server: Server, tmp_path: Path) -> None:
    """StoreUnavailable within its bound, with exit code 75; once the server is back, nothing partial is readable."""
    folder = write(tmp_path / "artifact", {"config.json": b"{}", "weights": bulk(32)})
    url = f"s3://{own_server.bucket}/stays-away"
    store, failures, ended = open_store(url, HASTY), [], []

    def try_to_publish() -> None:
        try:
            publish(store, folder)
        except LatentacError as error:
            failures.append(error)
        ended.append(time.monotonic())

    thread = threading.Thread(target=try_to_publish)
    thread.start()
    eventually(lambda: _uploading(own_server))
    own_server.kill()
    killed = time.monotonic()
    assert thread.is_alive(), "it was finished before the server was killed"
    thread.join(60)
    assert ended[0] - killed < 20
    (failure,) = failures
    assert isinstance(failure, StoreUnavailable)
    says(failure, own_server.endpoint, own_server.bucket, "no answer", "LATENTAC_S3_ENDPOINT")
    assert failure.exit_code == 75
    operations: list[Callable[[], object]] = [store.probe, store.keys, lambda: store.fetch(KEY, tmp_path / "out")]
    for operation in operations:
        with pytest.raises(StoreUnavailable):
            operation()

    own_server.start()
    with pytest.raises(ArtifactNotFound):
        store.fetch(KEY, tmp_path / "out")
    assert store.keys() == []
    assert not (tmp_path / "out").exists()
    publish(store, folder)
    store.verify(store.manifest(KEY))


def test_a_server_that_cannot_be_reached_is_one_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error with the number of retries; no log line for each of them."""
    for name, value in (("LATENTAC_S3_ENDPOINT", "http://127.0.0.1:9"), ("AWS_ACCESS_KEY_ID", "a")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with caplog.at_level(logging.WARNING), pytest.raises(StoreUnavailable, match="no answer"):
        open_store("s3://bucket/prefix", HASTY).keys()
    assert caplog.messages == []


def _uploading(server: Server) -> bool:
    """Whether a first part of an upload lies on the server's disk."""
    return any((server.folder / ".minio.sys" / "multipart").rglob("part.*"))


@pytest.mark.minio
@pytest.mark.slow
def test_a_server_that_is_killed_while_we_read(own_server: Server, tmp_path: Path) -> None:
    """A fetch whose connection breaks begins that file again, and what appears is whole."""
    folder = write(tmp_path / "artifact", {"weights": bulk(32)})
    store = open_store(f"s3://{own_server.bucket}/breaks-off", STUBBORN)
    manifest, fetched = publish(store, folder), []
    thread = threading.Thread(target=lambda: fetched.append(store.fetch(KEY, tmp_path / "out" / "train")))
    thread.start()
    eventually(lambda: any(path.stat().st_size for path in tmp_path.glob("out/.latentac-fetch-*/train/weights")))
    own_server.kill()
    assert thread.is_alive(), "it was finished before the server was killed"
    own_server.start()
    thread.join(60)
    assert fetched == [manifest]
    assert read(tmp_path / "out" / "train") == read(folder)


@pytest.mark.minio
def test_tls_with_an_authority_of_ones_own(
    minio_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifact: Path
) -> None:
    """LATENTAC_S3_CA makes a private certificate trusted; without it the error says so at once."""
    server = Server(tmp_path / "minio", certificates=_certificate(tmp_path / "certificates")).start()
    try:
        url = use(server, monkeypatch)
        store = open_store(url, HASTY)
        publish(store, artifact)
        store.fetch(KEY, tmp_path / "out")
        monkeypatch.delenv("LATENTAC_S3_CA")
        started = time.monotonic()
        with pytest.raises(StoreAccessError) as caught:
            open_store(url).probe()
        says(caught.value, server.endpoint, "LATENTAC_S3_CA")
        assert time.monotonic() - started < 15  # retries would take half a minute each
        monkeypatch.setenv("LATENTAC_S3_ENDPOINT", server.endpoint.replace("https", "http"))
        # Go's server answers with a 400 and closes at once, so that the answer may be lost: then it is "no answer".
        with pytest.raises((StoreAccessError, StoreUnavailable), match="LATENTAC_S3_ENDPOINT, http or https"):
            open_store(url).probe()
    finally:
        server.kill()


def _certificate(folder: Path) -> Path:
    """A folder with a self-signed certificate for 127.0.0.1 and its key, named as MinIO wants them."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "latentac tests")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return write(folder, {"public.crt": certificate.public_bytes(serialization.Encoding.PEM), "private.key": private})


def _refusal(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>so it is.</Message></Error>".encode()


@contextmanager
def _answering(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: str, body: bytes
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that answers everything in one way: its address, and the headers of what it was asked so far."""
    asked: list[dict[str, str]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(dict(self.headers))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    variables = {"LATENTAC_S3_ENDPOINT": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hunter2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        yield endpoint, asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "kind", "body", "expected"),
    [
        (404, "text/html", b"<html>not here</html>", StoreAccessError),
        (200, "text/html", b"<html>welcome<br></html>", StoreAccessError),
        (502, "text/html", b"<html>bad gateway</html>", StoreUnavailable),
        (501, "text/html", b"<html>what is that</html>", StoreError),
        (511, "text/html", b"<html>log in to this network</html>", StoreAccessError),
        (507, "application/xml", _refusal("XMinioStorageFull"), ResourceError),
        (400, "application/xml", _refusal("AuthorizationHeaderMalformed"), StoreAccessError),
        (400, "application/xml", _refusal("InvalidArgument"), StoreError),
        (400, "application/xml", b"<Error><Code>cut", StoreAccessError),
    ],
)
def test_answers_that_are_not_what_s3_says(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: str, body: bytes, expected: type[LatentacError]
) -> None:
    """A web server, a gateway in trouble, a full server, a wrong region: each is one clear error."""
    with _answering(monkeypatch, status, kind, body) as (endpoint, _):
        with pytest.raises(expected) as caught:
            open_store("s3://bucket/x", HASTY).keys()
        assert type(caught.value) is expected
        says(caught.value, endpoint, "bucket")


@pytest.mark.parametrize(
    ("status", "code", "expected", "word"),
    [
        (403, "InvalidAccessKeyId", StoreAccessError, "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", StoreAccessError, "AWS_SECRET_ACCESS_KEY"),
        (400, "InvalidToken", StoreAccessError, "AWS_SESSION_TOKEN"),
        (403, "InvalidClientTokenId", StoreAccessError, "AWS_SESSION_TOKEN"),
        (400, "ExpiredToken", StoreAccessError, "Get new ones"),
        (403, "ExpiredTokenException", StoreAccessError, "Get new ones"),
        (400, "TokenRefreshRequired", StoreAccessError, "AWS_SESSION_TOKEN"),
        (403, "RequestTimeTooSkewed", StoreAccessError, "clock"),
        (403, "AccessDenied", StoreAccessError, "rights"),
        (403, "AllAccessDisabled", StoreAccessError, "rights"),
        (400, "IllegalLocationConstraintException", StoreAccessError, "AWS_REGION"),
        (301, "PermanentRedirect", StoreAccessError, "AWS_REGION"),
        (501, "NotImplemented", StoreError, "lacks"),
        (405, "MethodNotAllowed", StoreError, "lacks"),
        (501, "XSomethingOfTheirOwn", StoreError, "lacks"),
        (505, "HTTPVersionNotSupported", StoreError, "lacks"),
        (400, "KeyTooLongError", StoreError, "URL"),
        (412, "PreconditionFailed", StoreError, "URL"),
        (403, "QuotaExceeded", ResourceError, "quota"),
        (400, "XMinioAdminBucketQuotaExceeded", ResourceError, "quota"),
    ],
)
def test_an_error_that_waiting_does_not_mend_is_reported_at_once(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, expected: type[LatentacError], word: str
) -> None:
    """Its kind decides about exit code and remedy: credentials, clock, rights, region, what the store cannot do."""
    with _answering(monkeypatch, status, "application/xml", _refusal(code)) as (_, asked):
        with pytest.raises(expected) as caught:
            open_store("s3://bucket/x", HASTY).keys()
        assert len(asked) == 1
        assert type(caught.value) is expected
        assert caught.value.exit_code == (6 if expected is ResourceError else 3)
        says(caught.value, code, word)


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (500, "InternalError"), (400, "RequestTimeout"), (409, "OperationAborted"), (429, "Any"),
     (503, "XMinioServerNotInitialized"), (404, "NoSuchUpload"), (400, "BadDigest")],
)  # fmt: skip
def test_an_error_that_may_pass_is_waited_for(monkeypatch: pytest.MonkeyPatch, status: int, code: str) -> None:
    """The request is repeated as often as patience says, then it is exit code 75: try again later."""
    with _answering(monkeypatch, status, "application/xml", _refusal(code)) as (_, asked):
        with pytest.raises(StoreUnavailable) as caught:
            open_store("s3://bucket/x", HASTY).keys()
        assert len(asked) == HASTY.retries + 1
        says(caught.value, code)


def test_white_space_around_what_the_environment_says_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kubectl create secret --from-file` and editors leave a line break, a carriage return, spaces, a BOM."""
    with _answering(monkeypatch, 403, "application/xml", _refusal("AccessDenied")) as (_, asked):
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
        clean = access.read()
        for name, value in clean.environment().items():
            monkeypatch.setenv(name, f"\ufeff {value} \r\n")
        assert access.read() == clean
        assert clean.secret not in repr(clean)
        with pytest.raises(StoreAccessError, match="rights"):
            open_store("s3://bucket/x", HASTY).keys()
    assert "Credential=key/" in asked[0]["Authorization"]
    assert asked[0]["X-Amz-Security-Token"] == "token"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY", "hunter2\nhunter3", "U+000A as character 8 of 15"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2\u200bhunter3", "U+200B"),
        ("AWS_ACCESS_KEY_ID", "key id", "U+0020 as character 4"),
        ("AWS_ACCESS_KEY_ID", "kéy", "U+00E9"),
        ("AWS_SESSION_TOKEN", "hunter2\thunter3", "U+0009"),
        ("AWS_REGION", "us east", "'us east'"),
        ("AWS_DEFAULT_REGION", "us/east", "'us/east'"),
        ("LATENTAC_S3_ENDPOINT", "http://host :9000", "is not the address"),
        ("AWS_ACCESS_KEY_ID", " \n", "is not set"),
    ],
)
def test_what_cannot_be_sent_is_one_message_without_the_secret(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    """The variable, the character and its place; never the value of a credential."""
    for variable in ("LATENTAC_S3_CA", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LATENTAC_S3_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter1")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        open_store("s3://bucket/x")
    assert [problem.path for problem in caught.value.problems] == [name]
    says(caught.value, words)
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("regions", "signed"),
    [
        ({}, "us-east-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-3"}, "eu-west-3"),
        ({"AWS_REGION": " ", "AWS_DEFAULT_REGION": "eu-west-3"}, "eu-west-3"),
        ({"AWS_REGION": "eu-west-2", "AWS_DEFAULT_REGION": "eu-west-3"}, "eu-west-2"),
    ],
)
def test_the_region_is_what_amazons_tools_take(
    monkeypatch: pytest.MonkeyPatch, regions: dict[str, str], signed: str
) -> None:
    """AWS_REGION, else AWS_DEFAULT_REGION: requests are signed for it."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in regions.items():
        monkeypatch.setenv(name, value)
    with _answering(monkeypatch, 403, "application/xml", _refusal("AccessDenied")) as (_, asked):
        store = open_store("s3://bucket/x", HASTY)
        with pytest.raises(StoreAccessError):
            store.keys()
    assert f"/{signed}/s3/" in asked[0]["Authorization"]


def test_a_manifest_does_not_change_after_it_was_made(tmp_path: Path, artifact: Path) -> None:
    """A record, compared by value; a changed copy has another digest."""
    manifest = publish(open_store(f"file://{tmp_path}/store"), artifact)
    with pytest.raises(AttributeError):
        manifest.run = "other"  # type: ignore[misc]
    assert replace(manifest, run="other").digest != manifest.digest

"""What a cluster runs beside the steps: making a bucket ready, and keeping a folder like a part of the store."""

import os
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest

from latentac.store import bootstrap
from latentac.store.blobs import Entry, Folder, Patience, Stream
from latentac.store.mirror import BLOCK_BYTES, Mirror
from latentac.store.places import connect
from latentac.system.errors import ConfigError, StoreAccessError, StoreUnavailable
from tools.minio import Server, free_port

BOOTSTRAP = [sys.executable, "-m", "latentac.store.bootstrap"]


def use(monkeypatch: pytest.MonkeyPatch, server: Server, **other: str) -> None:
    for name, value in {**server.environment, **other}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.minio
def test_bootstrap_makes_the_bucket_once(minio_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time the bucket is made, the second time it is there; both times an object went in and out again."""
    use(monkeypatch, minio_server)
    url = "s3://made-by-bootstrap/some/prefix"
    assert bootstrap.bootstrap(url, 10) is True
    assert bootstrap.bootstrap(url, 10) is False
    assert list(minio_server.client().list_objects("made-by-bootstrap", recursive=True)) == []


@pytest.mark.minio
def test_check_makes_nothing(minio_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--check` on a store without its bucket says so and leaves it at that."""
    use(monkeypatch, minio_server)
    with pytest.raises(StoreAccessError, match="no such bucket"):
        bootstrap.bootstrap("s3://never-made/x", 5, make=False)
    assert not minio_server.client().bucket_exists("never-made")


@pytest.mark.minio
def test_bootstrap_refused_names_the_place_and_no_secret(minio_server: Server) -> None:
    """Wrong keys end it at once with exit code 3, naming endpoint and bucket, and never the key."""
    environment = {**os.environ, **minio_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong-secret-word"}
    began = time.monotonic()
    done = subprocess.run(
        [*BOOTSTRAP, "--store", "s3://bucket-x/y"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert time.monotonic() - began < 15
    assert minio_server.endpoint in done.stderr
    assert "bucket-x" in done.stderr
    assert "wrong-secret-word" not in done.stderr + done.stdout


@pytest.mark.minio
def test_bootstrap_waits_for_a_starting_server(
    minio_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that comes up while the Job runs is waited for."""
    server = Server(tmp_path / "data")
    use(monkeypatch, server)
    starter = threading.Timer(3.0, server.start)
    starter.start()
    try:
        bootstrap.bootstrap("s3://late/x", 60)
    finally:
        starter.join()
        server.stop()


def test_bootstrap_gives_up_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers ends it after about the time that was given, as something to try again later."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "something")
    monkeypatch.setenv("LATENTAC_S3_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        bootstrap.bootstrap("s3://bucket/x", 4)
    assert 1 < time.monotonic() - began < 20


def test_bootstrap_is_for_buckets() -> None:
    """A folder needs nobody to make it ready."""
    with pytest.raises(ConfigError, match="s3://"):
        bootstrap.bootstrap("file:///somewhere", 1)


def put(store: Folder, name: str, data: bytes, changed: float = 0.0, root: Path | None = None) -> None:
    store.put(name, Stream(BytesIO(data)), len(data))
    if root:
        os.utime(root / name, (changed, changed))


def test_mirror_copies_what_is_new_and_drops_what_is_gone(tmp_path: Path) -> None:
    """A pass copies what appeared or changed below the prefix, and removes what the store no longer has."""
    root, copy = tmp_path / "store", tmp_path / "copy"
    store = Folder(root)
    mirror = Mirror(store, "tensorboard", copy, 10**6)
    assert mirror.refresh() == []
    put(store, "tensorboard/run/events.1", b"abc")
    put(store, "models/x", b"not mine")
    assert mirror.refresh() == ["run/events.1"]
    assert mirror.refresh() == []
    store.remove("tensorboard/run/events.1")
    mirror.refresh()
    assert [path for path in copy.rglob("*") if path.is_file() and path.name.startswith("events")] == []


def test_mirror_grows_files_in_place(tmp_path: Path) -> None:
    """A reader that has a growing file open reads on; a file that became another is another."""
    root, copy = tmp_path / "store", tmp_path / "copy"
    store = Folder(root)
    mirror = Mirror(store, "tensorboard", copy, 10**6)
    put(store, "tensorboard/run/events", b"first,")
    mirror.refresh()
    with (copy / "run" / "events").open("rb") as reader:
        assert reader.read() == b"first,"
        put(store, "tensorboard/run/events", b"first,second")
        assert mirror.refresh() == ["run/events"]
        assert reader.read() == b"second"
    put(store, "tensorboard/run/events", b"anew")
    mirror.refresh()
    assert (copy / "run" / "events").read_bytes() == b"anew"


def test_mirror_keeps_the_newest_that_fit(tmp_path: Path) -> None:
    """Where not all have room the oldest stay away, and make room when newer ones come. Each takes a block at least."""
    root, copy = tmp_path / "store", tmp_path / "copy"
    store = Folder(root)
    mirror = Mirror(store, "tensorboard", copy, 2 * BLOCK_BYTES)
    put(store, "tensorboard/old", b"12345", 100.0, root)
    put(store, "tensorboard/new", b"12345", 200.0, root)
    assert sorted(mirror.refresh()) == ["new", "old"]
    put(store, "tensorboard/newest", b"12345", 300.0, root)
    assert mirror.refresh() == ["newest"]
    assert sorted(path.name for path in copy.iterdir() if not path.name.startswith(".")) == ["new", "newest"]


class Hostile(Folder):
    """A store with names that S3 servers refuse, and that another kind of server may have."""

    def entries(self, prefix: str) -> dict[str, Entry]:
        return dict.fromkeys((f"{prefix}../out", f"{prefix}/out"), Entry(4, 0.0, "x"))


@pytest.mark.minio
def test_mirror_stays_in_its_folder(minio_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a bucket as from a folder; and an object's name that leads out of the folder is not followed."""
    use(monkeypatch, minio_server)
    client = minio_server.client()
    for name in ("tensorboard/run/events", "tensorboard/..hidden", "tensorboard/a/b"):
        client.put_object(minio_server.bucket, f"mirror/{name}", BytesIO(b"data"), 4)
    store = connect(f"s3://{minio_server.bucket}/mirror", Patience(retries=1))
    assert sorted(Mirror(store, "tensorboard/", tmp_path / "copy", 10**6).refresh()) == [
        "..hidden",
        "a/b",
        "run/events",
    ]

    assert Mirror(Hostile(tmp_path), "tensorboard", tmp_path / "copy", 10**6).refresh() == []

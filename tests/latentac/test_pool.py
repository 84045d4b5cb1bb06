"""Equal files are one file on disk, in the store and in the working copies, and nobody changes it by accident."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentac.store import Manifest, Store, copy_folder, open_store, pool
from latentac.store.pool import OBJECTS, Pool
from latentac.system.errors import IntegrityError, ResourceError
from tests.latentac.test_store import CONTENT, KEY, bulk, publish, read, use, write
from tools.minio import Server

WEIGHTS = "policy/weights.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}/runs/store")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write(tmp_path / "artifact", CONTENT)


def occupied(*folders: Path) -> int:
    """Bytes on disk of all files below the folders, each counted once however many names it has."""
    files = [path.lstat() for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum({status.st_ino: status.st_size for status in files}.values())


def size(content: dict[str, bytes]) -> int:
    return sum(map(len, content.values()))


def kept(store: Store, manifest: Manifest, name: str = WEIGHTS) -> Path:
    return Path(store.url.removeprefix("file://")) / manifest.folder / name


def test_equal_files_of_artifacts_and_working_copies_are_one_file(store: Store, artifact: Path, tmp_path: Path) -> None:
    """Two artifacts and two local copies occupy what one does; all read the same; a store of this form is a plain
    folder to whoever reads it."""
    manifests = [publish(store, artifact, key) for key in ("run-1/prepare", "run-1/train")]
    copies = [tmp_path / "runs" / name for name in ("one", "two")]
    for manifest, copy in zip(manifests, copies, strict=True):
        store.fetch(manifest.key, copy, cache=tmp_path / "runs")
        store.verify(manifest)
        assert read(copy) == CONTENT == read(kept(store, manifest, "."))

    assert occupied(tmp_path / "runs") < size(CONTENT) + 4000  # the manifests
    assert store.keys() == ["run-1/prepare", "run-1/train"]
    assert len({(copy / WEIGHTS).stat().st_ino for copy in copies} | {kept(store, manifests[0]).stat().st_ino}) == 1


def test_what_is_shared_is_read_only_and_what_is_handed_out_is_not(
    store: Store, artifact: Path, tmp_path: Path
) -> None:
    """A working copy cannot be written to by accident; a copy for somebody else, or to go on with, is one's own."""
    manifest = publish(store, artifact)
    store.fetch(KEY, tmp_path / "shared", cache=tmp_path)
    store.fetch(KEY, tmp_path / "plain")
    copy_folder(tmp_path / "shared", tmp_path / "mine")

    assert not (tmp_path / "shared" / WEIGHTS).stat().st_mode & 0o222
    assert not kept(store, manifest).stat().st_mode & 0o222
    assert artifact.joinpath(WEIGHTS).stat().st_mode & stat.S_IWUSR  # what was published from is untouched
    for own in ("plain", "mine"):
        path = tmp_path / own / WEIGHTS
        assert path.stat().st_mode & stat.S_IWUSR
        path.write_bytes(b"mine now")
    assert read(tmp_path / "shared") == CONTENT
    store.verify(manifest)


def test_bytecode_beside_fetched_code_is_no_change(store: Store, tmp_path: Path) -> None:
    """Python writes it when it imports a package from its local copy; anything else that is new is refused."""
    publish(store, write(tmp_path / "artifact", {"package/mine.py": b"x = 1"}))
    store.fetch(KEY, tmp_path / "copy", cache=tmp_path)
    write(tmp_path / "copy", {"package/__pycache__/mine.cpython-311.pyc": b"bytecode"})
    store.fetch(KEY, tmp_path / "copy", cache=tmp_path)
    write(tmp_path / "copy", {"package/other.py": b"x = 2"})
    with pytest.raises(ResourceError):
        store.fetch(KEY, tmp_path / "copy", cache=tmp_path)


def test_an_editor_that_replaces_the_file_leaves_the_store_alone(store: Store, artifact: Path, tmp_path: Path) -> None:
    """Write another file and rename it: the working copy changes, nothing else does."""
    manifest = publish(store, artifact)
    store.fetch(KEY, tmp_path / "shared", cache=tmp_path)
    (tmp_path / "new").write_bytes(b"other weights")
    os.replace(tmp_path / "new", tmp_path / "shared" / WEIGHTS)
    store.verify(manifest)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write to a read-only file")
def test_a_shared_file_that_root_changed_is_refused_and_never_spreads(
    store: Store, artifact: Path, tmp_path: Path
) -> None:
    """The digest finds it wherever it is read, and the same content published again is sound."""
    publish(store, artifact)
    store.fetch(KEY, tmp_path / "shared", cache=tmp_path)
    with (tmp_path / "shared" / WEIGHTS).open("r+b") as stream:
        stream.write(b"x")
    with pytest.raises(IntegrityError, match=WEIGHTS):
        store.fetch(KEY, tmp_path / "again", cache=tmp_path)
    assert not (tmp_path / "again").exists()

    sound = publish(store, artifact, "run-2/train")
    store.verify(sound)
    store.fetch("run-2/train", tmp_path / "sound", cache=tmp_path)
    assert read(tmp_path / "sound") == CONTENT


def test_a_folder_that_is_given_away_is_not_copied(store: Store, tmp_path: Path) -> None:
    """Its files become the store's, read-only; a file that has other names, or is a link, is copied all the same."""
    folder = write(tmp_path / "made", {"large": bulk(2), "named twice": b"2", "link": b""})
    os.link(folder / "named twice", tmp_path / "other name")
    (folder / "link").unlink()
    (tmp_path / "elsewhere").write_bytes(b"3")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    before = (folder / "large").stat().st_ino
    manifest = publish(store, folder, owned=True)

    assert kept(store, manifest, "large").stat().st_ino == before
    for name, own, content in (("named twice", "other name", b"2"), ("link", "elsewhere", b"3")):
        (tmp_path / own).write_bytes(b"changed")
        assert kept(store, manifest, name).read_bytes() == content
    shutil.rmtree(folder)
    store.verify(manifest)


@pytest.mark.parametrize("name", ["EXDEV", "EPERM", "EMLINK", "EOPNOTSUPP"])
def test_without_hard_links_everything_is_copied(
    name: str, store: Store, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT, some network file systems, another disk, a file with too many names: it works, and takes the space."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(getattr(errno, name), "no link")

    monkeypatch.setattr(os, "link", refuse)
    manifest = publish(store, artifact, owned=True)
    store.fetch(KEY, tmp_path / "shared", cache=tmp_path)
    store.verify(manifest)
    assert read(tmp_path / "shared") == CONTENT
    assert kept(store, manifest).stat().st_ino != (tmp_path / "shared" / WEIGHTS).stat().st_ino
    store.delete(KEY)
    assert store.keys() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_working_copies_on_another_disk_share_among_themselves(store: Store, artifact: Path, tmp_path: Path) -> None:
    """A real second file system: the store cannot be linked to, so the first copy is what the next ones link to."""
    disk = tmp_path / "disk"
    disk.mkdir()
    publish(store, artifact)
    publish(store, artifact, "run-1/other")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        for key in (KEY, "run-1/other"):
            store.fetch(key, disk / key, cache=disk)
            assert read(disk / key) == CONTENT
        assert occupied(disk) == size(CONTENT)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_with_all_the_links_it_can_have_is_kept_once_more(tmp_path: Path) -> None:
    """What is given last is what the next one links to."""
    first, second = write(tmp_path, {"first": b"1", "second": b"1"}) / "first", tmp_path / "second"
    shared, digest = Pool(tmp_path), pool.hash_of(first)
    shared.give(first, digest)
    shared.give(second, digest)
    assert shared.take(digest, tmp_path / "third")
    assert (tmp_path / "third").stat().st_ino == second.stat().st_ino


def test_a_store_from_before_is_read_and_grows(store: Store, artifact: Path, tmp_path: Path) -> None:
    """Plain, writable files without a pool: they are copied, never shared, and lie beside new artifacts."""
    manifest = publish(store, artifact)
    root = Path(store.url.removeprefix("file://"))
    shutil.rmtree(root / OBJECTS)
    shutil.copytree(root / manifest.folder, root / "old", copy_function=shutil.copyfile)
    shutil.rmtree(root / manifest.folder)
    (root / "old").rename(root / manifest.folder)
    assert kept(store, manifest).stat().st_mode & stat.S_IWUSR

    store.fetch(KEY, tmp_path / "shared", cache=tmp_path)
    assert (tmp_path / "shared" / WEIGHTS).stat().st_ino != kept(store, manifest).stat().st_ino
    store.verify(publish(store, artifact, "run-1/new"))
    store.verify(manifest)


def test_deleting_frees_what_nothing_else_uses(store: Store, artifact: Path, tmp_path: Path) -> None:
    """The content goes with its last artifact, at once: checkpoints come and go by the hundred. A delete that was cut
    off after the manifest is finished by the next."""
    root = Path(store.url.removeprefix("file://"))
    manifest = publish(store, artifact)
    publish(store, artifact, "run-1/other")
    store.delete(KEY)
    assert occupied(root) > size(CONTENT)
    store.fetch("run-1/other", tmp_path / "whole")
    (root / "run-1/other/manifest.json").unlink()
    store.delete("run-1/other")
    assert [path for path in root.rglob("*") if path.is_file()] == []
    assert read(tmp_path / "whole") == CONTENT
    assert manifest.files


@pytest.mark.parametrize("below", ["", "ab"])
def test_sweeping_follows_no_link(tmp_path: Path, below: str) -> None:
    """An output folder may come from anywhere: a link in the place of the pool, or in it, leads to files of somebody
    else's, such as the objects of a git repository, which have the same layout."""
    name = "ab" + "0" * 62
    mine = write(tmp_path / "mine", {f"ab/{name}": b"mine", "ab/notes.txt": b"mine"})
    place = tmp_path / "runs" / OBJECTS / below
    place.parent.mkdir(parents=True)
    place.symlink_to(mine / below)
    for digests in (None, {name}):
        assert Pool(tmp_path / "runs").sweep(digests) == 0
    assert read(mine) == {f"ab/{name}": b"mine", "ab/notes.txt": b"mine"}


def test_sweeping_takes_what_the_pool_has_made_and_nothing_else(tmp_path: Path) -> None:
    """By its name: a digest, or a digest and the mark of a write that was cut off."""
    name = "ab" + "0" * 62
    own = {f"ab/{name}": b"1", f"ab/{name}.{'0' * 32}": b"2"}
    write(tmp_path / OBJECTS, {**own, "ab/notes.txt": b"mine", "ab/" + "0" * 38: b"mine"})
    assert Pool(tmp_path).sweep() == 2
    assert set(read(tmp_path / OBJECTS)) == {"ab/notes.txt", "ab/" + "0" * 38}


def test_publishers_and_deleters_at_once_lose_nothing(store: Store, artifact: Path) -> None:
    """One process deletes and sweeps while another publishes the same content: each manifest that is there is whole."""
    script = (
        "import sys\nfrom latentac.store import open_store\nstore = open_store(sys.argv[1])\n"
        "for turn in range(60):\n"
        "    store.publish('run-2/x', sys.argv[2], run='r', step='s', config_hash='c')\n    store.delete('run-2/x')\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, store.url, str(artifact)])
    turns = 0
    while other.poll() is None:
        manifest = publish(store, artifact, f"run-1/{turns}")
        store.verify(manifest)
        store.delete(manifest.key)
        turns += 1
    assert other.returncode == 0
    assert turns > 10


@pytest.fixture
def bucket(minio_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(minio_server, monkeypatch)


def counted(store: Store, operation: str) -> list[str]:
    """The names that the operation is called with, from here on."""
    names: list[str] = []
    call = getattr(store._backend, operation)

    def note(name: str, *rest: Any) -> Any:
        names.append(name)
        return call(name, *rest)

    setattr(store._backend, operation, note)
    return names


@pytest.mark.minio
def test_what_a_bucket_has_is_not_sent_again(bucket: str, artifact: Path, tmp_path: Path) -> None:
    """Files of a parent are copied by the server; the child is whole, and stays so without the parent."""
    store = open_store(bucket)
    parent = publish(store, artifact, "run-1/prepare")
    (artifact / "new").write_bytes(b"new")
    sent = counted(store, "keep")
    child = publish(store, artifact, parents=[parent])

    assert sent == [f"{child.folder}/new"]
    store.delete("run-1/prepare")
    store.verify(child, parents=False)
    store.fetch(KEY, tmp_path / "fetched")
    assert read(tmp_path / "fetched") == CONTENT | {"new": b"new"}


@pytest.mark.minio
def test_what_is_published_anew_sends_what_changed(bucket: str, artifact: Path, tmp_path: Path) -> None:
    """The same files of another origin, then one file more: nothing, then that file; a file that is gone is sent."""
    store = open_store(bucket)
    first = publish(store, artifact)
    sent = counted(store, "keep")
    publish(store, artifact, metrics={"again": 1})
    assert sent == []
    (artifact / "new").write_bytes(b"new")
    second = publish(store, artifact)
    assert sent == [f"{second.folder}/new"]
    store._backend.remove(f"{first.folder}/{WEIGHTS}")
    store._backend.remove(f"{second.folder}/{WEIGHTS}")
    store.verify(publish(store, artifact, metrics={"again": 2}))


@pytest.mark.minio
def test_a_parent_that_lost_its_files_makes_no_hole(bucket: str, artifact: Path) -> None:
    """There is nothing to copy, so the files are sent."""
    store = open_store(bucket)
    parent = publish(store, artifact, "run-1/prepare")
    for name in store._backend.names("run-1/prepare/"):
        store._backend.remove(name)
    store.verify(publish(store, artifact, parents=[parent]), parents=False)


@pytest.mark.minio
def test_local_copies_of_a_bucket_are_shared_and_fetched_once(bucket: str, artifact: Path, tmp_path: Path) -> None:
    """The second artifact with the same files takes neither space nor a download, and is checked."""
    store = open_store(bucket)
    for key in ("run-1/prepare", "run-1/train"):
        publish(store, artifact, key)
    store.fetch("run-1/prepare", tmp_path / "runs/run-1/prepare", cache=tmp_path / "runs")
    got = counted(store, "get")
    store.fetch("run-1/train", tmp_path / "runs/run-1/train", cache=tmp_path / "runs")

    assert got == ["run-1/train/manifest.json"]
    assert read(tmp_path / "runs/run-1/train") == CONTENT
    assert occupied(tmp_path / "runs") == size(CONTENT)

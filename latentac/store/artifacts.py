"""Publish, fetch and verify artifacts, and write pointers. The order of things is explained in `latentac.store`."""

import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

from latentac.store.blobs import Entry, Overrun, Patience, Stream, disk_errors
from latentac.store.manifest import (
    File,
    Manifest,
    Parent,
    describe,
    is_key,
    remedy_for,
    scan,
)
from latentac.store.objects import Objects
from latentac.store.places import connect
from latentac.store.pool import Pool, hash_of
from latentac.system.errors import (
    ArtifactNotFound,
    IntegrityError,
    ResourceError,
    StoreError,
    StoreUnavailable,
)
from latentac.system.progress import Progress, progress
from latentac.system.scratch import hidden_folder

PROGRESS_BYTES = 8 * 2**20
_MOST_READ_BYTES = 64 * 2**20
"""Of one file of an artifact that is read into memory."""
_PATIENCE = Patience()
_PROBE_SECONDS = (5.0, 10.0)
"""`timeout_seconds` and `idle_seconds` of a probe, at most."""


class Store(Objects):
    """Artifacts and pointers at `url`; made by `open_store`.

    Every method may raise StoreAccessError (credentials, bucket, permission), StoreUnavailable (no answer, retries
    included) and ResourceError (full disk); IntegrityError wherever something read is not what was published.
    """

    def publish(
        self,
        key: str,
        folder: Path | str,
        *,
        run: str,
        step: str,
        config_hash: str,
        parents: Sequence[Manifest] = (),
        metrics: Mapping[str, Any] | None = None,
        owned: bool = False,
    ) -> Manifest:
        """Publishes every file below `folder` under `key`, files first and the manifest last.

        The same files with the same origin are published once: the manifest that is there is returned. Anything else
        replaces it at one stroke. Files that the store holds already are not moved again. `metrics` must be JSON
        without NaN and infinity. `owned`: nobody writes to the folder any more, so its files may become the store's.
        """
        self._key(key)
        origin: dict[str, Any] = {"run": run, "step": step, "config_hash": config_hash}
        manifest = describe(key, Path(folder), **origin, parents=parents, metrics=metrics)
        published = self._published(key)
        if published and replace(manifest, created=published.created) == published:
            return published
        there = [*([published] if published else []), *parents]
        known = {(file.sha256, file.size): f"{each.folder}/{file.path}" for each in there for file in each.files}
        with self._removed_on_failure(published, manifest), _shown(f"publish {key}", manifest.files) as moved:
            for file in manifest.files:
                name, twin = f"{manifest.folder}/{file.path}", known.get((file.sha256, file.size))
                if twin is not None and self._backend.copy(twin, name):
                    moved(file.size)
                else:
                    self._send(Path(folder) / file.path, file, name, moved, owned)
            self._put(f"{key}/manifest.json", manifest.to_json())
        return manifest

    def manifest(self, key: str) -> Manifest:
        """The manifest under `key`, checked in form. Raises ArtifactNotFound if nothing was published there."""
        raw = self._get(f"{self._key(key)}/manifest.json", f"Run the step that publishes {key} first")
        return Manifest.from_json(raw, f"{self.url}/{key}/manifest.json", key)

    def fetch(
        self, key: str, folder: Path | str, *, cache: Path | None = None, below: str = "", beside: str = ""
    ) -> Manifest:
        """Copies the artifact to `folder`, which appears whole and verified or not at all.

        A folder that already holds exactly this artifact is left as it is; one that holds anything else is a
        ResourceError, for nothing is overwritten. cache: a folder above `folder` where equal files are kept once (see
        `latentac.store.pool`); what is fetched is then read-only, for it is shared, with the store too if it can be.
        below: only what is in this folder of the artifact. beside: a name that the artifact does not use, under which
        `folder` may hold something else.
        """
        manifest, folder = self.manifest(key), Path(folder)
        start = f"{below}/" if below else ""
        self._fetch(
            manifest, folder, [file for file in manifest.files if file.path.startswith(start)], cache, start, beside
        )
        return manifest

    def fetch_files(
        self, key: str, folder: Path | str, wanted: Callable[[str], bool], *, cache: Path | None = None
    ) -> Manifest:
        """As `fetch`, but only the files whose path within the artifact is `wanted`; the others are not read."""
        manifest = self.manifest(key)
        self._fetch(manifest, Path(folder), [file for file in manifest.files if wanted(file.path)], cache)
        return manifest

    def _fetch(
        self,
        manifest: Manifest,
        folder: Path,
        files: Sequence[File],
        cache: Path | None,
        start: str = "",
        beside: str = "",
    ) -> None:
        """start: what the paths of all `files` begin with, and what they do without in `folder`."""
        folder, key = folder.absolute(), manifest.key
        there = [replace(file, path=file.path.removeprefix(start)) for file in files]
        if _holds(folder, there, key, beside):
            return
        with disk_errors(folder, sum(file.size for file in files)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with hidden_folder(folder.parent, "fetch") as temporary:
                whole = temporary / folder.name
                (whole / start).mkdir(parents=True)
                self._read_files(manifest, whole, files, Pool(cache) if cache else None)
                try:
                    os.rename(whole / start, folder)
                except OSError as error:  # another process fetched to the same place meanwhile
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _holds(folder, there, key, beside):
                        raise

    def read(self, key: str, path: str) -> bytes:
        """One file of the artifact, verified; no other is read. Raises IntegrityError if it has no such file."""
        manifest, buffer = self.manifest(key), BytesIO()
        for file in manifest.files:
            if file.path == path:
                if file.size > _MOST_READ_BYTES:
                    problem = f"{path} has {file.size} bytes, and no more than {_MOST_READ_BYTES >> 20} MiB are read"
                    raise IntegrityError(f"{self.url}/{key}", problem, remedy_for(key))
                self._read_file(manifest, file, Stream(buffer, limit=file.size))
                return buffer.getvalue()
        raise IntegrityError(f"{self.url}/{key}", f"the artifact has no {path}", remedy_for(key))

    def verify(self, manifest: Manifest, *, files: bool = True, parents: bool = True) -> None:
        """Checks that the store holds `manifest`, its files and, recursively, the parents that it names.

        `files=False` checks the chain of manifests only, which reads a few kB; `parents=False` this artifact only.
        """
        seen: set[Parent] = set()
        pending = [Parent(manifest.key, manifest.digest)]
        while pending:
            expected = pending.pop()
            if expected in seen:
                continue
            seen.add(expected)
            found = self.manifest(expected.key)
            if found.digest != expected.sha256:
                problem = f"manifest.json was replaced: expected sha256 {expected.sha256}, found {found.digest}"
                remedy = f"Run again the steps that were made from {expected.key}, starting with its first child"
                raise IntegrityError(f"{self.url}/{expected.key}", problem, remedy)
            if files:
                self._read_files(found, None)
            pending.extend(found.parents if parents else ())

    def keys(self, prefix: str = "") -> list[str]:
        """Keys of the artifacts published at or below `prefix`, sorted."""
        found = [name.rpartition("/") for name in self._backend.names(f"{self._key(prefix)}/" if prefix else "")]
        return sorted(key for key, _, name in found if name == "manifest.json" and is_key(key))

    def delete(self, key: str) -> None:
        """Removes the artifact: its manifest first, so that no reader starts on it, then all its files."""
        marker = f"{self._key(key)}/manifest.json"
        published = self._published(key)
        names = [name for name in self._backend.names(f"{key}/") if name.startswith(f"{key}/files-")]
        for name in [marker, *names]:
            self._backend.remove(name)
        self._backend.reclaim({file.sha256 for file in published.files} if published else None)

    def entries(self) -> dict[str, Entry]:
        """Every object of the store by its name, manifests and files and pointers, with what is known of each."""
        return self._backend.entries("")

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects by their names in `entries`, in this order; what is not there is no error."""
        for name in names:
            self._backend.remove(name)

    def sweep(self) -> int:
        """Drops shared files that no artifact and no working copy uses any more; the bytes that became free."""
        return self._backend.reclaim(None)

    def probe(self) -> None:
        """Writes, reads back and removes an object, with few retries, to fail within seconds if the store would."""
        given = self._patience
        timeout, idle = _PROBE_SECONDS
        bounds = {
            "timeout_seconds": min(timeout, given.timeout_seconds),
            "idle_seconds": min(idle, given.idle_seconds),
        }
        patience = replace(given, retries=2, **bounds)
        backend, name, word = connect(self.url, patience), f"probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        sink = BytesIO()
        backend.put(name, Stream(BytesIO(word)), len(word))
        try:
            with suppress(FileNotFoundError):
                backend.get(name, Stream(sink))
        finally:
            backend.remove(name)
        if sink.getvalue() != word:
            raise IntegrityError(
                self.url, "it returns bytes other than those that were written", "Check the store's health"
            )

    def _published(self, key: str) -> Manifest | None:
        try:
            return self.manifest(key)
        except (ArtifactNotFound, IntegrityError):  # a damaged manifest is replaced by a sound one
            return None

    @contextmanager
    def _removed_on_failure(self, published: Manifest | None, manifest: Manifest) -> Iterator[None]:
        """Where the publishing of `manifest` fails, a full disk shall not stay full of files that no manifest names.
        They stay where the manifest before names them too, and where the store does not answer: `prune` finds them."""
        try:
            yield
        except StoreUnavailable:
            raise
        except BaseException:
            if published is None or published.folder != manifest.folder:
                with suppress(StoreError, OSError):
                    for file in manifest.files:
                        self._backend.remove(f"{manifest.folder}/{file.path}")
                    self._backend.reclaim({file.sha256 for file in manifest.files})
            raise

    def _send(self, path: Path, file: File, name: str, moved: Callable[[int], None], owned: bool) -> None:
        try:
            found = self._backend.keep(name, path, file.sha256, file.size, moved, owned)
            problem = "" if found == file.sha256 else "other bytes than before"
        except OSError as error:  # of the source; the store's own are StoreErrors
            problem = str(error)
        if problem:
            remedy = "Let nothing write to the folder while it is published, and publish it again"
            raise IntegrityError(str(path), f"it changed while it was published ({problem})", remedy)

    def _read_files(
        self,
        manifest: Manifest,
        folder: Path | None,
        files: Sequence[File] | None = None,
        pool: Pool | None = None,
    ) -> None:
        """Reads these files, or all, into `folder` where one is given, and refuses the first that differs. pool: where
        equal files are shared."""
        files = manifest.files if files is None else files
        with _shown(f"{'verify' if folder is None else 'fetch'} {manifest.key}", files) as moved:
            for file in files:
                if folder is None:
                    self._read_file(manifest, file, Stream(None, moved, file.size))
                    continue
                target = folder / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                if pool is not None and self._shared(f"{manifest.folder}/{file.path}", file, target, pool, moved):
                    continue
                with target.open("xb") as stream:
                    self._read_file(manifest, file, Stream(stream, moved, file.size))
                if pool is not None:
                    pool.give(target, file.sha256)

    def _read_file(self, manifest: Manifest, file: File, sink: Stream) -> None:
        try:
            self._backend.get(f"{manifest.folder}/{file.path}", sink)
            found = f"size {sink.size}, sha256 {sink.sha256}"
        except FileNotFoundError:
            found = "no such file"
        except Overrun:
            found = "a larger file"
        if found != f"size {file.size}, sha256 {file.sha256}":
            problem = f"{file.path}: expected size {file.size}, sha256 {file.sha256}; found {found}"
            raise IntegrityError(f"{self.url}/{manifest.key}", problem, remedy_for(manifest.key))

    def _shared(self, name: str, file: File, target: Path, pool: Pool, moved: Callable[[int], None]) -> bool:
        """Whether a hard link at `target` made a copy needless: to the store's own file, or to one fetched before."""
        if self._backend.share(name, target):
            if target.stat().st_size == file.size and hash_of(target) == file.sha256:
                moved(file.size)
                return True
            target.unlink()  # it is read below, and refused with what was found
            return False
        return pool.take(file.sha256, target, moved)


def open_store(url: str, patience: Patience = _PATIENCE) -> Store:
    """The store at file://<folder> or s3://<bucket>[/<prefix>].

    Raises ConfigError for another URL, and for variables of the environment that are missing or unusable. Nothing is
    touched yet: `Store.probe` finds out whether it works.
    """
    return Store(url, patience)


def _holds(folder: Path, files: Sequence[File], key: str, beside: str = "") -> bool:
    """Whether `folder` is exactly these files of an artifact, and perhaps others below `beside`. False where it does
    not exist or is empty, an error otherwise."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    wanted = set(files)
    others = bool(beside) and not any(file.path.startswith(f"{beside}/") for file in files)
    found = set(scan(folder, beside if others else "")) if folder.is_dir() else set()
    if {file for file in found if file in wanted or not _bytecode(file)} == wanted:
        return True
    problem = f"it exists and is not the artifact {key}, which was to be put there"
    raise ResourceError(str(folder), problem, "Move it away or choose another folder")


def _bytecode(file: File) -> bool:
    """What Python writes beside code that it imports from a local copy."""
    return "__pycache__" in file.path.split("/")


@contextmanager
def _shown(title: str, files: Sequence[File]) -> Iterator[Callable[[int], None]]:
    """Gives what to call with each number of bytes that moved; large transfers are shown, in MiB. One in the background
    is not: the terminal shows the work in front of it."""
    total, moved = sum(file.size for file in files), 0
    disabled = total <= PROGRESS_BYTES or threading.current_thread() is not threading.main_thread()
    display: Progress[Any]
    with progress(total // 2**20, title, "MiB", disabled=disabled) as display:

        def move(count: int) -> None:
            nonlocal moved
            before, moved = moved // 2**20, moved + count
            display.update(moved // 2**20 - before)

        yield move

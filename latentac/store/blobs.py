"""Named byte strings in a folder or in an S3 bucket: the few operations that `latentac.store` is built on.

Each `put` is atomic: a reader finds the old bytes or all of the new ones, whenever the writer or the machine dies.
A link below a folder's root is followed nowhere: who may write to a store shall not have others write and delete
elsewhere.

In a folder it writes a temporary file (below `.partial` at its root, so leftovers of a killed process are easy to
find and to remove), syncs it and renames it. In a bucket an object appears when its upload is complete.
"""

import errno
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from latentac.store.pool import OBJECTS, Pool, adopt, link
from latentac.system.errors import (
    ResourceError,
    StoreAccessError,
    StoreError,
)

CHUNK_BYTES = 2**20
PARTIAL = ".partial"
_PLACINGS = 100
"""How often a file is placed anew where others remove the folder that it is to lie in."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for an S3 server.

    Pauses between attempts grow from `back_off_seconds`, doubled each time and with as much jitter, up to
    `back_off_max_seconds`. `timeout_seconds` bounds one connect, read or write (of a part of an upload: 5 MiB). No
    attempt begins later than `idle_seconds` after the last byte moved. So an operation fails at most `bound_seconds`
    after that, which counts the attempt that runs then and one to abort the upload on the server. A download below
    `bytes_per_second`, on average over `idle_seconds`, counts as no answer.
    """

    retries: int = 6
    back_off_seconds: float = 0.5
    back_off_max_seconds: float = 20.0
    timeout_seconds: float = 15.0
    idle_seconds: float = 20.0
    bytes_per_second: float = 16_384.0

    @property
    def bound_seconds(self) -> float:
        return self.idle_seconds + 2 * self.timeout_seconds


class Overrun(Exception):
    """A blob has more bytes than its reader allows."""


class Stream:
    """A file, a buffer or nothing (None) whose bytes are counted, hashed and passed to `moved` as they pass through.

    limit: the most bytes that are written; more raise Overrun. moved_at: when the last byte passed, by
    `time.monotonic`.
    """

    def __init__(
        self,
        stream: BinaryIO | None,
        moved: Callable[[int], None] = lambda count: None,
        limit: int | None = None,
    ) -> None:
        self._stream, self._moved, self._limit = stream, moved, limit
        self.size, self._hash, self._written = 0, hashlib.sha256(), False
        self.moved_at = time.monotonic()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size) if self._stream else b""
        self._count(data)
        return data

    def write(self, data: bytes) -> None:
        if self._limit is not None and self.size + len(data) > self._limit:
            raise Overrun
        if self._stream:
            self._stream.write(data)
            self._written = True
        self._count(data)

    def rewind(self) -> None:
        """Back to the first byte for another attempt; what was written is dropped."""
        if self._stream and self.size:
            self._stream.seek(0)
            if self._written:  # a source may be writable, too, and is to be read again
                self._stream.truncate()
        self._moved(-self.size)
        self.size, self._hash = 0, hashlib.sha256()

    def _count(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)
        if data:
            self.moved_at = time.monotonic()
        self._moved(len(data))


class Entry(NamedTuple):
    """What is known of a blob without reading it. changed: seconds since 1970; stamp: differs where the bytes do.

    inode, links: which file of this machine it is and how many names that has, "" and 1 where it is none; moved: when
    it last got another name, else as changed.
    """

    size: int
    changed: float
    stamp: str
    inode: str = ""
    links: int = 1
    moved: float = 0.0


class Blobs(Protocol):
    """Named byte strings; a name is relative, its parts joined by '/'. `remove` of what is not there does nothing."""

    def put(self, name: str, source: Stream, size: int) -> None: ...

    def keep(self, name: str, path: Path, sha256: str, size: int, moved: Callable[[int], None], owned: bool) -> str:
        """`put` of a file whose digest is known, without a second copy where one is there. The digest of what was kept,
        which is another one if the file has changed. `owned`: nobody writes to the file any more, so it may be linked
        instead of read. Raises OSError where the file cannot be read."""

    def copy(self, source: str, name: str) -> bool:
        """Make `name` what `source` is, within the store; False where that saves nothing, or there is no `source`."""

    def get(self, name: str, sink: Stream) -> None:
        """Raises FileNotFoundError."""

    def share(self, name: str, target: Path) -> bool:
        """Put a hard link to the blob at `target`; False where there can be none."""

    def reclaim(self, digests: Collection[str] | None) -> int:
        """Drop what is shared and used no more, of these digests or of all (None); the bytes that became free."""

    def names(self, prefix: str) -> list[str]:
        """Every name that begins with `prefix`, which is empty or ends with '/'."""

    def entries(self, prefix: str) -> dict[str, Entry]:
        """The same names, each with what is known of it."""

    def remove(self, name: str) -> None: ...


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns what the operating system says about `path` into this project's errors. `needed`: bytes to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            there = next(folder for folder in (path, *path.parents) if folder.is_dir())
            free = shutil.disk_usage(there).free
            problem = f"the disk is full: {needed / 2**20:.1f} MiB to write, {free / 2**20:.1f} MiB free"
            raise ResourceError(str(path), problem, "Free space there, or choose another place") from error
        known = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        remedy = "Give this user the right to read and write there, or choose another place"
        raise (StoreAccessError if known else StoreError)(str(path), error.strerror or str(error), remedy) from error


class Folder:
    """Blobs as files below `root`, which appears with the first `put`. Equal files of artifacts are one file."""

    def __init__(self, root: Path) -> None:
        self._root, self._pool = root, Pool(root)

    def put(self, name: str, source: Stream, size: int) -> None:
        with disk_errors(self._at(name), size), self._partial() as partial:
            _write(source, partial)
            self._place(partial, name)

    def keep(self, name: str, path: Path, sha256: str, size: int, moved: Callable[[int], None], owned: bool) -> str:
        with path.open("rb") as stream, disk_errors(self._at(name), size), self._partial() as partial:
            if not self._pool.take(sha256, partial, moved):
                if owned and adopt(path, partial):
                    os.fsync(stream.fileno())
                    moved(size)
                else:
                    source = Stream(stream, moved)
                    _write(source, partial)
                    if source.sha256 != sha256:
                        return source.sha256
                self._pool.give(partial, sha256)
            self._place(partial, name)
        return sha256

    def copy(self, source: str, name: str) -> bool:
        return False  # `keep` does the same, and checks it

    def get(self, name: str, sink: Stream) -> None:
        path = self._at(name)
        with disk_errors(path):
            source = _open_file(path)
        if source is None:
            raise FileNotFoundError(name)
        with source:
            while data := source.read(CHUNK_BYTES):
                sink.write(data)

    def share(self, name: str, target: Path) -> bool:
        return link(self._at(name), target)

    def reclaim(self, digests: Collection[str] | None) -> int:
        return self._pool.sweep(digests)

    def names(self, prefix: str) -> list[str]:
        below, found = self._at(prefix), list[str]()
        with disk_errors(below):
            for folder, _, files in os.walk(below, onerror=_unless_gone):
                place = Path(folder).relative_to(self._root).as_posix()
                start = "" if place == "." else f"{place}/"
                found += [f"{start}{file}" for file in files if os.path.isfile(f"{folder}/{file}")]
        return [name for name in found if not name.startswith((f"{PARTIAL}/", f"{OBJECTS}/"))]

    def entries(self, prefix: str) -> dict[str, Entry]:
        found = {}
        for name in self.names(prefix):
            with suppress(FileNotFoundError):  # removed meanwhile
                path = self._root / name
                status = path.lstat()
                stamp, inode = str(status.st_mtime_ns), f"{status.st_dev}:{status.st_ino}"
                found[name] = Entry(
                    status.st_size,
                    status.st_mtime,
                    stamp,
                    inode,
                    status.st_nlink,
                    max(status.st_mtime, status.st_ctime),
                )
        return found

    def remove(self, name: str) -> None:
        path = self._at(name)
        with disk_errors(path):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # up to the first folder that still holds something
            for folder in path.parents[: name.count("/")]:
                folder.rmdir()

    def _at(self, name: str) -> Path:
        """The path of `name`. Raises StoreError where a folder on the way is a link."""
        place = str(self._root)  # text, not Path: this runs for each part of each name
        for part in name.split("/")[:-1]:
            place = f"{place}/{part}"
            if os.path.islink(place):
                remedy = "Replace the link by the folder itself; only the store's own folder may be a link"
                raise StoreError(place, "it is a link, and a store follows no links", remedy)
        return self._root / name

    @contextmanager
    def _partial(self) -> Iterator[Path]:
        """Where to write what is to be placed; nothing is left there."""
        path = self._at(f"{PARTIAL}/{uuid.uuid4().hex}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _place(self, partial: Path, name: str) -> None:
        target = self._root / name
        for attempt in range(1, _PLACINGS + 1):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, target)  # does nothing if both are one file already
                break
            except (FileNotFoundError, FileExistsError):  # a delete beside it just removed the empty folder
                if attempt == _PLACINGS:
                    raise
        entry = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(entry)  # else the name itself may be lost with the power
        finally:
            os.close(entry)


def _unless_gone(error: OSError) -> None:
    """Raises the error, unless it is that a folder is none, or none any more."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _open_file(path: Path) -> BinaryIO | None:
    """None where there is no regular file: a pipe or a device could wait or last for ever.
    Raises OSError for a link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    return None


def _write(source: Stream, path: Path) -> None:
    with path.open("wb") as sink:
        while data := source.read(CHUNK_BYTES):
            sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())

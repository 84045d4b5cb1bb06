"""Named byte strings in a folder or in an S3 bucket: the four operations that `latentac.store` is built on.

Each `put` is atomic: a reader finds the old bytes or all of the new ones, whenever the writer or the machine dies.
In a folder it writes a temporary file (below `.partial` at its root, so leftovers of a killed process are easy to
find and to remove), syncs it and renames it. In a bucket an object appears when its upload is complete.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from latentac.errors import (
    ConfigError,
    Problem,
    ResourceError,
    StoreAccessError,
    StoreError,
)

CHUNK_BYTES = 2**20
PARTIAL = ".partial"


@dataclass(frozen=True)
class Patience:
    """How long to wait for an S3 server. With the defaults one that refuses is given up after half a minute.

    Waits grow from `back_off_seconds`, doubled each time and with as much jitter, up to `back_off_max_seconds`;
    `timeout_seconds` is for one read or write on the connection.
    """

    retries: int = 6
    back_off_seconds: float = 0.5
    back_off_max_seconds: float = 20.0
    timeout_seconds: float = 60.0


class Stream:
    """A file, a buffer or nothing (None) whose bytes are counted, hashed and told to `moved` as they pass through."""

    def __init__(self, stream: BinaryIO | None, moved: Callable[[int], None] = lambda count: None) -> None:
        self._stream, self._moved = stream, moved
        self.size, self._hash = 0, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size) if self._stream else b""
        self._count(data)
        return data

    def write(self, data: bytes) -> None:
        if self._stream:
            self._stream.write(data)
        self._count(data)

    def rewind(self) -> None:
        """Back to the first byte for another attempt; what was written is dropped."""
        if self._stream and self.size:
            self._stream.seek(0)
            if self._stream.writable():
                self._stream.truncate()
        self._moved(-self.size)
        self.size, self._hash = 0, hashlib.sha256()

    def _count(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)
        self._moved(len(data))


class Entry(NamedTuple):
    """What is known of a blob without reading it. changed: seconds since 1970; stamp: differs where the bytes do."""

    size: int
    changed: float
    stamp: str


class Blobs(Protocol):
    """Named byte strings; a name is relative, its parts joined by '/'. `remove` of what is not there does nothing."""

    def put(self, name: str, source: Stream, size: int) -> None: ...

    def get(self, name: str, sink: Stream) -> None:
        """Raises FileNotFoundError."""

    def names(self, prefix: str) -> list[str]:
        """Every name that begins with `prefix`, which is empty or ends with '/'."""

    def entries(self, prefix: str) -> dict[str, Entry]:
        """The same names, each with what is known of it."""

    def remove(self, name: str) -> None: ...


def connect(url: str, patience: Patience) -> Blobs:
    """file://<folder>, absolute or relative to the working folder, or s3://<bucket>[/<prefix>]. Touches nothing yet."""
    scheme, _, rest = url.partition("://")
    if scheme == "file" and rest:
        return Folder(Path(rest).absolute())
    bucket, _, prefix = rest.strip("/").partition("/")
    names = [name for name in prefix.split("/") if name]
    if scheme == "s3" and re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket) and not {".", ".."} & set(names):
        from latentac.store.bucket import Bucket  # half a second of imports that a folder, the default, does without

        return Bucket(bucket, "".join(f"{name}/" for name in names), patience)
    shown = re.sub(r"://.*@", "://***@", url)  # whoever writes credentials into a URL shall not find them in a log
    remedy = "Use file://<folder> or s3://<bucket>/<prefix>; endpoint and credentials of S3 come from the environment"
    raise ConfigError([Problem("store", shown, "is neither a folder's nor a bucket's URL", remedy)])


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
    """Blobs as files below `root`, which appears with the first `put`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, source: Stream, size: int) -> None:
        target, partial = self._root / name, self._root / PARTIAL / uuid.uuid4().hex
        with disk_errors(target, size):
            partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as sink:
                    while data := source.read(CHUNK_BYTES):
                        sink.write(data)
                    sink.flush()
                    os.fsync(sink.fileno())
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
            entry = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(entry)  # else the name itself may be lost with the power
            finally:
                os.close(entry)

    def get(self, name: str, sink: Stream) -> None:
        with disk_errors(self._root / name):
            try:
                source = (self._root / name).open("rb")
            except FileNotFoundError:
                source = None
        if source is None:
            raise FileNotFoundError(name)
        with source:
            while data := source.read(CHUNK_BYTES):
                sink.write(data)

    def names(self, prefix: str) -> list[str]:
        below = self._root / prefix
        with disk_errors(below):
            found = [path.relative_to(self._root).as_posix() for path in below.rglob("*") if path.is_file()]
        return [name for name in found if not name.startswith(f"{PARTIAL}/")]

    def entries(self, prefix: str) -> dict[str, Entry]:
        found = {}
        for name in self.names(prefix):
            with suppress(FileNotFoundError):  # removed meanwhile
                status = (self._root / name).stat()
                found[name] = Entry(status.st_size, status.st_mtime, str(status.st_mtime_ns))
        return found

    def remove(self, name: str) -> None:
        path = self._root / name
        with disk_errors(path):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # up to the first folder that still holds something
            for folder in path.parents[: name.count("/")]:
                folder.rmdir()

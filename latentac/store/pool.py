"""Files kept once: by their sha256 below `<root>/.objects/`, with hard links wherever they are needed.

Whoever writes to one name of such a file would change it under all of them, so its write permission is removed, and
it is hashed each time before it is linked again. To change a copy, replace the file: write another one and rename it.

Sharing saves space and never decides whether something works: where a file system has no hard links, has run out of
them for one file, or does not let this user make one, a plain copy is kept instead.
"""

import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

OBJECTS = ".objects"
_READ_ONLY = 0o444


class Pool:
    """The shared files of one folder: of a file:// store, or of a run's output where the store is elsewhere."""

    def __init__(self, root: Path) -> None:
        self._root = root / OBJECTS

    def take(self, sha256: str, target: Path, moved: Callable[[int], None] = lambda count: None) -> bool:
        """Put the file `sha256` at `target`, which must not exist; False where there is none. One that is not what
        its name says is dropped from the pool. `moved` hears of the bytes that were checked, if they were right."""
        known = self._path(sha256)
        if self._is_linked(known) or not link(known, target):
            return False
        if hash_of(target) == sha256:
            moved(target.stat().st_size)
            return True
        target.unlink()
        known.unlink(missing_ok=True)
        return False

    def give(self, file: Path, sha256: str) -> None:
        """Share `file`, whose content has this digest, and make it read-only. One more link, no copy."""
        known, spare = self._path(sha256), self._path(f"{sha256}.{uuid.uuid4().hex}")
        with suppress(OSError):
            if self._is_linked(known):
                return
            known.parent.mkdir(parents=True, exist_ok=True)
            file.chmod(_READ_ONLY)
            os.link(file, spare)
            os.replace(spare, known)  # also one that has all the links that a file can have
            spare.unlink(missing_ok=True)  # both were one file already

    def sweep(self, digests: Iterable[str] | None = None) -> int:
        """Remove what nothing links to any more, of these or of all; the bytes that became free."""
        paths = self._root.glob("??/*") if digests is None else map(self._path, set(digests))
        freed = 0
        for path in paths:
            with suppress(OSError):
                if self._is_linked(path):
                    continue
                status = path.lstat()
                if status.st_nlink == 1 or "." in path.name:  # or what a killed process left
                    path.unlink()
                    freed += status.st_size
                    path.parent.rmdir()  # if it was the last
                    self._root.rmdir()
        return freed

    def _is_linked(self, path: Path) -> bool:
        """Whether a folder of the pool is a link: what it leads to is somebody else's."""
        return self._root.is_symlink() or path.parent.is_symlink()

    def _path(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256


def link(source: Path, target: Path) -> bool:
    """A hard link at `target` to the file `source` if it is read-only and the file system allows it; else nothing."""
    try:
        mode = source.lstat().st_mode
        if not stat.S_ISREG(mode) or mode & 0o222:
            return False
        os.link(source, target)
    except OSError:
        return False
    return True


def adopt(source: Path, target: Path) -> bool:
    """A hard link at `target` to a file that its owner gives away, unless it is known by other names too."""
    try:
        status = source.lstat()
        if not source.is_file() or source.is_symlink() or (status.st_nlink > 1 and status.st_mode & 0o222):
            return False
        os.link(source, target)
    except OSError:
        return False
    return True


def copy_folder(source: Path, folder: Path) -> None:
    """A copy of `source` that may be changed, although its files may be shared and read-only. `folder` may exist."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)


def hash_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

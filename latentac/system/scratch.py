"""Temporary files and folders: where they go, how they are recognised, and how they are removed.

They go to TMPDIR if it will do, else to another place, said in one line.

Python takes what TMPDIR names unless it cannot write there at all. Then a full or tiny file system stops a run in its
middle, a folder that is not there stops shells but not Python, and a long path has no room for the name of a socket.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from latentac.system.errors import ResourceError

ROOM_BYTES = 64 * 2**20
"""What a step may leave there: logs, sources of the steps, a report's images."""

MAX_PATH_BYTES = 60
"""The system allows 107 bytes for the name of a socket, and libraries put names of their own below the folder."""

HIDDEN = ".latentac-"
"""What the names of hidden folders and files begin with: nothing else is removed where others write too."""

_OWNER = ".owner"
"""In a folder of `temporary_files`: the folder that it was made for."""

_USUAL = ("/tmp", "/var/tmp")  # noqa: S108 - where every system has them; folders of our own are made in there
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def temporary_files(own: Path) -> Iterator[Path]:
    """A new folder that TMPDIR names for this process and its children; it goes in the end.

    It lies where TMPDIR said, or in /tmp or /var/tmp, or else in `own`, the run's folder. Raises ResourceError that
    names TMPDIR where none of them will do.
    """
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="latentac-", dir=_place(own), ignore_cleanup_errors=True) as folder:
        (Path(folder) / _OWNER).write_text(str(own.resolve()))
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("TMPDIR")
            if before[0] is not None:
                os.environ["TMPDIR"] = before[0]
            tempfile.tempdir = before[1]


def remove_abandoned(folder: Path, own: Path) -> None:
    """Remove a folder that `temporary_files(own)` made in a process that was killed. Anything else stays: the path may
    have been read from a file or a link that somebody else wrote."""
    with contextlib.suppress(OSError, ValueError):
        if (folder / _OWNER).read_text() == str(own.resolve()):
            shutil.rmtree(folder, ignore_errors=True)  # which does nothing where it is a link


@contextlib.contextmanager
def hidden_folder(place: Path, purpose: str) -> Iterator[Path]:
    """A new folder in `place` for what is still being made; it goes in the end."""
    with tempfile.TemporaryDirectory(prefix=f"{HIDDEN}{purpose}-", dir=place) as folder:
        yield Path(folder)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` whole: readers find what was there before, or `content`.

    A link that lies there is replaced, and none is followed. Where it fails nothing stays beside it. What a killed
    process leaves is a hidden file, which `prune` finds.
    """
    part = path.with_name(f"{HIDDEN}{uuid.uuid4().hex}")
    try:
        with part.open("xb") as file:  # x: it is a new file, or an error
            file.write(content if isinstance(content, bytes) else content.encode())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_hidden(place: Path, purpose: str = "") -> None:
    """Remove the hidden folders that killed processes left in `place`: all of them, or those of one purpose."""
    for left in place.glob(f"{HIDDEN}{purpose}*/"):
        shutil.rmtree(left, ignore_errors=True)  # which does nothing where it is a link


def empty_folder(folder: Path) -> None:
    """Make `folder` anew and empty. Raises ResourceError where it is a link: what that points to is not ours."""
    if folder.is_symlink():
        remedy = "Remove the link: a folder of this program's own belongs there"
        raise ResourceError(str(folder), f"is a link to {os.readlink(folder)!r}", remedy)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _place(own: Path) -> Path:
    wanted = os.environ.get("TMPDIR")
    own = own.absolute()
    lacks: dict[str, str] = {}
    for place in (*map(Path, (wanted, *_USUAL) if wanted else _USUAL), own):
        problem = _lacks(place, bounded=place is not own)
        if problem is None:
            if lacks and wanted:
                _log.warning("TMPDIR = %s %s: temporary files go to %s", wanted, lacks[str(Path(wanted))], place)
            return place.absolute()
        lacks[str(place)] = problem
    problem = "; ".join(f"{place} {problem}" for place, problem in lacks.items())
    remedy = f"Name a folder with {ROOM_BYTES >> 20} MiB of room in it, which you may write to, and run again"
    raise ResourceError("TMPDIR", f"there is no folder for temporary files: {problem}", remedy)


def _lacks(folder: Path, *, bounded: bool) -> str | None:
    """Why temporary files cannot go to `folder`; `bounded`: for a long path too."""
    if bounded and len(os.fsencode(folder.absolute())) > MAX_PATH_BYTES:
        return f"is a path of more than {MAX_PATH_BYTES} bytes"
    try:
        if not folder.is_dir():
            return "is not a folder"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return None if free >= ROOM_BYTES else f"has only {free / 2**20:.1f} MiB free"

"""Where temporary files go: TMPDIR if it will do, else another place, said in one line.

Python takes what TMPDIR names unless it cannot write there at all. Then a full or tiny file system stops a run in its
middle, a folder that is not there stops shells but not Python, and a long path has no room for the name of a socket.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from latentac.errors import ResourceError

ROOM_BYTES = 64 * 2**20
"""What a step may leave there: logs, sources of the steps, a report's pictures."""

MAX_PATH_BYTES = 60
"""The system allows 107 bytes for the name of a socket, and libraries put names of their own below the folder."""

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
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("TMPDIR")
            if before[0] is not None:
                os.environ["TMPDIR"] = before[0]
            tempfile.tempdir = before[1]


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
            return "is no folder"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return None if free >= ROOM_BYTES else f"has only {free / 2**20:.1f} MiB free"

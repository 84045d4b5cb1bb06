"""What is to be removed, and its removal."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentac.runs.housekeeping.listing import Survey, files, pooled


@dataclass(frozen=True)
class Removal:
    """One thing to remove: title; objects: names in the store, in the order in which they go; paths: here; folder: the
    run's, to be locked meanwhile and removed if nothing is left in it; bytes: that become free."""

    title: str
    objects: tuple[str, ...]
    paths: tuple[Path, ...]
    folder: Path | None
    bytes: int


def measured(survey: Survey, removals: list[Removal]) -> Iterator[Removal]:
    """With the bytes that become free: a shared file counts where its last name outside the pools goes."""
    pools = Counter(pooled(survey.output))
    if survey.store.url.startswith("file://"):
        pools.update(pooled(Path(survey.store.url.removeprefix("file://"))))
    gone: Counter[str] = Counter()
    for removal in removals:
        freed = 0
        for name in removal.objects:
            entry = survey.entries[name]
            gone[entry.inode] += 1
            freed += entry.size if not entry.inode or gone[entry.inode] + pools[entry.inode] >= entry.links else 0
        for path, status in (each for place in removal.paths for each in all_files(place)):
            inode = f"{status.st_dev}:{status.st_ino}"
            gone[inode] += 1
            freed += status.st_size if gone[inode] + pools[inode] >= status.st_nlink else 0
            del path
        yield Removal(removal.title, removal.objects, removal.paths, removal.folder, freed)


def all_files(path: Path) -> Iterator[Any]:
    if path.is_dir() and not path.is_symlink():
        yield from files(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            yield path, path.lstat()


def ordered(objects: Iterable[str]) -> tuple[str, ...]:
    """Pointers, then manifests, then files: what is not whole any more cannot be found any more."""

    def rank(name: str) -> tuple[int, str]:
        return (0 if name.endswith("/LATEST") else 1 if name.endswith("/manifest.json") else 2), name

    return tuple(sorted(set(objects), key=rank))


def remove_one(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

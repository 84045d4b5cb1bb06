"""`python -m latentac.store.mirror`: keeps a folder like a part of a store, for programs that read folders alone.

TensorBoard is one: its own way to S3 wants a second client with settings of its own. The newest blobs are kept where
not all have room. A file that grew is grown in place, so that a reader that has it open reads on.
"""

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from latentac.store.blobs import CHUNK_BYTES, Blobs, Entry, Overrun, Patience, Stream, disk_errors
from latentac.store.objects import below
from latentac.store.places import connect
from latentac.system.errors import ConfigError, LatentacError
from latentac.system.reading import seconds, whole
from latentac.system.terminal import escape_streams

PARTIAL = ".partial"
BLOCK_BYTES = 4096

_log = logging.getLogger(__name__)


class Mirror:
    """Copies the blobs below `prefix` to `folder`, the newest that fit into `max_bytes`."""

    def __init__(self, backend: Blobs, prefix: str, folder: Path, max_bytes: int) -> None:
        self._backend, self._prefix, self._folder, self._max_bytes = backend, f"{prefix.strip('/')}/", folder, max_bytes
        self._copied: dict[str, Entry] = {}

    def refresh(self) -> list[str]:
        """One pass; the names, relative to the prefix, that were copied. Raises what the store raises."""
        wanted = dict(self._chosen())
        for name in self._copied.keys() - wanted.keys():
            self._remove(name)
            del self._copied[name]
        changed = [name for name, entry in wanted.items() if self._copied.get(name) != entry]
        for name in changed:
            with disk_errors(self._folder / name, wanted[name].size):
                self._copy(name, wanted[name].size)
            self._copied[name] = wanted[name]
        return changed

    def _chosen(self) -> Iterator[tuple[str, Entry]]:
        """Names and entries, the newest first, up to the bound; a file takes a block at least."""
        entries = below(self._backend, self._prefix)
        newest = sorted(entries.items(), key=lambda item: item[1].changed, reverse=True)
        totals = accumulate(max(entry.size, BLOCK_BYTES) for _, entry in newest)
        for (name, entry), total in zip(newest, totals, strict=True):
            if PARTIAL not in name.split("/") and total <= self._max_bytes:
                yield name, entry

    def _remove(self, name: str) -> None:
        with disk_errors(self._folder / name):
            (self._folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # up to the first folder that still holds something
            for folder in (self._folder / name).parents[: name.count("/")]:
                folder.rmdir()

    def _copy(self, name: str, size: int) -> None:
        target, partial = self._folder / name, self._folder / PARTIAL
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w+b") as copy:
            try:
                self._backend.get(self._prefix + name, Stream(copy, limit=size))
            except (FileNotFoundError, Overrun):  # removed, or grown, meanwhile: the next pass sees it
                return
            copy.seek(0)
            if target.exists() and _starts_with(copy, target):
                with target.open("ab") as grown:
                    shutil.copyfileobj(copy, grown)
                return
        partial.replace(target)


def _starts_with(copy: BinaryIO, old: Path) -> bool:
    """Whether `copy`, read from its start, begins with what is in `old`; it is left at the first byte after that."""
    with old.open("rb") as before:
        while data := before.read(CHUNK_BYTES):
            if copy.read(len(data)) != data:
                return False
    return True


def keep(url: str, prefix: str, folder: Path, *, max_bytes: int, every_seconds: float) -> None:
    """Refreshes for ever. A store that does not answer, or refuses, is reported once and asked again."""
    mirror = Mirror(connect(url, Patience()), prefix, folder, max_bytes)
    reported = ""
    while True:
        try:
            copied = mirror.refresh()
            reported = ""
            if copied:
                _log.info("copied %d of %s/%s", len(copied), url, prefix)
        except ConfigError:
            raise
        except LatentacError as error:
            if type(error).__name__ != reported:
                _log.warning("%s", error)
            reported = type(error).__name__
        time.sleep(every_seconds)


def main(arguments: Sequence[str]) -> int:
    """The exit code, where it ends at all."""
    parser = argparse.ArgumentParser(prog="python -m latentac.store.mirror", description="A folder like a store's part")
    parser.add_argument("--store", required=True, metavar="URL", help="file://<folder> or s3://<bucket>/<prefix>")
    parser.add_argument("--prefix", required=True, help="what of it, such as tensorboard")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="the folder")
    parser.add_argument("--every-seconds", type=seconds, default=30.0, metavar="S", help="between passes (30)")
    parser.add_argument(
        "--max-mib", type=whole(1, 2**30), default=1024, metavar="MIB", help="the newest that fit in (1024)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        keep(
            options.store,
            options.prefix,
            options.to,
            max_bytes=options.max_mib * 2**20,
            every_seconds=options.every_seconds,
        )
    except LatentacError as error:
        print(f"mirror: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    escape_streams()
    raise SystemExit(main(sys.argv[1:]))

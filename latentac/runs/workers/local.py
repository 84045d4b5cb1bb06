"""The checkpoints of a training job on the machine of the worker that writes them.

    <folder>/<iteration>/state/...        what `latentac.training.checkpoint` writes
    <folder>/<iteration>/manifest.json    the files' sizes and sha256s, in the form of the store's manifests

A checkpoint appears whole, by one rename of its synced folder. What is read is verified, so a disk that lost or changed
something is noticed, too.
"""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from latentac.store import Manifest
from latentac.store.blobs import disk_errors
from latentac.store.manifest import scan
from latentac.store.published import read
from latentac.system.errors import IntegrityError, LatentacError
from latentac.system.reading import read_bytes
from latentac.system.scratch import hidden_folder, remove_hidden
from latentac.training.checkpoint import write_state

MANIFEST, STATE = "manifest.json", "state"
_PURPOSE = "checkpoint"


class LocalCheckpoints:
    """Those in `folder`. They are numbered by their iteration."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def iterations(self) -> list[int]:
        """Of the checkpoints that are there, in order; whether they are sound is another question."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def files(self, iteration: int) -> Path:
        """The folder of the state files."""
        return self._place(iteration) / STATE

    def write(
        self,
        iteration: int,
        tensors: Mapping[str, Tensor],
        progress: Mapping[str, Any],
        described: Callable[[Path], Manifest],
    ) -> None:
        """described: gives the manifest of the state files in a folder.

        Raises ResourceError where the disk is full. Then the checkpoints before are what they were.
        """
        place, needed = self._place(iteration), sum(tensor.nbytes for tensor in tensors.values())
        with disk_errors(place, needed):
            self._folder.mkdir(parents=True, exist_ok=True)
            # Beside the folder, in the run's own, where what killed processes left is looked for.
            with hidden_folder(self._folder.parent, _PURPOSE) as temporary:
                made = temporary / place.name
                write_state(made / STATE, tensors, progress)
                (made / MANIFEST).write_bytes(described(made / STATE).to_json())
                for path in (*(made / STATE).iterdir(), made / MANIFEST, made / STATE, made):
                    _sync(path)
                shutil.rmtree(place, ignore_errors=True)  # one that was not sound, or of a training that diverged
                os.rename(made, place)
            _sync(self._folder)

    def read(self, iteration: int, key: str) -> Manifest:
        """The manifest of a checkpoint, whose files are verified. key: that the checkpoint has in the store.

        Raises IntegrityError that names the file that is not what was written.
        """
        place, where = self._place(iteration), self._place(iteration) / MANIFEST
        remedy = "The one before is used"
        try:
            manifest = Manifest.from_json(read_bytes(where), str(where), key)
            found = {file.path: file for file in scan(place / STATE)}
        except IntegrityError:
            raise
        except (LatentacError, OSError, ValueError) as error:
            raise IntegrityError(str(place), f"it cannot be read ({error})", remedy) from error
        for file in manifest.files:
            there = found.pop(file.path, None)
            if there != file:
                is_now = f"size {there.size}, sha256 {there.sha256}" if there else "no such file"
                problem = f"expected size {file.size}, sha256 {file.sha256}; found {is_now}"
                raise IntegrityError(str(place / STATE / file.path), problem, remedy)
        if found:
            raise IntegrityError(str(place / STATE / min(found)), "the manifest does not name it", remedy)
        read(place / STATE / "progress.json", remedy=remedy)  # also refuses that of another version
        return manifest

    def drop(self, iterations: Collection[int]) -> None:
        for iteration in iterations:
            shutil.rmtree(self._place(iteration), ignore_errors=True)

    def tidy(self) -> None:
        """Remove what a killed process left of a checkpoint. Only for the one process that writes."""
        remove_hidden(self._folder.parent, _PURPOSE)

    def clear(self) -> None:
        """Remove all of them: the training is over."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _place(self, iteration: int) -> Path:
        return self._folder / f"{iteration:06d}"


def _sync(path: Path) -> None:
    """Else a name, or what is in a file, may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

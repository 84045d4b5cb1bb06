"""The checkpoints of a training job: written on this machine, uploaded in the background, and resumed from.

Training waits for the store when it starts, when it returns to a checkpoint, and at its end. In between the leading
worker writes a checkpoint into the run's folder and goes on; `Uploads` puts it into the store: files, manifest, then
the pointer LATEST. The number of workers is in none of it.

The store decides where a job resumes, because all workers see it. So whoever finds a newer checkpoint on its machine
uploads that first. Then the leading worker chooses the newest one that is sound, and the others load the same.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from latentac.runs.workers.local import LocalCheckpoints
from latentac.runs.workers.uploads import Upload, Uploads
from latentac.runs.workspace import CHECKPOINTS, Workspace
from latentac.store.manifest import describe
from latentac.store.published import checked
from latentac.system.errors import ArtifactNotFound, IntegrityError, StoreUnavailable
from latentac.system.scratch import hidden_folder
from latentac.training.checkpoint import loading, read_state
from latentac.training.distributed import Mesh, PeerLost
from latentac.training.trainer import Trainer

_NONE = -1
_RETURN_SECONDS = 300.0
"""For the uploads before training returns to a checkpoint: the other workers wait in a collective operation."""

_LAST_SECONDS = 20.0
"""For the uploads of a worker that ends with an error."""

_log = logging.getLogger(__name__)


class Unfit(Exception):
    """A checkpoint is whole, and no state of this trainer."""

    def __init__(self, cause: IntegrityError) -> None:
        self.cause = cause
        super().__init__(str(cause))


class Checkpoints:
    """Those of the run of `space`. All workers of `mesh` call `resume` and `await_store` together; the rest is for the
    leading one.

    As a context it gives what is pending a last chance when an error ends it, and says what the store has not got.
    """

    def __init__(self, space: Workspace, mesh: Mesh) -> None:
        self._space, self._mesh, self._settings = space, mesh, space.config.train
        self._prefix = f"{CHECKPOINTS}/{space.run}"
        self._here = LocalCheckpoints(space.folder / CHECKPOINTS)
        parents = [space.prepared, space.store.manifest(f"{space.run}/pretrain-value")]
        self._origin: dict[str, Any] = {"run": space.run, "step": "train", "config_hash": space.config.hash}
        self._origin["parents"] = parents
        seconds = self._settings.max_seconds_without_store
        kept = f"Checkpoints are kept in {self._here}, from where a restart on this machine goes on"
        self._uploads = Uploads(space.store.url, seconds, setting="train.max_seconds_without_store", kept=kept)

    def __enter__(self) -> Self:
        if self._mesh.leads:
            self._here.tidy()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a lost peer all of them start again at once, and then what is here is uploaded.
        left = self._uploads.end(0.0 if error is None or isinstance(error, PeerLost) else _LAST_SECONDS)
        if left:
            missing = " and ".join(upload.what for upload in left)
            _log.warning("not in the store yet: %s. A restart goes on from %s, on this machine", missing, self._here)

    def resume(self, trainer: Trainer) -> None:
        """Load the newest checkpoint that is sound, if there is one. One that is not is reported and passed over."""
        loaded = self._load_newest(trainer)
        if self._upload_newer(loaded):
            loaded = self._load_newest(trainer)
        if self._mesh.leads:
            self._here.drop([found for found in self._here.iterations() if found > loaded])
        elif loaded != _NONE:
            self._load(self._key(loaded), trainer)

    def await_store(self) -> None:
        """Wait, all workers together, until the store has every checkpoint. Raises StoreUnavailable after a bound."""
        ends_at = time.monotonic() + _RETURN_SECONDS
        if not self._uploads.settle(lambda: ends_at):
            remedy = "Resume the run: it continues from its last checkpoint"
            problem = f"the last checkpoint was not uploaded within {_RETURN_SECONDS:g} s"
            raise StoreUnavailable(self._space.store.url, problem, remedy)
        self._told(0)

    def save(self, trainer: Trainer, also: Callable[[], None]) -> None:
        """Write a checkpoint here, and have it uploaded. also: what else to upload then, from another thread.

        Raises ResourceError where the disk is full.
        """
        iteration = trainer.iteration
        described = partial(describe, self._key(iteration), metrics={"iteration": iteration}, **self._origin)
        self._here.write(iteration, *trainer.state(), described)
        uploading = {upload.iteration for upload in self._uploads.pending()}
        old = self._here.iterations()[: -self._settings.keep_checkpoints]
        self._here.drop([found for found in old if found not in uploading])

        def upload() -> None:
            self._upload(iteration)
            also()

        self._uploads.submit(Upload(f"the checkpoint of iteration {iteration}", upload, iteration))

    def check(self) -> None:
        """Raises what ends the training: an upload that cannot succeed, or a store without an answer for too long."""
        self._uploads.check()

    def stop(self, ends_at: Callable[[], float]) -> None:
        """Upload what is pending until `ends_at`, by `time.monotonic`, and say what was saved."""
        with contextlib.suppress(StoreUnavailable):  # the end of this context says what is here alone
            if self._uploads.settle(ends_at):
                newest = max(self._here.iterations())
                _log.warning("training was asked to stop: the checkpoint of iteration %d is in the store", newest)

    def publish(self, folder: Path, metrics: dict[str, Any], ends_at: Callable[[], float]) -> bool:
        """Publish `folder` as the result of the training, which ends it; then the checkpoints here go. False if that
        was not done at `ends_at`."""
        key = f"{self._space.run}/train"
        send = partial(self._space.store.publish, key, folder, metrics=metrics, owned=True, **self._origin)
        last = Upload("the trained model", send, metrics["iterations"])
        if not self._uploads.settle(ends_at):  # the last checkpoint comes first
            return False
        self._uploads.submit(last)
        if not self._uploads.settle(ends_at):
            return False
        self._here.clear()
        return True

    def _key(self, iteration: int) -> str:
        return f"{self._prefix}/{iteration:06d}"

    def _told(self, number: int) -> list[int]:
        """The workers' numbers, in rank order, on every worker."""
        return [int(each) for each in self._mesh.gather(torch.tensor([number], device=self._mesh.device))]

    def _upload_newer(self, loaded: int) -> bool:
        """Upload the newest sound checkpoint of all machines, if it is newer than what was loaded, and say so."""
        newest = self._newest_here(loaded)
        found = self._told(newest)
        if max(found) == _NONE:
            return False
        if found.index(max(found)) == self._mesh.rank:
            _log.warning("the checkpoint of iteration %d is uploaded from %s", newest, self._here)
            self._space.store.delete(self._key(newest))  # what may be there is not sound
            self._upload(newest)
        self._told(newest)  # the others wait
        return True

    def _newest_here(self, above: int) -> int:
        for iteration in reversed(self._here.iterations()):
            if iteration <= above:
                break
            try:
                manifest = self._here.read(iteration, self._key(iteration))
            except IntegrityError as error:
                _log.warning("checkpoint skipped: %s", error)
                continue
            parents = [parent.sha256 for parent in manifest.parents]
            if manifest.config_hash == self._space.config.hash and parents == [
                parent.digest for parent in self._origin["parents"]
            ]:
                return iteration
        return _NONE

    def _published(self) -> list[int]:
        """Iterations of the checkpoints in the store, oldest first."""
        store, pointer = self._space.store, f"{self._prefix}/LATEST"
        latest = None
        try:
            latest = checked(store.read_json(pointer), pointer)["key"]
        except ArtifactNotFound:
            return []
        except IntegrityError as error:
            _log.warning("the pointer to the last checkpoint is not used: %s", error)
        keys = [key for key in store.keys(self._prefix) if key.removeprefix(f"{self._prefix}/").isdecimal()]
        # One beyond LATEST was cut off between its manifest and the pointer; it is as good as never written.
        return [int(key.rpartition("/")[2]) for key in keys if latest is None or key <= latest]

    def _load_newest(self, trainer: Trainer) -> int:
        """The leading worker loads the newest checkpoint of the store that is sound. All learn its iteration."""
        loaded = _NONE
        if self._mesh.leads:
            problem: IntegrityError | None = None
            for iteration in reversed(self._published()):
                try:
                    if self._load(self._key(iteration), trainer):
                        loaded = iteration
                        break
                except Unfit as error:
                    problem = error.cause
                    _log.warning("checkpoint skipped: %s", error.cause)
                except IntegrityError as error:
                    _log.warning("checkpoint skipped: %s", error)
            if problem is not None and loaded == _NONE:
                raise problem  # the trainer holds a part of a state, and no other replaces that
        return self._told(loaded)[0]

    def _load(self, key: str, trainer: Trainer) -> bool:
        """False for the checkpoint of another configuration. Raises IntegrityError for one that is not sound, and Unfit
        for one that the trainer has taken only in part."""
        with hidden_folder(self._space.folder, "train") as folder:
            manifest = self._space.store.fetch(key, folder / "state")
            if manifest.config_hash != self._space.config.hash:
                return False
            state = read_state(folder / "state", key)
        try:
            with loading(key):
                trainer.load_state(*state)
        except IntegrityError as error:
            raise Unfit(error) from error
        return True

    def _upload(self, iteration: int) -> None:
        """Files, manifest, pointer; then drop what is older than `keep_checkpoints`."""
        store, key = self._space.store, self._key(iteration)
        store.publish(key, self._here.files(iteration), metrics={"iteration": iteration}, owned=True, **self._origin)
        store.write_json(f"{self._prefix}/LATEST", {"key": key})
        for old in self._published()[: -self._settings.keep_checkpoints]:
            store.delete(self._key(old))

"""One worker of the elastic training job. torchrun starts its supervisor, `latentac.runs.workers.supervisor`.

All workers hold the same state and do the same updates; rank 0 alone writes checkpoints, logs and the result.

On one machine it never outlives the step that launched it, and leaves an expected error in the file `failure`. On a
cluster there is no such file: the error goes to the store (`failures`), and SIGTERM (a pod that is moved, a
run that is cancelled) means to write a checkpoint and end.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latentac.critic import Critic
from latentac.runs import failures
from latentac.runs.release.readme import write_trained
from latentac.runs.reporting.metrics import of_iteration
from latentac.runs.workers.lease import watched
from latentac.runs.workspace import Workspace, open_run
from latentac.store import open_store
from latentac.store.published import checked
from latentac.system.errors import ArtifactNotFound, Diverged, IntegrityError, LatentacError, StoreError, expected
from latentac.system.lifetime import run_lock
from latentac.system.progress import progress
from latentac.system.reading import whole_variable
from latentac.system.scratch import hidden_folder
from latentac.training.checkpoint import loading, read_state, write_state
from latentac.training.critic_learning import Replay
from latentac.training.distributed import Mesh, PeerLost
from latentac.training.trainer import Trainer, new_trainer

if TYPE_CHECKING:
    from latentac.runs.reporting.tracking import Background, Tracker

STOPPED = 143
"""Exit code of a worker that was asked to end and wrote its checkpoint first; the agent starts it anew or ends too."""

ALONE = 144
"""Exit code of a worker whose peer was lost; likewise."""

_log = logging.getLogger(__name__)


def main(run: str, store: str, output: str, failure: str = "") -> int:
    """Work, and leave an expected error for the launcher: restarting the workers would only repeat it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    faulthandler.enable()  # a crash in native code, a reward's for example, leaves its Python stack in the log
    position = Position(graceful=not failure)
    try:
        if failure:
            work(open_run(run, store, output), position)
        else:
            return _work_in_pod(run, store, output, position)
    except Exception as error:
        meant = expected(error) if isinstance(error, LatentacError | OSError | ImportError) else None
        if failure and meant is not None:
            Path(failure).write_text(json.dumps(meant.to_dict()))
        elif failure and not isinstance(error, PeerLost):  # that one is the consequence of another's error
            failures.note(Path(failure).parent, error, position.iteration)
        if meant is None:
            raise
        return meant.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


@dataclass
class Position:
    """Where the training stands. graceful: SIGTERM asks it to stop after the iteration; stop: it was asked."""

    graceful: bool
    iteration: int = 0
    stop: bool = False

    def watch(self) -> None:
        """From here on there is something to save. Before, and on one machine, SIGTERM just ends the process."""
        if self.graceful:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.stop = True


def _work_in_pod(run: str, store: str, output: str, position: Position) -> int:
    """`work`, with its failures passed on through the store. A start that follows a final one ends at once, and well:
    so the agents and the job come to their end also where no launcher is there to stop them."""
    opened = open_store(store)
    if failures.read(opened, run, os.environ[failures.ATTEMPT]):
        return 0

    def stop() -> None:
        position.stop = True

    try:
        with watched(opened, run, stop) as lease:
            finished = work(open_run(run, store, output), position)
        if not finished:
            lease.check()
    except PeerLost as error:
        _log.warning("another worker was lost, so this one ends and is started again (%s)", error)
        return ALONE
    except Exception as error:
        _log.error("%s", error)
        with contextlib.suppress(StoreError):  # it may be the store that failed
            failures.report(opened, run, error, position.iteration)
        raise
    return 0 if finished else STOPPED


def work(space: Workspace, position: Position) -> bool:
    """Train from the last checkpoint to the end, and publish `<run>/train`. False: stopped, after a checkpoint."""
    # The workers share the cores; more threads than cores only wait for each other.
    torch.set_num_threads(whole_variable("OMP_NUM_THREADS", 1, 1024, 1))
    started = time.monotonic()
    mesh = Mesh.join(space.config.backbone.device)
    trainer = _make_trainer(space, mesh)
    _resume(space, trainer)
    with contextlib.ExitStack() as stack:
        log = None
        if mesh.leads:
            stack.enter_context(run_lock(space.folder / "train.lock"))
            log = stack.enter_context(Log.open(space, trainer))
        total = space.config.train.num_iterations
        done = trainer.iteration
        bar = stack.enter_context(progress(total, "train", "iterations", done=done, disabled=not mesh.leads))
        position.watch()
        while not trainer.finished:
            position.iteration = trainer.iteration + 1
            try:
                entry = trainer.iterate()
            except Diverged as error:
                reached = trainer.iteration
                trainer = _go_back(space, mesh, trainer, error)
                if log is not None:
                    log.go_back(trainer)
                bar.go_back(reached - trainer.iteration)
                continue
            position.stop = mesh.any(position.stop)  # all of them after the same iteration, or none
            bar.update()
            bar.note(f"reward {entry['reward_mean']:.3f}  kl {entry['kl']:.4f}  clip {entry['clip_share']:.2f}")
            if log is not None:
                log.write(entry)
                last = trainer.finished or position.stop
                if last or trainer.iteration % space.config.train.checkpoint_every == 0:
                    log.write_image(trainer.last_images(), trainer.iteration)
                    _checkpoint(space, trainer)
                    log.publish()
            if position.stop and not trainer.finished:
                return False
        if mesh.leads:
            _publish(space, trainer, time.monotonic() - started)
    return True


class Log:
    """What the leading worker reports of training: TensorBoard's files, here and in the store, and other trackers."""

    def __init__(self, space: Workspace, trackers: "Sequence[Background]") -> None:
        self._space, self._trackers = space, trackers
        self._folder, self._copies = space.folder / "tensorboard", f"tensorboard/{space.run}"

    @classmethod
    @contextlib.contextmanager
    def open(cls, space: Workspace, trainer: Trainer) -> "Iterator[Log]":
        from latentac.runs.hyperparameters import hyperparameters
        from latentac.runs.reporting.tracking import make_trackers, tracking

        trackers = make_trackers(space.config.tracking, space.folder)
        log = cls(space, trackers)
        if trainer.history and not log._folder.exists():  # another pod has trained so far
            space.store.read_files(log._copies, log._folder)
        log._open_board(trainer)
        try:
            with tracking(trackers, space.run, hyperparameters(space.config)):
                yield log
        finally:
            log._board.finish()

    def write(self, entry: Mapping[str, Any]) -> None:
        """One iteration's entry of the history."""
        for tracker in self._everywhere():
            tracker.log(entry["iteration"], of_iteration(entry))

    def write_image(self, image: np.ndarray, iteration: int) -> None:
        for tracker in self._everywhere():
            tracker.image("rollouts", iteration, image)

    def publish(self) -> None:
        """Put TensorBoard's files into the store."""
        self._board.flush()
        self._space.store.write_files(self._folder, self._copies, exact=self._board.rewritten)

    def go_back(self, trainer: Trainer) -> None:
        """Training went back to a checkpoint: what it will do again is taken out."""
        self._board.finish()
        self._open_board(trainer)

    def _everywhere(self) -> "list[Tracker]":
        return [self._board, *self._trackers]

    def _open_board(self, trainer: Trainer) -> None:
        from latentac.runs.reporting.tracking.tensorboard import TensorBoard, until

        self._board = TensorBoard(self._folder, until(trainer.iteration))
        for entry in trainer.history:  # a kill may have lost what the checkpoint has
            if entry["iteration"] not in self._board.steps:
                self._board.log(entry["iteration"], of_iteration(entry))


def _make_trainer(space: Workspace, mesh: Mesh) -> Trainer:
    policy = space.base_policy()
    pretrained = space.artifact("pretrain-value")
    with loading(f"{space.run}/pretrain-value"):  # the critic's body may begin as the backbone, before adapters
        critic = Critic.load(pretrained / "critic", policy.backbone, own=True)
        replay = Replay.load(pretrained, mesh.device)
    return new_trainer(space.config, policy, critic, space.rewards(), space.prompts.train, mesh=mesh, scored=replay)


def _go_back(space: Workspace, mesh: Mesh, trainer: Trainer, error: Diverged) -> Trainer:
    """A trainer at the last checkpoint, or at the start, that has `error` on its record; the second time, raise it.

    Every worker saw the same numbers, so all of them come here together.
    """
    if trainer.recoveries:
        raise error
    _log.warning("%s; returning to the last checkpoint, with a lower learning rate", error)
    fresh = _make_trainer(space, mesh)
    _resume(space, fresh)
    fresh.recoveries.append({"where": error.where, "problem": error.problem, "from_iteration": fresh.iteration})
    return fresh


def _prefix(space: Workspace) -> str:
    return f"checkpoints/{space.run}"


def _resume(space: Workspace, trainer: Trainer) -> None:
    """Load the newest checkpoint that is whole; one that is not is reported and passed over."""
    for key in reversed(_checkpoints(space)):
        with hidden_folder(space.folder, "train") as folder:
            try:
                manifest = space.store.fetch(key, folder / "state")
                if manifest.config_hash != space.config.hash:
                    continue
                state = read_state(folder / "state")
            except IntegrityError as error:
                _log.warning("checkpoint skipped: %s", error)
                continue
            with loading(key):
                trainer.load_state(*state)
            return


def _checkpoints(space: Workspace) -> list[str]:
    """Keys of the published checkpoints, oldest first."""
    pointer = f"{_prefix(space)}/LATEST"
    try:
        latest = checked(space.store.read_json(pointer), pointer)["key"]
    except ArtifactNotFound:
        return []
    # One beyond LATEST was cut off between its manifest and the pointer; it is as good as never written.
    return [key for key in space.store.keys(_prefix(space)) if key <= latest]


def _checkpoint(space: Workspace, trainer: Trainer) -> None:
    """Files, manifest, pointer; then drop what is older than `keep_checkpoints`."""
    key = f"{_prefix(space)}/{trainer.iteration:06d}"
    with hidden_folder(space.folder, "train") as folder:
        write_state(folder / "state", *trainer.state())
        _publish_folder(space, key, folder / "state", {"iteration": trainer.iteration})
    space.store.write_json(f"{_prefix(space)}/LATEST", {"key": key})
    for old in _checkpoints(space)[: -space.config.train.keep_checkpoints]:
        space.store.delete(old)


def _publish(space: Workspace, trainer: Trainer, seconds: float) -> None:
    """The result: policy/ (a plain diffusers folder with its model card), critic/, history.json."""
    trainer.publish_weights()
    with hidden_folder(space.folder, "train") as temporary:
        folder = temporary / "train"
        trainer.policy.backbone.save(folder / "policy")
        write_trained(space, trainer.policy, folder / "policy", trainer.history)
        trainer.critic.save(folder / "critic")
        (folder / "history.json").write_text(json.dumps(trainer.history) + "\n")
        metrics = {
            "seconds": seconds,
            "iterations": trainer.iteration,
            "last": trainer.history[-1],
            "recoveries": trainer.recoveries,
            "max_world_size": max(entry.get("world_size", 1) for entry in trainer.history),
        }
        _publish_folder(space, f"{space.run}/train", folder, metrics)


def _publish_folder(space: Workspace, key: str, folder: Path, metrics: dict[str, Any]) -> None:
    parents = [space.prepared, space.store.manifest(f"{space.run}/pretrain-value")]
    space.store.publish(
        key,
        folder,
        run=space.run,
        step="train",
        config_hash=space.config.hash,
        parents=parents,
        metrics=metrics,
        owned=True,
    )

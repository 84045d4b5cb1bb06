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
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import latentac.backbones.pipeline  # noqa: F401 - diffusers: here it counts as an import, and not as loading
from latentac.critic import Critic
from latentac.runs import failures
from latentac.runs.release.readme import write_trained
from latentac.runs.reporting.metrics import of_iteration
from latentac.runs.workers.checkpoints import Checkpoints
from latentac.runs.workers.lease import watched
from latentac.runs.workers.speed import Throughput, throughput
from latentac.runs.workspace import Workspace, open_run
from latentac.store import open_store
from latentac.system.errors import Diverged, StoreError, expected
from latentac.system.lifetime import run_lock
from latentac.system.progress import progress
from latentac.system.reading import whole_variable
from latentac.system.scratch import hidden_folder
from latentac.training.checkpoint import loading
from latentac.training.critic_learning import Replay
from latentac.training.distributed import Mesh, PeerLost, lost_peers
from latentac.training.trainer import Trainer, new_trainer

if TYPE_CHECKING:
    from latentac.runs.reporting.tracking import Background, Tracker

STOPPED = 143
"""Exit code of a worker that was asked to end and wrote its checkpoint first; the agent starts it anew or ends too."""

ALONE = 144
"""Exit code of a worker whose peer was lost; likewise."""

_GRACE, _USUAL_GRACE_SECONDS = "PET_SHUTDOWN_TIMEOUT", 30
"""torchrun's: seconds from its SIGTERM to its SIGKILL, and its default."""

_SPARE_SECONDS = 5.0
"""Of the grace period, for what a process does after its last upload."""

_log = logging.getLogger(__name__)


def main(run: str, store: str, output: str, failure: str = "", *, began: float | None = None) -> int:
    """Work, and leave an expected error for the launcher: restarting the workers would only repeat it.

    began: when the process began, by `time.monotonic`; the log says how long its start took.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _log.setLevel(logging.INFO)
    faulthandler.enable()  # a crash in native code, a reward's for example, leaves its Python stack in the log
    position = Position(graceful=not failure)
    if began is not None:
        position.began = began
    try:
        if failure:
            work(open_run(run, store, output), position)
        else:
            return _work_in_pod(run, store, output, position)
    except Exception as error:
        meant = expected(error)
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
    """Where the training stands. graceful: SIGTERM asks it to stop after the iteration; began: when the process did;
    stop: it was asked; ends_at: when it must have saved what it can then. Times are by `time.monotonic`."""

    graceful: bool
    began: float = field(default_factory=time.monotonic)
    iteration: int = 0
    stop: bool = False
    ends_at: float = math.inf
    _grace: int = _USUAL_GRACE_SECONDS

    def watch(self) -> None:
        """From here on there is something to save. Before, and on one machine, SIGTERM just ends the process."""
        if self.graceful:
            self._grace = whole_variable(_GRACE, 1, 86_400, _USUAL_GRACE_SECONDS)
            signal.signal(signal.SIGTERM, self._ask)

    def agreed(self, mesh: Mesh) -> bool:
        """Whether any worker was asked to stop, so that all of them stop after the same iteration, or none."""
        stopping = mesh.any(self.stop)
        if stopping:
            self._ask()
        return stopping

    def _ask(self, number: int = 0, frame: object = None) -> None:
        self.stop = True
        if self.ends_at == math.inf:  # a second SIGTERM gives no more time
            self.ends_at = time.monotonic() + self._grace - min(_SPARE_SECONDS, self._grace / 4)


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
    trainer, checkpoints = _resumed(space, mesh, imports=started - position.began, meeting=time.monotonic() - started)
    with contextlib.ExitStack() as stack:
        log = None
        if mesh.leads:
            stack.enter_context(run_lock(space.folder / "train.lock"))
            stack.enter_context(checkpoints)
            log = stack.enter_context(Log.open(space, trainer))
        total = space.config.train.num_iterations
        done = trainer.iteration
        bar = stack.enter_context(progress(total, "train", "iterations", done=done, disabled=not mesh.leads))
        position.watch()
        while not trainer.finished:
            position.iteration = trainer.iteration + 1
            try:
                with lost_peers():
                    entry = trainer.iterate()
            except Diverged as error:
                reached = trainer.iteration
                trainer = _go_back(space, mesh, trainer, checkpoints, error)
                if log is not None:
                    log.go_back(trainer)
                bar.go_back(reached - trainer.iteration)
                continue
            stopping = position.agreed(mesh)
            bar.update()
            speed = f"{entry['speed']['images_per_second']:.3g} images/s"
            bar.note(
                f"reward {entry['reward_mean']:.3f}  kl {entry['kl']:.4f}  clip {entry['clip_share']:.2f}  {speed}"
            )
            if log is not None:
                log.write(entry)
            if trainer.finished or stopping or trainer.iteration % space.config.train.checkpoint_every == 0:
                _save(trainer, checkpoints, log)
            if log is not None:
                checkpoints.check()
            if stopping and not trainer.finished:
                return _stop(mesh, checkpoints, position)
        return _publish(space, trainer, checkpoints, position, time.monotonic() - started)


def _note(entry: Mapping[str, Any]) -> str:
    """What the progress bar says of an iteration."""
    speed = f"{entry['speed']['images_per_second']:.3g} images/s"
    return f"reward {entry['reward_mean']:.3f}  kl {entry['kl']:.4f}  clip {entry['clip_share']:.2f}  {speed}"


def _resumed(space: Workspace, mesh: Mesh, *, imports: float, meeting: float) -> tuple[Trainer, Checkpoints]:
    """A trainer at the last checkpoint. imports, meeting: the seconds that the start has taken so far, for the log."""
    began = time.monotonic()
    trainer, checkpoints = _make_trainer(space, mesh), Checkpoints(space, mesh)
    checkpoints.resume(trainer)
    if mesh.leads:
        _log.info(
            "training starts after iteration %d, with %d worker(s): imports %.2f s, meeting %.2f s, loading %.2f s",
            trainer.iteration, mesh.size, imports, meeting, time.monotonic() - began,
        )  # fmt: skip
    return trainer, checkpoints


def _save(trainer: Trainer, checkpoints: Checkpoints, log: "Log | None") -> None:
    """Have the leading worker, which has the log, write a checkpoint; sharded weights it gets from all workers."""
    if log is not None:
        log.write_image(trainer.last_images(), trainer.iteration)
        checkpoints.save(trainer, log.copies())
    elif trainer.sharding.active:
        trainer.state()


def _stop(mesh: Mesh, checkpoints: Checkpoints, position: Position) -> bool:
    """Give the last checkpoint the rest of the grace period. Returns False, as `work` does then."""
    if mesh.leads:
        checkpoints.stop(lambda: position.ends_at)
    mesh.any(False)  # together: where one worker ends, the agent gives the others a time of its own
    return False


class Log:
    """What the leading worker reports of training: TensorBoard's files, here and in the store, and other trackers."""

    def __init__(self, space: Workspace, trackers: "Sequence[Background]", rate: Throughput | None) -> None:
        self._space, self._trackers, self._rate = space, trackers, rate
        self._folder, self._copies = space.folder / "tensorboard", f"tensorboard/{space.run}"

    @classmethod
    @contextlib.contextmanager
    def open(cls, space: Workspace, trainer: Trainer) -> "Iterator[Log]":
        from latentac.runs.hyperparameters import hyperparameters
        from latentac.runs.reporting.tracking import make_trackers, tracking

        trackers = make_trackers(space.config.tracking, space.folder)
        rate = None
        if not trainer.sharding.active:  # a forward pass of this worker alone would wait for the others
            text = trainer.conditioning.rows(torch.tensor([0]))
            rate = throughput(space.config, trainer.policy.backbone, text)
        log = cls(space, trackers, rate)
        if trainer.history and not log._folder.exists():  # another pod has trained so far
            space.store.read_files(log._copies, log._folder)
        log._open_board(trainer)
        try:
            with tracking(trackers, space.run, hyperparameters(space.config)):
                yield log
        finally:
            log._board.finish()

    def write(self, entry: Mapping[str, Any]) -> None:
        """One iteration's entry of the history, to which operations per second are added."""
        if self._rate is not None:
            self._rate.add(entry["speed"], entry["world_size"])
        for tracker in self._everywhere():
            tracker.log(entry["iteration"], of_iteration(entry))

    def write_image(self, image: np.ndarray, iteration: int) -> None:
        for tracker in self._everywhere():
            tracker.image("rollouts", iteration, image)

    def copies(self) -> Callable[[], None]:
        """What puts TensorBoard's files into the store; another thread may call it, also while they grow."""
        self._board.flush()
        return partial(self._space.store.write_files, self._folder, self._copies, exact=self._board.rewritten)

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


def _go_back(space: Workspace, mesh: Mesh, trainer: Trainer, checkpoints: Checkpoints, error: Diverged) -> Trainer:
    """A trainer at the last checkpoint, or at the start, that has `error` on its record; the second time, raise it.

    Every worker saw the same numbers, so all of them come here together.
    """
    if trainer.recoveries:
        raise error
    _log.warning("%s; returning to the last checkpoint, with a lower learning rate", error)
    checkpoints.await_store()  # both of these read from it
    fresh = _make_trainer(space, mesh)
    checkpoints.resume(fresh)
    fresh.recoveries.append({"where": error.where, "problem": error.problem, "from_iteration": fresh.iteration})
    return fresh


def _publish(space: Workspace, trainer: Trainer, checkpoints: Checkpoints, position: Position, seconds: float) -> bool:
    """The result: policy/ (a plain diffusers folder with its model card), critic/, history.json. The leading worker
    publishes it. False where training was asked to stop, and the store did not take it in time."""
    trainer.publish_weights()
    policy, critic = trainer.result(space.base_policy)
    if not trainer.mesh.leads:
        return True
    with hidden_folder(space.folder, "train") as temporary:
        folder = temporary / "train"
        policy.backbone.save(folder / "policy")
        write_trained(space, policy, folder / "policy", trainer.history)
        trainer.critic.save(folder / "critic", critic)
        (folder / "history.json").write_text(json.dumps(trainer.history) + "\n")
        metrics = {
            "seconds": seconds,
            "iterations": trainer.iteration,
            "last": trainer.history[-1],
            "recoveries": trainer.recoveries,
            "max_world_size": max(entry.get("world_size", 1) for entry in trainer.history),
        }
        return checkpoints.publish(folder, metrics, lambda: position.ends_at)

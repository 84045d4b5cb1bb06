"""One worker of the elastic training app, started by torchrun as `latentac.lifetime latentac.worker RUN STORE OUTPUT
FAILURE`, so that it never outlives the step that launched it.

All workers hold the same state and do the same updates; rank 0 alone writes checkpoints, logs and the result.
"""

import contextlib
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from latentac.algorithms import make_algorithm
from latentac.checkpoint import read_state, write_state
from latentac.critic import Critic
from latentac.distributed import Mesh
from latentac.errors import ArtifactNotFound, IntegrityError, LatentacError
from latentac.lifetime import run_lock
from latentac.progress import progress
from latentac.trainer import Trainer
from latentac.workspace import Workspace, open_run


def main(run: str, store: str, output: str, failure: str) -> int:
    """Work, and write an expected error to the file `failure`: restarting the workers would only repeat it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        work(open_run(run, store, output))
    except LatentacError as error:
        Path(failure).write_text(json.dumps(error.to_dict()))
        return error.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def work(space: Workspace) -> None:
    """Train from the last checkpoint to the end, and publish `<run>/train`."""
    torch.set_num_threads(1)  # the workers share the cores; more threads than cores only wait for each other
    torch.manual_seed(space.config.seed)  # LoRA's initial matrices; everything else draws from generator_for
    started = time.monotonic()
    mesh = Mesh.join(space.config.backbone.device)
    trainer = _make_trainer(space, mesh)
    _resume(space, trainer)
    with contextlib.ExitStack() as stack:
        log = None
        if mesh.leads:
            from latentac.metrics import TensorBoard  # slow to import, and one worker's affair

            stack.enter_context(run_lock(space.folder / "train.lock"))
            log = stack.enter_context(TensorBoard(space.folder / "tensorboard", trainer.iteration))
        total = space.config.train.num_iterations
        bar = stack.enter_context(progress(total, "train", "iterations", disabled=not mesh.leads))
        bar.update(trainer.iteration)
        while trainer.iteration < total:
            entry = trainer.iterate()
            bar.update()
            bar.note(f"reward {entry['reward_mean']:.3f}  kl {entry['kl']:.4f}  clip {entry['clip_share']:.2f}")
            if log is not None:
                log.write(entry)
                last = trainer.iteration == total
                if last or trainer.iteration % space.config.train.checkpoint_every == 0:
                    log.write_picture("rollouts", trainer.last_pictures(), trainer.iteration)
                    _checkpoint(space, trainer)
        if mesh.leads:
            _publish(space, trainer, time.monotonic() - started)


def _make_trainer(space: Workspace, mesh: Mesh) -> Trainer:
    policy = space.base_policy()
    policy.backbone.adapt(space.config.policy)
    critic = Critic.load(space.artifact("pretrain-value") / "critic", mesh.device)
    algorithm = make_algorithm(space.config)
    return Trainer(space.config, policy, critic, algorithm, space.rewards(), space.prompts.train, mesh)


def _prefix(space: Workspace) -> str:
    return f"checkpoints/{space.run}"


def _resume(space: Workspace, trainer: Trainer) -> None:
    """Load the newest checkpoint that is whole; one that is not is told and passed over."""
    for key in reversed(_checkpoints(space)):
        with tempfile.TemporaryDirectory(prefix=".train-", dir=space.folder) as folder:
            try:
                manifest = space.store.fetch(key, Path(folder) / "state")
            except IntegrityError as error:
                logging.getLogger(__name__).warning("checkpoint passed over: %s", error)
                continue
            if manifest.config_hash == space.config.hash:
                trainer.load_state(*read_state(Path(folder) / "state"))
                return


def _checkpoints(space: Workspace) -> list[str]:
    """Keys of the published checkpoints, oldest first."""
    try:
        latest = space.store.read_json(f"{_prefix(space)}/LATEST")["key"]
    except ArtifactNotFound:
        return []
    # One beyond LATEST was cut off between its manifest and the pointer; it is as good as never written.
    return [key for key in space.store.keys(_prefix(space)) if key <= latest]


def _checkpoint(space: Workspace, trainer: Trainer) -> None:
    """Files, manifest, pointer; then drop what is older than `keep_checkpoints`."""
    key = f"{_prefix(space)}/{trainer.iteration:06d}"
    with tempfile.TemporaryDirectory(prefix=".train-", dir=space.folder) as folder:
        write_state(Path(folder) / "state", *trainer.state())
        _publish_folder(space, key, Path(folder) / "state", {"iteration": trainer.iteration})
    space.store.write_json(f"{_prefix(space)}/LATEST", {"key": key})
    for old in _checkpoints(space)[: -space.config.train.keep_checkpoints]:
        space.store.delete(old)


def _publish(space: Workspace, trainer: Trainer, seconds: float) -> None:
    """The result: policy/ (a plain diffusers folder), critic/, history.json."""
    with tempfile.TemporaryDirectory(prefix=".train-", dir=space.folder) as temporary:
        folder = Path(temporary) / "train"
        trainer.policy.backbone.save(folder / "policy")
        trainer.critic.save(folder / "critic")
        (folder / "history.json").write_text(json.dumps(trainer.history) + "\n")
        metrics = {"seconds": seconds, "iterations": trainer.iteration, "last": trainer.history[-1]}
        _publish_folder(space, f"{space.run}/train", folder, metrics)


def _publish_folder(space: Workspace, key: str, folder: Path, metrics: dict[str, Any]) -> None:
    parents = [space.prepared, space.store.manifest(f"{space.run}/pretrain-value")]
    space.store.publish(
        key, folder, run=space.run, step="train", config_hash=space.config.hash, parents=parents, metrics=metrics
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""One of N workers: `python -m tests.latentac.group TASK FOLDER RUN...`, with the variables of a process group."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from latentac.backbones.precision import own_rows
from latentac.training import distributed
from latentac.training.checkpoint import read_state, write_state
from latentac.training.distributed import Mesh
from latentac.training.timing import PHASES
from latentac.training.trainer import Trainer
from tests.latentac.trainers import BODY, BRIGHTNESS, REDNESS, SHIPPED, make_trainer, same

_ANYTHING_GOES = {"divergence": {"max_kl": 1e3, "max_clip_share": 1.0}}
_CRITICS = {"lora": "frozen_taps", "full": "copy"}
RUNS = {f"{name}-{adaptation}": (name, adaptation) for name in SHIPPED for adaptation in _CRITICS}
"""Each built-in backbone with adapters and with all weights; then the critic has a backbone of its own, too."""


def make(run: str, sharding: str, mesh: Mesh, blocks: int) -> Trainer:
    """With all that has weights or a state."""
    name, adaptation = RUNS[run]
    return make_trainer(
        name,
        mesh=mesh,
        rewards=[BRIGHTNESS, REDNESS],
        policy={"adaptation": adaptation, "learning_rate": 3e-4, "warmup_updates": 0, "ema_decay": 0.9},
        critic={"replay_images": 12, "updates_per_pass": 1, "body": {"use": _CRITICS[adaptation], **BODY}},
        algorithm={"prediction_kl": 0.1, "value_gradient": 2.0},
        train={"images_per_iteration": 2 * blocks, "sharding": sharding, **_ANYTHING_GOES},
    )


def sharding(folder: Path, runs: Iterable[str], mesh: Mesh) -> None:
    """Two iterations of each run with whole and with sharded weights, into FOLDER/<run>/<sharding>: the state, and
    the bytes of rank r in <r>.json. Then the sharded trainer takes over the state of the other, whole."""
    for run in runs:
        for kind in ("none", "full"):
            trainer = make(run, kind, mesh, mesh.size + 1)
            for _ in range(2):
                check_speed(trainer.iterate()["speed"], trainer)
            place = folder / run / kind
            write_led(mesh, trainer, place)
            (place / f"{mesh.rank}.json").write_text(json.dumps(resident_bytes(trainer)))
        state = read_state(folder / run / "none")
        trainer.load_state(*state)
        found = trainer.state()
        assert not mesh.leads or (found[0].keys() == state[0].keys() and same(found[0], state[0]))
        assert found[1]["history"] == state[1]["history"]


def check_speed(speed: dict[str, Any], trainer: Trainer) -> None:
    """Each worker's seconds are known to all, and the gradients of each update are among the bytes that moved."""
    assert {name: len(each) for name, each in speed["phases"].items()} == dict.fromkeys(PHASES, trainer.mesh.size)
    assert all(seconds > 0 for each in speed["phases"].values() for seconds in each)
    assert 1 <= speed["straggler"] <= trainer.mesh.size
    if not trainer.sharding.active:
        gradients = sum(weight.nbytes for weight in trainer.policy_learner.parameters.values())
        assert speed["moved_bytes"] > trainer.config.train.updates_per_iteration * gradients


def overlap(folder: Path, runs: Iterable[str], mesh: Mesh) -> None:
    """An iteration of each run whose gradients travel after the backward pass, into FOLDER/<run>/after, and during it,
    into FOLDER/<run>/during; there <r>.json has how many buckets rank r sent before the end of each update. A third
    time, into FOLDER/<run>/repeated, memory runs out on the last rank when it has sent some of its buckets."""
    distributed.BUCKET_BYTES = 2**14
    for run in runs:
        for kind in ("after", "during", "repeated"):
            trainer = make(run, "none", mesh, mesh.size + 1)
            early = count_early(trainer, kind == "after")
            if kind == "repeated" and mesh.rank == mesh.size - 1:
                exhaust_memory(trainer)
            for _ in range(2):
                trainer.iterate()
            place = folder / run / kind / str(mesh.rank)
            write_state(place, *trainer.state())
            (place / "early.json").write_text(json.dumps([early, trainer.policy.rows.limit]))


def lose(folder: Path, runs: Iterable[str], mesh: Mesh) -> None:
    """The last rank ends without a word in the middle of a rollout; the others write FOLDER/<run>-<rank> when they
    know it as a lost peer."""
    for run in runs:
        trainer = make(run, "full", mesh, mesh.size + 1)
        if mesh.rank == mesh.size - 1:
            trainer.policy.backbone.module.register_forward_hook(lambda *_: os._exit(0))
        try:
            with distributed.lost_peers():
                trainer.iterate()
        except distributed.PeerLost as error:
            (folder / f"{run}-{mesh.rank}").write_text(str(error))
            os._exit(0)  # there is nobody left to take leave of


def count_early(trainer: Trainer, after: bool) -> list[int]:
    """For each update to come: how many buckets were sent before its end. after: none are, as in the critic's."""
    learner, early = trainer.policy_learner, list[int]()
    total, finish = learner._sum, learner._sum.finish

    def counting() -> None:
        early.append(len(total._sent))
        if after:
            trainer.mesh.sum_gradients(list(learner.parameters.values()))
        else:
            finish()

    total.active, total.finish = not after, counting  # type: ignore[method-assign]
    return early


def exhaust_memory(trainer: Trainer) -> None:
    """Once, in the last backward pass of an update, when three buckets are on their way."""
    learner = trainer.policy_learner
    trainer.policy.rows.limit = 2

    def fail(weight: Tensor) -> None:
        if len(learner._sum._sent) == 3 and trainer.policy.rows.limit == 2:
            raise torch.OutOfMemoryError("not enough memory")

    for weight, _ in learner._masters.pairs:
        weight.register_post_accumulate_grad_hook(fail)


def resident_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of the memory that this process has for weights of policy, reference and the critic's backbone; for the
    optimizers' state; and for the EMA."""
    learner, reference = trainer.policy_learner, trainer.policy_learner._reference
    modules = [trainer.policy.backbone.module, *([reference.backbone.module] if reference else [])]
    modules += [trainer.critic.body.backbone] if hasattr(trainer.critic.body, "backbone") else []
    assert trainer.learner is not None
    return {
        "weights": allocated([*(own_rows(p.detach()) for module in modules for p in module.parameters())]),
        "policy_optimizer": allocated(state(learner.optimizer)),
        "critic_optimizer": allocated(state(trainer.learner.optimizer)),
        "ema": allocated(learner.ema.values()),
    }


def state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for moments in optimizer.state.values() for tensor in moments.values()]


def allocated(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def write_led(mesh: Mesh, trainer: Trainer, place: Path) -> None:
    """All workers together; the leading one writes."""
    state = trainer.state()
    place.mkdir(parents=True, exist_ok=True)
    if mesh.leads:
        write_state(place, *state)
    mesh.any(False)


def main(task: str, folder: Path, runs: list[str]) -> None:
    torch.set_num_threads(1)
    mesh = Mesh.join("cpu")
    {"sharding": sharding, "overlap": overlap, "lose": lose}[task](folder, runs, mesh)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

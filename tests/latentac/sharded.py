"""One of N workers: `python -m tests.latentac.sharded FOLDER` does `RUNS` with whole and with sharded weights."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from latentac.training.checkpoint import write_state
from latentac.training.distributed import Mesh
from latentac.training.trainer import Trainer
from tests.latentac.trainers import BODY, BRIGHTNESS, REDNESS, SHIPPED, make_trainer

_CRITICS = {"lora": "frozen_taps", "full": "copy"}
RUNS = {f"{name}-{adaptation}": (name, adaptation) for name in SHIPPED for adaptation in _CRITICS}
"""Each built-in backbone with adapters and with all weights."""


def make(name: str, adaptation: str, sharding: str, mesh: Mesh) -> Trainer:
    """With all that has weights or a state; five blocks, which neither two nor four workers share evenly."""
    return make_trainer(
        name,
        mesh=mesh,
        rewards=[BRIGHTNESS, REDNESS],
        policy={"adaptation": adaptation, "learning_rate": 3e-4, "warmup_updates": 0, "ema_decay": 0.9},
        critic={"replay_images": 12, "body": {"use": _CRITICS[adaptation], **BODY}},
        algorithm={"prediction_kl": 0.1, "value_gradient": 2.0},
        train={
            "images_per_iteration": 10,
            "sharding": sharding,
            "divergence": {"max_kl": 1e3, "max_clip_share": 1.0},
        },
    )


def main(folder: Path, chosen: list[str]) -> None:
    torch.set_num_threads(1)
    mesh = Mesh.join("cpu")
    for run in chosen or RUNS:
        for sharding in ("none", "full"):
            trainer = make(*RUNS[run], sharding, mesh)
            for _ in range(2):
                trainer.iterate()
            state: tuple[dict[str, Any], dict[str, Any]] = trainer.state()
            if mesh.leads:
                write_state(folder / run / sharding, *state)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

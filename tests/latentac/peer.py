"""One of two workers: `python -m tests.latentac.peer FOLDER` does RUNS with its peer, into FOLDER/<run>/<rank>."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed

from latentac.training.checkpoint import write_state
from latentac.training.distributed import Mesh
from latentac.training.trainer import Trainer
from tests.latentac.trainers import BRIGHTNESS, REDNESS, make_trainer

_BOLD = {"learning_rate": 3e-4, "warmup_updates": 0}
_ANYTHING_GOES = {"divergence": {"max_kl": 1e3, "max_clip_share": 1.0}}
RUNS: dict[str, dict[str, Any]] = {
    "ppo": {
        "rewards": [
            BRIGHTNESS,
            REDNESS,
        ],
        "critic": {"replay_images": 12},
        "policy": {**_BOLD, "ema_decay": 0.9},
        "algorithm": {"prediction_kl": 0.1, "value_gradient": 2.0},
        "train": _ANYTHING_GOES,
    },
    "uneven": {
        "rewards": [BRIGHTNESS, REDNESS],
        "critic": {"replay_images": 12},
        "policy": _BOLD,
        "algorithm": {"value_gradient": 2.0},
        "train": {**_ANYTHING_GOES, "images_per_iteration": 6},  # three blocks
    },
    "grpo": {"algorithm": {"use": "grpo", "group_size": 2}, "policy": _BOLD, "train": _ANYTHING_GOES},
    "ddpo": {
        "algorithm": {"use": "ddpo", "baseline": "prompt", "prompt_min_count": 1},
        "policy": _BOLD,
        "train": _ANYTHING_GOES,
    },
}


def do_run(name: str, mesh: Mesh) -> Trainer:
    """Two iterations."""
    trainer = make_trainer(mesh=mesh, **RUNS[name])
    for _ in range(2):
        trainer.iterate()
    return trainer


def main(folder: Path) -> None:
    mesh = Mesh.join("cpu")
    for name in RUNS:
        write_state(folder / name / str(mesh.rank), *do_run(name, mesh).state())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

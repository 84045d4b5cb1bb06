"""A prepared run and its training worker in this very process: a real store, real checkpoints, a group of one."""

import json
import socket
from contextlib import closing
from pathlib import Path

import pytest

from latentac.runs.steps import prepare, pretrain_value
from latentac.runs.workers.worker import main
from latentac.runs.workspace import Workspace, open_run

RUN = "some-run"
_PROMPTS = {
    "train": [{"text": text} for text in ("a red circle", "two blue squares", "a green triangle", "a cyan circle")],
    "held_out": [{"text": "a red square"}, {"text": "two blue circles"}],
}
SMALL = [
    "kernel.num_steps=2",
    "critic.body.width=32",
    "critic.body.num_queries=1",
    "pretrain={num_images: 8, num_held_out_images: 8, num_passes: 1, minibatch_states: 8}",
    "train={num_iterations: 2, images_per_iteration: 4, block_images: 2, updates_per_iteration: 2, num_workers: 1}",
    "backbone.device=cpu",
    "rewards=[{use: jpeg_compressibility}]",  # never the same for two images, so there is always something to learn
    "gate.reward=jpeg_compressibility",
]


def prepared(folder: Path, *overrides: str, store: str = "") -> Workspace:
    """A run of the smallest size with its critic pretrained; `overrides` are laid upon that."""
    (folder / "prompts.json").write_text(json.dumps(_PROMPTS))
    settings = [*SMALL, f"prompts.source={folder / 'prompts.json'}", *overrides]
    prepare(RUN, store, str(folder), "shapes-unet-smoke", overrides=settings)
    pretrain_value(RUN, store, str(folder))
    return open_run(RUN, store, str(folder))


def train_here(folder: Path, patch: pytest.MonkeyPatch, store: str = "") -> tuple[int, str]:
    """The worker's exit code, and the message that it left for the launcher."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        patch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        patch.setenv(name, value)
    failure = folder / "failure.json"
    failure.unlink(missing_ok=True)
    code = main(RUN, store, str(folder), str(failure))
    return code, failure.read_text() if failure.exists() else ""


def trained_weights(space: Workspace) -> dict[str, str]:
    """sha256 of each file of weights that training has published."""
    manifest = space.finished("train")
    assert manifest is not None
    return {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")}

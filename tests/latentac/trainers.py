"""Small training runs on each shipped pipeline, for the tests of the loop, the critic and the algorithms."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentac.algorithms import make_algorithm
from latentac.backbones import BACKBONES, Denoiser, load_backbone
from latentac.config import Config, resolve
from latentac.diffusion import KERNELS
from latentac.distributed import Mesh
from latentac.fields import merge
from latentac.policy import Policy
from latentac.pretraining import new_critic
from latentac.prompts import Prompt, load_prompts
from latentac.rewards import Reward
from latentac.shapes import PIPELINES, builtin_pipeline
from latentac.trainer import Trainer

CPU = torch.device("cpu")
SHIPPED = [name for name in BACKBONES if f"shapes-{name}" in PIPELINES]
PATHS = {"unet": "variance_preserving", "dit": "flow"}
PAIRS = [(name, kernel) for name in SHIPPED for kernel in KERNELS if KERNELS[kernel].path == PATHS[name]]
"""Every shipped backbone with every kernel that samples it."""
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square", "a cyan circle and a red square"]


@functools.cache
def shipped(name: str) -> Denoiser:
    """The backbone with the weights of its built-in pipeline, loaded once, frozen: train a `clone`."""
    torch.set_num_threads(1)
    return load_backbone(name, builtin_pipeline(f"shapes-{name}"), CPU)


class Brightness:
    """A smooth reward that any policy can raise."""

    name, unit = "brightness", "grey levels"

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        return np.zeros((1, 2, 2, 3), np.uint8), [""], np.zeros(1, np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        means: np.ndarray = images.mean((1, 2, 3)).astype(np.float32)
        return means


class Redness(Brightness):
    """Another one, on a scale a thousand times smaller."""

    name, unit = "redness", "thousandth of a grey level"

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        means: np.ndarray = (images[..., 0].mean((1, 2)) / 1000).astype(np.float32)
        return means


@functools.cache
def prompts() -> tuple[Prompt, ...]:
    """A few of each category."""
    return load_prompts("builtin:shapes").train[::40]


def make_config(backbone: str = SHIPPED[0], **sections: Any) -> Config:
    """Two blocks of two images, three steps, two updates, one worker; `sections` are laid upon that."""
    fields = {
        "recipe": "test",
        "backbone": {"name": backbone, "source": f"builtin:shapes-{backbone}", "device": "cpu"},
        "kernel": {"name": dict(PAIRS)[backbone], "noise": 0.7, "num_steps": 3},
        "prompts": {"source": "builtin:shapes"},
        "rewards": [{"name": "brightness"}],
        "gate": {"reward": "brightness"},
        "critic": {
            "width": 32,
            "num_heads": 2,
            "num_queries": 1,
            "lora_rank": 4,
            "lora_alpha": 8,
            "num_passes": 1,
            "updates_per_pass": 2,
        },
        "policy": {"lora_rank": 4, "lora_alpha": 8},
        "train": {"images_per_iteration": 4, "block_images": 2, "updates_per_iteration": 2, "num_workers": 1},
    }
    return resolve(merge(fields, sections))


def make_trainer(
    backbone: str = SHIPPED[0], scorers: Sequence[Reward] = (), mesh: Mesh | None = None, **sections: Any
) -> Trainer:
    """A trainer as a worker makes one, on a copy of the shipped weights. scorers: instead of the rewards by name."""
    config = make_config(backbone, **sections)
    torch.manual_seed(config.seed)
    policy = Policy(shipped(backbone).clone(), KERNELS[config.kernel.name](config.kernel.noise))
    critic = new_critic(config, policy)
    policy.backbone.adapt(config.policy)
    known = {reward.name: reward for reward in (Brightness(), Redness())}
    used = scorers or [known[name] for name in config.reward_names]
    return Trainer(config, policy, critic, make_algorithm(config), used, prompts(), mesh or Mesh(0, 1, CPU))


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of everything that the next iteration depends on."""
    return {name: tensor.detach().clone() for name, tensor in trainer.state()[0].items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor], prefix: str = "") -> bool:
    """Whether the entries of `first` below `prefix`, of which there are some, are bitwise those of `second`."""
    names = [name for name in first if name.startswith(prefix)]
    return bool(names) and all(torch.equal(first[name], second[name]) for name in names)

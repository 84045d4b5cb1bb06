"""Small training runs on each shipped pipeline, for the tests of the loop, the critic and the algorithms."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentac.backbones import BACKBONES, Denoiser, load_backbone
from latentac.config.fields import merge
from latentac.config.schema import Config
from latentac.config.schema import Reward as RewardSettings
from latentac.config.sections import Extension
from latentac.config.validation import resolve
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import configured_policy
from latentac.training.algorithms import ALGORITHMS, Algorithm
from latentac.training.distributed import Mesh
from latentac.training.policy_learning import Block, CreditedBlock
from latentac.training.trainer import Trainer
from latentac.training.value_pretraining import new_critic
from latentac.worlds.builtin import PIPELINES, builtin_pipeline
from latentac.worlds.prompts import Prompt, load_prompts

CPU = torch.device("cpu")
TRAINERS = "tests.latentac.trainers"
BRIGHTNESS = {"use": f"{TRAINERS}:Brightness", "name": "brightness"}
REDNESS = {"use": f"{TRAINERS}:Redness", "name": "redness"}
"""As a configuration lists the two rewards below."""
SHIPPED = [name for name in BACKBONES if f"shapes-{name}" in PIPELINES]
PATHS = {"unet": "variance_preserving", "dit": "flow"}
PAIRS = [(name, kernel) for name in SHIPPED for kernel in KERNELS if KERNELS.load(kernel).path == PATHS[name]]
"""Every shipped backbone with every kernel that samples it."""
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square", "a cyan circle and a red square"]


@functools.cache
def shipped(name: str) -> Denoiser:
    """The backbone with the weights of its built-in pipeline, loaded once, frozen: train a `clone`."""
    torch.set_num_threads(1)
    return load_backbone(Extension(use=name), builtin_pipeline(f"shapes-{name}"), CPU)


class Brightness:
    """A smooth reward that any policy can raise."""

    unit = "grey levels"

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        return np.zeros((1, 2, 2, 3), np.uint8), [""], np.zeros(1, np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        means: np.ndarray = images.mean((1, 2, 3)).astype(np.float32)
        return means


class Redness(Brightness):
    """Another one, on a scale a thousand times smaller."""

    unit = "thousandth of a grey level"

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        means: np.ndarray = (images[..., 0].mean((1, 2)) / 1000).astype(np.float32)
        return means


BODY = {"width": 32, "num_heads": 2, "num_queries": 1}
"""Settings of a small critic body."""


def configured(reward: object, **fields: Any) -> ConfiguredReward:
    """A reward that is there already, under its class's name in small letters."""
    name = type(reward).__name__.lower()
    return ConfiguredReward(RewardSettings.model_validate({"use": "x:X", "name": name, **fields}), reward)


def algorithm_of(config: Config) -> Algorithm:
    """As a worker makes it."""
    weights = torch.tensor([reward.weight for reward in config.rewards])
    made: Algorithm = ALGORITHMS.make(config.algorithm, weights)
    return made


@functools.cache
def prompts() -> tuple[Prompt, ...]:
    """A few of each category."""
    return load_prompts("builtin:shapes").train[::40]


def make_config(backbone: str = SHIPPED[0], **sections: Any) -> Config:
    """Two blocks of two images, three steps, two updates, one worker; `sections` are laid upon that."""
    fields = {
        "recipe": "test",
        "backbone": {"use": backbone, "source": f"builtin:shapes-{backbone}", "device": "cpu"},
        "kernel": {"use": dict(PAIRS)[backbone], "noise": 0.7, "num_steps": 3},
        "prompts": {"source": "builtin:shapes"},
        "rewards": [BRIGHTNESS],
        "gate": {"reward": "brightness"},
        "algorithm": {"use": "ppo"},
        "critic": {
            "body": {"use": "frozen_taps", **BODY},
            "hidden": 64,
            "num_passes": 1,
            "updates_per_pass": 2,
        },
        "policy": {"lora_rank": 4, "lora_alpha": 8},
        "train": {"images_per_iteration": 4, "block_images": 2, "updates_per_iteration": 2, "num_workers": 1},
    }
    return resolve(merge(fields, sections))


def rolled_out(trainer: Trainer, index: int) -> Block:
    """Block `index` of the next iteration, scored."""
    return trainer._score(trainer._roll_out(index))


def credited(block: Block, advantage: float = 0.0) -> CreditedBlock:
    """`block` with this advantage at each step, and nothing for a critic to learn."""
    return with_advantages(block, torch.full_like(block.trajectory.log_probs, advantage))


def with_advantages(block: Block, advantages: Tensor) -> CreditedBlock:
    """`block` with these advantages, [B, S], and nothing for a critic to learn."""
    made = (block.index, block.trajectory, block.prompts, block.rewards)
    return CreditedBlock(*made, advantages, None, advantages != 0)


def make_trainer(
    name: str = SHIPPED[0],
    scorers: Sequence[ConfiguredReward] = (),
    mesh: Mesh | None = None,
    backbone: Any = None,
    **sections: Any,
) -> Trainer:
    """A trainer as a worker makes one. backbone: a copy of the shipped weights if None. scorers: instead of the rewards
    by name."""
    config = make_config(name, **sections)
    torch.manual_seed(config.seed)
    policy = configured_policy(config, shipped(name).clone() if backbone is None else backbone)
    critic = new_critic(config, policy)
    policy.backbone.adapt(config.policy)
    used = scorers or load_rewards(config.rewards)
    return Trainer(config, policy, critic, algorithm_of(config), used, prompts(), mesh=mesh or Mesh.single(CPU))


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of everything that the next iteration depends on."""
    return {name: tensor.detach().clone() for name, tensor in trainer.state()[0].items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor], prefix: str = "") -> bool:
    """Whether the entries of `first` below `prefix`, of which there are some, are bitwise those of `second`."""
    names = [name for name in first if name.startswith(prefix)]
    return bool(names) and all(torch.equal(first[name], second[name]) for name in names)

"""latentac's own iteration on a written pipeline, built from the library's public pieces as `Experiment` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.flops import clock
from benchmarks.gpu.models import PROMPTS, Model
from benchmarks.gpu.turns import Turn
from latentac.config.learning import DivergenceCheck, Train
from latentac.config.schema import Config
from latentac.method.diffusion import num_stochastic_steps
from latentac.rewards.configured import load_rewards
from latentac.runs.configuration import load_config
from latentac.training.distributed import Mesh
from latentac.training.experiment import load_policy
from latentac.training.trainer import new_trainer
from latentac.training.value_pretraining import new_critic
from latentac.worlds.prompts import load_prompts

REWARD = "jpeg_compressibility"
_LORA_RATE = 3.0
_WATCHED = ("first_ratio_deviation", "gradient_below_eps")


@dataclass(frozen=True)
class Arm:
    """What an arm of latentac trains, and how. own: overrides over its configuration."""

    model: Model
    folder: Path
    adaptation: str
    algorithm: str
    device: torch.device
    own: Sequence[str]


def configuration(arm: Arm, rows: int) -> Config:
    """The configuration of an arm. rows: images that go through the network together.

    The bounds of the divergence check are lifted: random weights are no policy that could be protected.
    """
    model, adaptation, algorithm = arm.model, arm.adaptation, arm.algorithm
    rate = model.rate * (_LORA_RATE if adaptation == "lora" else 1.0)
    settings = [
        f"backbone.source={arm.folder}",
        f"backbone.device={arm.device.type}",
        f"backbone.image_size=[{model.size}, {model.size}]",
        f"kernel={{use: {model.kernel}, noise: {model.noise}, num_steps: {model.steps}}}",
        f"prompts.source={arm.folder.parent / PROMPTS}",
        f"rewards=[{{use: {REWARD}, weight: 1.0}}]",
        f"gate.reward={REWARD}",
        f"policy.adaptation={adaptation}",
        f"policy.learning_rate={rate:g}",
        f"algorithm.use={algorithm}",
        f"algorithm.clip={model.clip}",
        *(["algorithm.value_gradient=0"] if algorithm == "ppo" else []),
        "critic.replay_images=0",
        f"train.images_per_iteration={model.rows * model.blocks}",
        f"train.updates_per_iteration={model.updates}",
        f"train.block_images={rows}",
        *([f"train.micro_images={rows}"] if "micro_images" in Train.model_fields else []),
        "train.num_workers=1",
        *(
            f"train.divergence.{name}={1 if name == 'max_clip_share' else 1e9}"
            for name in DivergenceCheck.model_fields
            if "max" in name
        ),
        f"serving.batch_rows={rows}",
        f"serving.max_images={rows}",
    ]
    return load_config(model.recipe, [*settings, *arm.own])


class Ours:
    """A trainer at work. trained: transitions per image that it trains on."""

    def __init__(self, config: Config) -> None:
        self.rows, self.images = config.train.block_images, config.train.images_per_iteration
        policy = load_policy(config)
        self._device = policy.backbone.device
        critic = new_critic(config, policy)
        prompts = load_prompts(config.prompts)
        self._trainer = new_trainer(
            config, policy, critic, load_rewards(config.rewards), prompts.train, mesh=Mesh.single(self._device)
        )
        self.trained = num_stochastic_steps(policy.kernel, policy.backbone.schedule(config.kernel.num_steps))

    def iterate(self) -> Turn:
        began = clock(self._device)
        entry = self._trainer.iterate()
        seconds = clock(self._device) - began
        watched = {name: entry.get(name) for name in _WATCHED}
        return Turn(self.images, seconds, entry["rollout_seconds"], watched)

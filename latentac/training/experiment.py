"""Value pretraining, training, steering and evaluation in one process, for scripts and notebooks.

The steps of a run (`latentac.runs.steps`) call the same functions, with artifacts in a store, several workers and
resume.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentac.backbones import layout_of, load_backbone
from latentac.backbones.source import locate
from latentac.config.schema import Config
from latentac.config.schema import Reward as RewardSettings
from latentac.config.sections import Named
from latentac.evaluation.held_out import Sampling, sample
from latentac.evaluation.measures import intervals
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.sampling.devices import few_threads, pick_device
from latentac.sampling.policy import Policy, configured_policy
from latentac.sampling.steering import STEERING, Steering
from latentac.store.sources import with_local_files
from latentac.system.errors import ConfigError, Problem
from latentac.system.progress import progress
from latentac.training import value_pretraining
from latentac.training.critic_learning import Replay
from latentac.training.distributed import Mesh
from latentac.training.trainer import Trainer, new_trainer
from latentac.worlds.prompts import Prompt, PromptSet, balanced, load_prompts


class Experiment:
    """One configuration with its model, critic, rewards and prompts.

    policy: the diffusion model; `train` changes it in place. critic: one value head per reward.
    config: as `load_config` returns it.
    rewards: name -> callable, in place of the configured rewards. A callable takes images, uint8 [B, H, W, 3], and B
        prompts, and returns one finite number per image, higher is better (`latentac.Reward`).
    weights: name -> weight of that reward in training; 1.0 where a name is missing. 0.0 only measures it.
    prompts: in place of the configured prompts. Only `prompts.train` is trained on, only `prompts.held_out` evaluated.

    Raises ConfigError for a configuration, model or prompt file that cannot be used, and RewardError for a reward that
    cannot be built.
    """

    def __init__(
        self,
        config: Config,
        *,
        rewards: Mapping[str, Callable[..., Any]] | None = None,
        weights: Mapping[str, float] | None = None,
        prompts: PromptSet | None = None,
    ) -> None:
        self.config = config if rewards is None else _with_rewards(config, rewards, weights or {})
        self.rewards = (
            load_rewards(config.rewards)
            if rewards is None
            else [ConfiguredReward(one, rewards[one.name]) for one in self.config.rewards]
        )
        self.prompts = prompts if prompts is not None else load_prompts(with_local_files(config.prompts))
        self.policy = load_policy(config)
        self.critic = value_pretraining.new_critic(self.config, self.policy)
        self.history: list[dict[str, Any]] = []
        """One entry per iteration of `train`: rewards, KL, clip share, losses, seconds."""
        self._scored: Replay | None = None
        self._trainer: Trainer | None = None
        self._last: dict[str, torch.Tensor] = {}

    def pretrain(self) -> list[dict[str, Any]]:
        """Fit the critic to rollouts of the untrained policy. Returns one entry per pass: its loss, and the explained
        variance of each denoising step on held-out prompts. Raises ValueError after `train` has begun."""
        if self._trainer is not None:
            raise ValueError("pretrain() must come before train(): value pretraining needs the untrained policy")
        with few_threads():
            passes, self._scored = value_pretraining.pretrain(
                self.config, self.policy, self.critic, self.rewards, self.prompts
            )
        return passes

    def train(self, iterations: int | None = None) -> list[dict[str, Any]]:
        """Train policy and critic for `iterations` more, or up to `train.num_iterations`. Returns `history`.

        The policy then has the weights that a run would publish: the last ones, their average (`policy.ema_decay`), or
        the best ones (`train.early_stopping`). A further call goes on from the last weights.

        Raises Diverged where an update is not finite or beyond a bound of `train.divergence`, RewardError for a reward
        that fails. The policy then holds the weights of the last update.
        """
        if self._trainer is None:
            mesh = Mesh.single(self.policy.backbone.device)
            self._trainer = new_trainer(
                self.config, self.policy, self.critic, self.rewards, self.prompts.train, mesh=mesh, scored=self._scored
            )
        trainer = self._trainer
        if self._last:
            trainer.policy_learner.load(self._last)
        left = self.config.train.num_iterations - trainer.iteration
        with few_threads(), progress(left if iterations is None else iterations, "train", "iterations") as bar:
            while not trainer.finished if iterations is None else iterations > 0:
                entry = trainer.iterate()
                self.history = trainer.history
                iterations = None if iterations is None else iterations - 1
                bar.update()
                bar.note(f"reward {entry['reward_mean']:.3f}  kl {entry['kl']:.4f}")
        if trainer.finished:
            self._last = trainer.policy_learner.copy()
            trainer.publish_weights()
        return self.history

    def steering(
        self,
        method: str = "value_gradient",
        *,
        strength: float = 1.0,
        particles: int = 1,
        weights: Mapping[str, float] | None = None,
    ) -> Steering:
        """A steering method, for `evaluate` and `sample`.

        method: a name in `steering.methods` of the configuration, or a row of `STEERING`.
        weights: the steering weight of each reward, in standard deviations of it; by default the rewards' training
            weights.
        strength: multiplies the weights. particles: rollouts per image.

        Raises ConfigError for an unknown method or reward.
        """
        used = weights or {reward.name: reward.weight for reward in self.config.rewards}
        _check_rewards(used, self.config.reward_names)
        known = {one.name: one for one in self.config.steering.methods}
        row = known.get(method) or Named(use=method)
        vector = torch.tensor([strength * used.get(name, 0.0) for name in self.config.reward_names])
        made: Steering = STEERING.make(row, vector, particles, path="steering.methods")
        return made

    def evaluate(self, *, steering: Steering | str | None = None, num_images: int | None = None) -> dict[str, Any]:
        """Score images of held-out prompts, sampled with the present policy.

        steering: as `steering` returns it, or a method's name. num_images: by default `evaluation.num_images`.

        Returns reward name -> {mean, low, high, n}: the mean over n images and its 95 % bootstrap interval. Prompts and
        noise are the same at each call, so that two results can be compared image by image.
        """
        count = num_images or self.config.evaluation.num_images
        chosen = balanced(self.prompts.held_out, count, self.config.seed, "evaluation")
        prompts = [self.prompts.held_out[index] for index in chosen]
        with progress(count, "evaluate", "images") as bar:
            steered, sampling = self._steering(steering), Sampling.of(self.config)
            arm = sample(self.policy, self.critic, self.rewards, prompts, sampling, steering=steered, bar=bar)
        return intervals(arm.scores, self.config.evaluation.num_bootstrap, self.config.seed)

    def sample(self, prompts: Sequence[str], *, seed: int = 0, steering: Steering | str | None = None) -> np.ndarray:
        """One image per prompt, uint8 [B, H, W, 3]. The noise of image i depends on `seed` and i alone.

        steering: as for `evaluate`.
        """
        sampling = replace(Sampling.of(self.config), seed=seed)
        shown, steered = [Prompt(text) for text in prompts], self._steering(steering)
        return sample(self.policy, self.critic, [], shown, sampling, steering=steered).images

    def _steering(self, given: Steering | str | None) -> Steering | None:
        return self.steering(given) if isinstance(given, str) else given

    def save(self, folder: str | Path) -> None:
        """Write `policy/`, a diffusers pipeline folder, and `critic/` below `folder`. Weights are safetensors."""
        self.policy.backbone.save(Path(folder) / "policy")
        self.critic.save(Path(folder) / "critic")


def load_policy(config: Config) -> Policy:
    """The pretrained diffusion model with its sampler. `backbone.source` is fetched from the hub where it names a model
    there. Raises ConfigError for a model that cannot be used."""
    settings = config.backbone
    folder, _ = locate(settings.source, layout_of(settings), settings.revision)
    return configured_policy(config, load_backbone(settings, folder, pick_device(settings.device)))


def _with_rewards(config: Config, rewards: Mapping[str, Callable[..., Any]], weights: Mapping[str, float]) -> Config:
    """`config` with these rewards in place of its own; the gate judges the first one."""
    _check_rewards(weights, list(rewards))
    rows = [
        RewardSettings(use=f"{type(one).__module__}:{type(one).__qualname__}", name=name, weight=weights.get(name, 1.0))
        for name, one in rewards.items()
    ]
    gate = config.gate.model_copy(update={"reward": rows[0].name})
    return config.model_copy(update={"rewards": rows, "gate": gate})


def _check_rewards(weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises ConfigError for a weight of a reward that there is not."""
    remedy = f"Choose one of {', '.join(names)}."
    problems = [
        Problem("weights", name, "is not a reward of this experiment", remedy) for name in set(weights) - set(names)
    ]
    if problems:
        raise ConfigError(problems)

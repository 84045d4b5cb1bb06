"""The only training loop: roll out, score, credit, update.

Images come in blocks, the unit of work. Blocks are dealt to the workers and a block's transitions are split among the
updates, so an update sums the same transitions in the same blocks whatever the number of workers.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentac.algorithms import Algorithm
from latentac.checkpoint import optimizer_tensors, restore_optimizer
from latentac.config import Config
from latentac.critic import Critic
from latentac.distributed import Mesh, generator_for, noise_for, seed_for
from latentac.errors import TrainingError
from latentac.evaluation import contact_sheet
from latentac.losses import value_loss
from latentac.policy import Policy
from latentac.prompts import Prompt, balanced
from latentac.returns import explained_variance
from latentac.rewards import Reward
from latentac.rollout import rollout, score
from latentac.types import Minibatch, Trajectory, flatten_steps


@dataclass
class Block:
    """One block's rollout and what an iteration finds out about it.

    taps: name -> [B, K, c, h, w]; rewards: [B, M]; advantages: [B, S]; returns: [B, K, M], the value targets.
    """

    index: int
    trajectory: Trajectory
    taps: dict[str, Tensor]
    rewards: Tensor
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    returns: Tensor = field(default_factory=lambda: torch.empty(0))


class Trainer:
    """Actor and critic, their optimizers, and the iterations that improve them. The same on every worker."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        critic: Critic,
        algorithm: Algorithm,
        rewards: Sequence[Reward],
        prompts: Sequence[Prompt],
        mesh: Mesh,
    ) -> None:
        self.config, self.policy, self.critic, self.algorithm = config, policy, critic, algorithm
        self.rewards, self.prompts, self.mesh = rewards, prompts, mesh
        self.conditioning = policy.backbone.encode([prompt.text for prompt in prompts])
        self.actor_parameters = {n: p for n, p in policy.backbone.module.named_parameters() if p.requires_grad}
        critic.eval().requires_grad_(True)
        actor, value = config.policy, config.critic
        self.actor_optimizer = torch.optim.AdamW(
            self.actor_parameters.values(), actor.learning_rate, (0.9, 0.95), weight_decay=actor.weight_decay
        )
        self.critic_optimizer = torch.optim.AdamW(
            critic.parameters(), value.learning_rate, (0.9, 0.95), weight_decay=value.weight_decay
        )
        self.history: list[dict[str, Any]] = []
        self._last_clean: Tensor | None = None

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return len(self.history)

    def iterate(self) -> dict[str, Any]:
        """One iteration: rollouts of the present policy, then its updates. Returns its entry in the history."""
        started = time.monotonic()
        blocks = [self._roll_out(index) for index in self.mesh.own(self._num_blocks)]
        rolled_out = time.monotonic()
        self._last_clean = blocks[0].trajectory.clean
        rewards, values = self._credit(blocks)
        metrics = [self._update_actor(blocks, update) for update in range(self.config.train.updates_per_iteration)]
        means = {name: sum(entry[name] for entry in metrics) / len(metrics) for name in metrics[0]}
        value_losses = [self._update_critic(blocks, number) for number in range(self.config.critic.num_passes)]
        main = next(index for index, reward in enumerate(self.config.rewards) if reward.weight > 0)
        entry = {
            "iteration": self.iteration + 1,
            "images": (self.iteration + 1) * self.config.train.images_per_iteration,
            "rewards": {name: float(rewards[:, m].mean()) for m, name in enumerate(self.config.reward_names)},
            "reward_mean": float(rewards[:, main].mean()),
            **means,
            "value_loss": value_losses[-1],
            "first_ratio_deviation": metrics[0]["ratio_deviation"],
            "explained_variance": explained_variance(values[..., main], rewards[:, main]).tolist(),
            "world_size": self.mesh.size,
            "rollout_seconds": rolled_out - started,
            "seconds": time.monotonic() - started,
        }
        self.history.append(entry)
        return entry

    def last_pictures(self, count: int = 32) -> np.ndarray:
        """A contact sheet, uint8 [H, W, 3], of the first pictures of the last iteration on this worker."""
        if self._last_clean is None:
            raise ValueError("no iteration was done yet")
        return np.asarray(contact_sheet(self.policy.backbone.decode(self._last_clean[:count]), 8))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next iteration depends on."""
        tensors: dict[str, Tensor] = {f"actor.{name}": parameter for name, parameter in self.actor_parameters.items()}
        tensors |= {f"critic.{name}": tensor for name, tensor in self.critic.state_dict().items()}
        tensors |= optimizer_tensors(self.actor_optimizer, "actor_optimizer")
        tensors |= optimizer_tensors(self.critic_optimizer, "critic_optimizer")
        return tensors, {"history": self.history}

    def load_state(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        with torch.no_grad():
            for name, parameter in self.actor_parameters.items():
                parameter.copy_(tensors[f"actor.{name}"])
        prefix = "critic."
        self.critic.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        restore_optimizer(self.actor_optimizer, "actor_optimizer", tensors)
        restore_optimizer(self.critic_optimizer, "critic_optimizer", tensors)
        self.history = list(progress["history"])

    @property
    def _num_blocks(self) -> int:
        return self.config.train.images_per_iteration // self.config.train.block_images

    def _roll_out(self, index: int) -> Block:
        """Block `index` of this iteration: G consecutive rollouts of each of its prompts."""
        config, train, group = self.config, self.config.train, self.config.algorithm.group_size
        drawn = balanced(self.prompts, train.images_per_iteration // group, config.seed, "train", self.iteration)
        images = range(index * train.block_images, (index + 1) * train.block_images)
        chosen = [drawn[image // group] for image in images]
        keys = [("train", self.iteration, prompt, image) for prompt, image in zip(chosen, images, strict=True)]
        noise = noise_for(keys, config.seed, config.kernel.num_steps, self.policy.backbone.latent_shape)
        texts = [self.prompts[prompt].text for prompt in chosen]
        rows = torch.tensor(chosen, device=self.mesh.device)
        seen: list[dict[str, Tensor]] = []
        trajectory = rollout(
            self.policy,
            self.critic,
            texts,
            self.conditioning.rows(rows),
            noise.to(self.mesh.device),
            policy_version=self.iteration * train.updates_per_iteration,
            observe=lambda output: seen.append(output.taps),
        )
        taps = {name: torch.stack([step[name] for step in seen], 1) for name in seen[0]}
        scores = score(self.rewards, self.policy.backbone.decode(trajectory.clean), texts)
        return Block(index, trajectory, taps, scores.rewards.to(self.mesh.device))

    def _credit(self, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """Advantages over all images of all workers, so that whitening is global. Returns all rewards and values."""
        rewards = self.mesh.gather(torch.cat([block.rewards for block in blocks]))
        values = self.mesh.gather(torch.cat([block.trajectory.values for block in blocks]))
        self.critic.update_scale(rewards)
        stochastic = blocks[0].trajectory.num_stochastic_steps
        advantages, returns = self.algorithm.advantages(rewards, values[:, :stochastic])
        size = self.config.train.block_images
        for block in blocks:
            rows = slice(block.index * size, (block.index + 1) * size)
            block.advantages = advantages[rows]
            # A deterministic step changes nothing any more: from there on the reward itself is the return.
            settled = block.rewards[:, None].expand_as(values[rows, stochastic:])
            block.returns = torch.cat([returns[rows], settled], 1)
        return rewards, values

    def _update_actor(self, blocks: Sequence[Block], update: int) -> dict[str, float]:
        """One optimizer step of the actor on this update's share of every block's transitions."""
        self.actor_optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for block in blocks:
            for name, value in self._actor_gradient(self._share(block, update)).items():
                sums[name] = sums.get(name, torch.zeros((), device=self.mesh.device)) + value / self._num_blocks
        parameters = list(self.actor_parameters.values())
        self.mesh.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.policy.gradient_clip)
        self._warm_up(update)
        self.actor_optimizer.step()
        totals = self.mesh.gather(torch.stack(list(sums.values()))[None]).sum(0)
        metrics = {**dict(zip(sums, totals.tolist(), strict=True)), "gradient_norm": float(norm)}
        if not all(map(math.isfinite, metrics.values())):
            raise TrainingError(
                f"iteration {self.iteration + 1}, update {update + 1}",
                f"the update is not finite ({metrics})",
                "Lower policy.learning_rate and resume: the last checkpoint is kept",
            )
        return metrics

    def _actor_gradient(self, minibatch: Minibatch) -> dict[str, Tensor]:
        """Add a minibatch's gradient, weighted as one of the update's blocks."""
        transition = self.policy.transition(
            minibatch.latents, minibatch.sigma, minibatch.sigma_next, minibatch.conditioning
        )
        actor = self.algorithm.loss(transition, minibatch)
        (actor.loss / self._num_blocks).backward()
        return {"policy_loss": actor.loss.detach(), **actor.metrics}

    def _share(self, block: Block, update: int) -> Minibatch:
        """The transitions of a block that belong to `update`."""
        steps = block.trajectory.num_stochastic_steps
        rows = self._order(block, "actor", steps).tensor_split(self.config.train.updates_per_iteration)[update]
        rows = rows.to(self.mesh.device)
        return flatten_steps(block.trajectory, block.advantages, rows // steps, rows % steps)

    def _update_critic(self, blocks: Sequence[Block], number: int) -> float:
        """One pass over the states of the iteration, with the taps that the acting policy's own forward gave: the
        critic reads the actor's features and never shapes them. Returns the mean loss."""
        steps, updates = blocks[0].trajectory.num_steps, self.config.train.updates_per_iteration
        self.critic.train()
        total = torch.zeros((), device=self.mesh.device)
        for update in range(updates):
            self.critic_optimizer.zero_grad(set_to_none=True)
            for block in blocks:
                torch.manual_seed(seed_for(self.config.seed, "dropout", self.iteration, number, update, block.index))
                rows = self._order(block, f"critic {number}", steps).tensor_split(updates)[update].to(self.mesh.device)
                loss = self._value_loss(block, rows // steps, rows % steps) / self._num_blocks
                loss.backward()
                total += loss.detach() / updates
            self.mesh.sum_gradients(list(self.critic.parameters()))
            torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.critic.gradient_clip)
            self.critic_optimizer.step()
        self.critic.eval()
        return float(self.mesh.gather(total[None]).sum())

    def _value_loss(self, block: Block, image: Tensor, step: Tensor) -> Tensor:
        trajectory = block.trajectory
        taps = {name: tap[image, step] for name, tap in block.taps.items()}
        values = self.critic.standardised(taps, trajectory.sigmas[step], trajectory.conditioning.rows(image))
        targets = self.critic.standardise(block.returns[image, step])
        return value_loss(values, targets, self.config.critic.target_clip)

    def _order(self, block: Block, purpose: str, steps: int) -> Tensor:
        """A seeded order of (image, step) pairs of a block, flattened; the updates take it in equal parts."""
        generator = generator_for(self.config.seed, "order", purpose, self.iteration, block.index)
        return torch.randperm(len(block.rewards) * steps, generator=generator)

    def _warm_up(self, update: int) -> None:
        """Adam's first steps are sign steps: the actor's rate rises linearly over its first updates."""
        done = self.iteration * self.config.train.updates_per_iteration + update + 1
        factor = min(1.0, done / max(1, self.config.policy.warmup_updates))
        for group in self.actor_optimizer.param_groups:
            group["lr"] = factor * self.config.policy.learning_rate

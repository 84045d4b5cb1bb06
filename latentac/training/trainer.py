"""The only training loop: roll out, score, credit, update.

Images come in blocks, the unit of work. Blocks are dealt to the workers and a block's transitions are split among the
updates, so an update sums the same transitions in the same blocks whatever the number of workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentac.backbones.precision import MasterWeights
from latentac.config.schema import Config
from latentac.critic import Critic
from latentac.evaluation.held_out import contact_sheet
from latentac.method.randomness import noise_for
from latentac.method.records import Trajectory
from latentac.method.returns import explained_variance, rank_correlation
from latentac.rewards.configured import ConfiguredReward, any_outside
from latentac.sampling.devices import map_overlapped
from latentac.sampling.encoding import HOST_BYTES, Encoded
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import Keep, rollout, score
from latentac.system.errors import Diverged, TrainingError
from latentac.training.algorithms import ALGORITHMS, Algorithm
from latentac.training.combination import Combination
from latentac.training.critic_learning import Learner, Replay
from latentac.training.distributed import Mesh
from latentac.training.policy_learning import REMEDY, Block, CreditedBlock, PolicyLearner
from latentac.training.sharding import Sharding
from latentac.training.stability import best_iteration, diverged, stop_early
from latentac.training.timing import Timing
from latentac.worlds.prompts import Prompt, balanced


@dataclass(frozen=True)
class Rollouts:
    """Those of one block, before they are scored. prompts: indices of the training prompts; images: uint8
    [B, H, W, 3]."""

    index: int
    trajectory: Trajectory
    prompts: list[int]
    images: np.ndarray


class Trainer:
    """Policy and critic, their optimizers, and the iterations that improve them. The same on every worker.

    critic: for an algorithm that uses one; others neither ask nor train it.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        critic: Critic,
        algorithm: Algorithm,
        rewards: Sequence[ConfiguredReward],
        prompts: Sequence[Prompt],
        *,
        mesh: Mesh,
    ) -> None:
        self.config, self.policy, self.critic, self.algorithm = config, policy, critic, algorithm
        self.rewards, self.prompts, self.mesh = rewards, prompts, mesh
        texts, on_gpu = [prompt.text for prompt in prompts], mesh.device.type == "cuda"
        self.conditioning = Encoded(policy.backbone, texts, **({"kept_bytes": HOST_BYTES} if on_gpu else {}))
        if on_gpu:  # which has better uses for its memory
            self.conditioning.release_encoders()
        self.sharding = Sharding(mesh, config.train.sharding == "full")
        settings = config.policy, config.train
        self.policy_learner = PolicyLearner(*settings, policy, algorithm, self.sharding, seed=config.seed)
        self.combination = Combination(config.rewards, mesh.device)
        self.learner: Learner | None = None
        if algorithm.uses_critic:
            weights = torch.tensor([reward.weight for reward in config.rewards], device=mesh.device)
            own: dict[str, Any] = {"num_steps": config.kernel.num_steps, "weights": weights, "seed": config.seed}
            self.learner = Learner(config.train, policy, critic, self.conditioning, self.sharding, **own)
        follows = self.learner is not None and algorithm.value_gradient > 0
        self.value_weights = self.combination.weights if follows else None
        self.history: list[dict[str, Any]] = []
        self.recoveries: list[dict[str, Any]] = []
        """Each return to a checkpoint: {iteration, reason}."""
        self.best: dict[str, Tensor] = {}
        self._last_clean: Tensor | None = None

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        """Whether there is no iteration left to do, or early stopping says that none should be done."""
        done = self.iteration >= self.config.train.num_iterations
        return done or stop_early(self.config.train.early_stopping, self.history)

    def iterate(self) -> dict[str, Any]:
        """One iteration: rollouts of the present policy, then its updates. Returns its entry in the history.

        Raises Diverged when an update is not finite or the iteration is beyond a bound of `train.divergence`.
        """
        train, timing = self.config.train, Timing(self.mesh)
        if self.combination.constrained:
            self.algorithm.weights = self.combination.weights
            self.value_weights = None if self.value_weights is None else self.combination.weights
        own = self.mesh.own(train.num_blocks)
        idle = self.sharding.idle(len(own))
        # Several workers share the cores already.
        alone = self.mesh.size == 1
        with timing.phase("rollout"):
            drawn = map_overlapped(self._roll_out, self._score, own, self.mesh.device, alone, any_outside(self.rewards))
            for _ in range(idle):
                self._trajectory(own[-1])  # the other workers need this one's share of the weights
        rollout_seconds = timing.elapsed
        self._last_clean = drawn[0].trajectory.clean
        with timing.phase("policy"):
            blocks, rewards, watched = self._credit(drawn)
            metrics = [self._update_policy(blocks, update) for update in range(train.updates_per_iteration)]
        means = {name: sum(entry[name] for entry in metrics) / len(metrics) for name in metrics[0]}
        entry = {
            "iteration": self.iteration + 1,
            "images": (self.iteration + 1) * train.images_per_iteration,
            "rewards": {name: float(rewards[:, m].mean()) for m, name in enumerate(self.config.reward_names)},
            "reward_mean": float(rewards[:, self.config.main_reward].mean()),
            **means,
            **watched,
            **self.combination.metrics(),
            **self._cache_metrics(),
            "first_ratio_deviation": metrics[0]["ratio_deviation"],
            "world_size": self.mesh.size,
            "rollout_seconds": rollout_seconds,
        }
        self._check_first_ratio(entry["first_ratio_deviation"])
        reason = diverged(train.divergence, entry)
        if reason:
            raise Diverged(f"iteration {self.iteration + 1}", reason, REMEDY)
        if self.learner is not None:
            learnt = [(block.index, block.trajectory, block.returns) for block in blocks if block.returns is not None]
            with timing.phase("critic"):
                entry["value_loss"] = self.learner.learn(self.iteration, learnt)
        if self.policy.rows.limit is not None:
            entry["rows_per_forward"] = self.policy.rows.limit
        self.combination.learn(rewards)
        entry["seconds"] = timing.elapsed
        entry["speed"] = timing.speed(train.images_per_iteration, entry["seconds"])
        self.history.append(entry)
        self._remember()
        return entry

    def last_images(self, count: int = 32) -> np.ndarray:
        """A contact sheet, uint8 [H, W, 3], of the first images of the last iteration on this worker."""
        if self._last_clean is None:
            raise ValueError("no iteration was done yet")
        clean = self._last_clean[:count].to(self.mesh.device)
        return np.asarray(contact_sheet(self.policy.backbone.decode(clean), 8))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next iteration depends on. Where weights are sharded, all workers call it together, and only the
        leading one gets the whole tensors."""
        tensors, progress = self.policy_learner.state()
        tensors |= {f"best.{name}": tensor for name, tensor in self.policy_learner.whole(self.best).items()}
        tensors |= {f"algorithm.{name}": tensor for name, tensor in self.algorithm.memory.items()}
        if self.learner is not None:
            tensors |= self.learner.state()
        tensors |= self.combination.state()
        return tensors, progress | {"history": self.history, "recoveries": self.recoveries}

    def load_state(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Go on from what `state` gave."""

        def below(prefix: str) -> dict[str, Tensor]:
            found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            return {name: tensor.to(self.mesh.device) for name, tensor in found.items()}

        self.policy_learner.load_state(tensors, progress)
        self.best, self.algorithm.memory = self.policy_learner.own(tensors, "best."), below("algorithm.")
        if self.learner is not None:
            self.learner.load_state(tensors)
        self.combination.load_state(tensors)
        self.history, self.recoveries = list(progress["history"]), list(progress["recoveries"])
        rows = self.policy.rows
        if self.history and rows.limit is not None:  # what fitted into memory before
            rows.limit = self.history[-1].get("rows_per_forward") or rows.limit

    def publish_weights(self) -> None:
        """Put the weights into the policy that the run is for: the best of early stopping, or the average, or the last.

        Training cannot go on from them.
        """
        chosen = self.best if self.config.train.early_stopping else self.policy_learner.ema
        if chosen:
            self.policy_learner.load(chosen)

    def result(self, base: Callable[[], Policy]) -> tuple[Policy, dict[str, Tensor]]:
        """The policy with its present weights, and the critic's weights, to be saved. Where weights are sharded, all
        workers call it together, and only the leading one gets something of use.

        base: makes the untrained policy anew, which then gets the whole weights.
        """
        critic = self.learner.critic_weights() if self.learner is not None else self.critic.state_dict()
        if not self.sharding.active:
            return self.policy, critic
        whole = self.policy_learner.whole(self.policy_learner.parameters)
        if not self.mesh.leads:
            return self.policy, {}
        policy = base()
        policy.backbone.adapt(self.config.policy)
        MasterWeights(policy.backbone.module).load(whole)
        return policy, critic

    def _roll_out(self, index: int) -> Rollouts:
        """Those of block `index` of this iteration, with their images."""
        trajectory, chosen = self._trajectory(index)
        images = self.policy.backbone.decode(trajectory.clean)
        if self.config.train.memory.trajectories == "host":
            trajectory = trajectory.kept_on(torch.device("cpu"))
        return Rollouts(index, trajectory, chosen, images)

    def _trajectory(self, index: int) -> tuple[Trajectory, list[int]]:
        """Those of block `index` of this iteration, G consecutive ones of each of its prompts; and their prompts."""
        config, train, group = self.config, self.config.train, self.algorithm.group_size
        drawn = balanced(self.prompts, train.images_per_iteration // group, config.seed, "train", self.iteration)
        places = range(index * train.block_images, (index + 1) * train.block_images)
        chosen = [drawn[place // group] for place in places]
        keys = [("train", self.iteration, prompt, place) for prompt, place in zip(chosen, places, strict=True)]
        noise = noise_for(keys, config.seed, config.kernel.num_steps, self.policy.backbone.latent_shape)
        rows = torch.tensor(chosen, device=self.mesh.device)
        trajectory = rollout(
            self.policy,
            self.critic if self.learner is not None else None,
            self.conditioning.rows(rows),
            noise.to(self.mesh.device),
            keep=Keep(features=self.learner is not None, value_gradient=self.value_weights),
        )
        return trajectory, chosen

    def _score(self, made: Rollouts) -> Block:
        scores = score(self.rewards, made.images, [self.prompts[index] for index in made.prompts])
        rows = torch.tensor(made.prompts, device=self.mesh.device)
        return Block(made.index, made.trajectory, rows, scores.rewards.to(self.mesh.device))

    def _credit(self, blocks: Sequence[Block]) -> tuple[list[CreditedBlock], Tensor, dict[str, Any]]:
        """Advantages over all images of all workers, so that whitening is global. Returns the blocks with their credit,
        all rewards [images, M] as they were measured, and metrics of the critic and the credit."""
        measured = self.mesh.gather(torch.cat([block.rewards for block in blocks]))
        rewards = self.combination.clipped(measured)
        values = self.mesh.gather(torch.cat([block.trajectory.values for block in blocks]))
        prompts = self.mesh.gather(torch.cat([block.prompts for block in blocks]))
        if self.learner is not None:
            own = torch.cat([block.trajectory.clean for block in blocks]).to(self.mesh.device)
            clean = self.mesh.gather(own)
            self.learner.observe(clean, rewards, prompts)
        stochastic = blocks[0].trajectory.num_stochastic_steps
        credit = self.algorithm.credit(rewards, values[:, :stochastic], prompts)
        size = self.config.train.block_images
        credited = []
        counts = (credit.advantages != 0).cpu()
        for block in blocks:
            rows = slice(block.index * size, (block.index + 1) * size)
            returns = None
            if self.learner is not None:
                # A deterministic step changes nothing any more: from there on the reward itself is the return.
                settled = rewards[rows, None].expand_as(values[rows, stochastic:])
                returns = torch.cat([credit.returns[rows], settled], 1)
            made = (block.index, block.trajectory, block.prompts, block.rewards)
            credited.append(CreditedBlock(*made, credit.advantages[rows], returns, counts[rows]))
        watched: dict[str, Any] = dict(credit.metrics)
        if self.learner is not None:
            main = self.config.main_reward
            watched["explained_variance"] = explained_variance(values[..., main], rewards[:, main]).tolist()
            if self.algorithm.group_size > 1:
                watched["rank_correlation"] = rank_correlation(values[..., main], rewards[:, main], prompts).tolist()
        return credited, measured, watched

    def _cache_metrics(self) -> dict[str, Any]:
        """Of each reward with a cache, the share of scores that were known; the caches of all workers together."""
        caches = {reward.name: reward.cache.take_counts() for reward in self.rewards if reward.cache is not None}
        if not caches:
            return {}
        counts = torch.tensor([list(caches.values())], device=self.mesh.device)
        asked, known = self.mesh.gather(counts).sum(0).T.tolist()
        return {"cache_hit_rate": {name: k / max(a, 1) for name, a, k in zip(caches, asked, known, strict=True)}}

    def _update_policy(self, blocks: Sequence[CreditedBlock], update: int) -> dict[str, float]:
        return self.policy_learner.update(blocks, self.iteration, update, self._rate(update))

    def _check_first_ratio(self, deviation: float) -> None:
        """Raises TrainingError where rollout and loss disagree before the first update, so that the ratio means nothing
        of the policy. A lower learning rate does not help, so training does not go back to a checkpoint."""
        share, clip = self.config.train.divergence.max_first_ratio_share, getattr(self.algorithm, "clip", None)
        if clip is not None and deviation > share * clip:
            problem = (
                f"before the first update the ratio deviates from 1 by {deviation:.2g}, and at most "
                f"{share:g} of the clip range {clip:g} is allowed (train.divergence.max_first_ratio_share)"
            )
            remedy = "Use backbone.precision=float32, or a larger algorithm.clip if the deviation may be so large"
            raise TrainingError(f"iteration {self.iteration + 1}", problem, remedy)

    def _rate(self, update: int) -> float:
        """Adam's first steps are sign steps: the policy's rate rises linearly over its first updates."""
        done = self.iteration * self.config.train.updates_per_iteration + update + 1
        factor = min(1.0, done / max(1, self.config.policy.warmup_updates))
        factor *= self.config.train.divergence.rate_factor ** len(self.recoveries)
        return factor * self.config.policy.learning_rate

    def _remember(self) -> None:
        """Keep the weights of the iteration that early stopping takes for the best."""
        stopping = self.config.train.early_stopping
        if stopping is not None and best_iteration(stopping, self.history) == self.iteration:
            learner = self.policy_learner
            self.best = {name: tensor.clone() for name, tensor in (learner.ema or learner.copy()).items()}


def new_trainer(
    config: Config,
    policy: Policy,
    critic: Critic,
    rewards: Sequence[ConfiguredReward],
    prompts: Sequence[Prompt],
    *,
    mesh: Mesh,
    scored: Replay | None = None,
) -> Trainer:
    """A trainer at iteration 0. `policy` becomes trainable in place. scored: images of value pretraining, from which
    the critic goes on learning."""
    torch.manual_seed(config.seed)  # for LoRA's initial matrices; everything else draws from generator_for
    policy.backbone.adapt(config.policy)
    weights = torch.tensor([reward.weight for reward in config.rewards])
    algorithm = ALGORITHMS.make(config.algorithm, weights, path="algorithm")
    trainer = Trainer(config, policy, critic, algorithm, rewards, prompts, mesh=mesh)
    if trainer.learner is not None:
        trainer.learner.begin_with(scored)
    return trainer

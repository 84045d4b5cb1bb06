"""How the critic learns: regression on rollouts' states, and on forward-noised states of images scored before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentac.backbones.precision import MasterWeights, is_shared, own_rows
from latentac.config.learning import Train
from latentac.critic import Critic
from latentac.method.diffusion import forward_noise
from latentac.method.losses import value_loss
from latentac.method.randomness import generator_for, seed_for
from latentac.method.records import Conditioning, Trajectory, taken
from latentac.sampling.encoding import Encoded
from latentac.sampling.policy import Policy
from latentac.training.checkpoint import optimizer_tensors, restore_optimizer
from latentac.training.sharding import Sharding

_PREFIX = "replay."
_FILE = "scored.safetensors"


@dataclass(frozen=True)
class Replay:
    """Scored images, oldest first. clean: [N, *latent]; rewards: [N, M]; prompts: int64 [N]."""

    clean: Tensor
    rewards: Tensor
    prompts: Tensor

    def extended(self, other: "Replay", most: int) -> "Replay":
        """With `other` behind, and only the newest `most` of all; where this one is."""
        added = other.to(self.rewards.device, self.clean.device)
        pairs = zip(self.tensors().values(), added.tensors().values(), strict=True)
        return Replay(*map(torch.cat, pairs)).newest(most)

    def newest(self, most: int) -> "Replay":
        return Replay(self.clean[-most:], self.rewards[-most:], self.prompts[-most:])

    def to(self, device: torch.device, latents: torch.device) -> "Replay":
        """On `device`, and its latents on another one, or the same."""
        return Replay(self.clean.to(latents), self.rewards.to(device), self.prompts.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {"clean": self.clean, "rewards": self.rewards, "prompts": self.prompts}

    def save(self, folder: Path) -> None:
        """scored.safetensors in `folder`."""
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}, folder / _FILE)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Replay | None":
        """What `save` wrote there, if it did."""
        file = folder / _FILE
        return cls(**load_file(file, device=str(device))) if file.exists() else None


class Learner:
    """The critic, its optimizer and what it remembers. The same on every worker.

    The policy's forward is asked for features only: the critic reads the policy and never shapes it.
    """

    def __init__(
        self,
        train: Train,
        policy: Policy,
        critic: Critic,
        conditioning: Encoded,
        sharding: Sharding,
        *,
        num_steps: int,
        weights: Tensor,
        seed: int,
    ) -> None:
        """conditioning: of each training prompt, in their order; num_steps: K; weights: of the rewards, float32 [M]."""
        self.policy, self.critic, self.conditioning = policy, critic, conditioning
        self.sharding, self.mesh = sharding, sharding.mesh
        self._weights, self._seed, self._num_blocks = weights, seed, train.num_blocks
        # No more than a block has states.
        self._updates_per_pass = min(critic.settings.updates_per_pass, train.block_images * num_steps)
        critic.train_heads()
        if sharding.active and hasattr(critic.body, "shard"):
            critic.body.shard(sharding.shard)
            MasterWeights(critic.body.backbone)
        groups = critic.parameter_groups()
        for group in groups:
            group["params"] = [_master(weight) for weight in group["params"]]
        self._learnt = [_master(weight) for weight in critic.parameters()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=critic.settings.weight_decay)
        self.replay: Replay | None = None
        self._memory = train.memory

    def begin_with(self, scored: Replay | None) -> None:
        """Remember images that were scored before training, if anything is to be remembered."""
        most = self.critic.settings.replay_images
        if scored is not None and most > 0:
            self.replay = self._placed(scored.newest(most))

    def observe(self, clean: Tensor, rewards: Tensor, prompts: Tensor) -> None:
        """Take in the iteration's images of all workers: clean latents [B, *latent], rewards [B, M], prompts [B]."""
        self.critic.update_scale(rewards)
        most = self.critic.settings.replay_images
        if most > 0:
            new = Replay(clean, rewards, prompts)
            self.replay = self._placed(self.replay.extended(new, most) if self.replay else new.newest(most))

    def learn(self, iteration: int, blocks: Sequence[tuple[int, Trajectory, Tensor]]) -> float:
        """The iteration's passes over `blocks`: (index, trajectory with features, returns [B, K, M]). Returns the mean
        loss of the last pass. Where weights are sharded, a worker with fewer blocks than others repeats its last one,
        which then counts nothing."""
        settings, updates, num_blocks = self.critic.settings, self._updates_per_pass, self._num_blocks
        total = torch.zeros((), device=self.mesh.device)
        idle = [blocks[-1]] * self.sharding.idle(len(blocks))
        self.critic.train()
        for number in range(settings.num_passes):
            total = torch.zeros((), device=self.mesh.device)
            for update in range(updates):
                self.optimizer.zero_grad(set_to_none=True)
                for place, (index, trajectory, returns) in enumerate([*blocks, *idle]):
                    # What is divided by infinity is 0, and so is its gradient.
                    divisor = num_blocks if place < len(blocks) else math.inf
                    key = (iteration, number, update, index)
                    torch.manual_seed(seed_for(self._seed, "dropout", *key))
                    rows = self._share(trajectory, returns, key)
                    loss = self._rollout_loss(trajectory, returns, rows) / divisor
                    loss.backward()
                    if self.replay is not None:
                        (self._replay_loss(self.replay, len(rows), trajectory.sigmas, key) / divisor).backward()
                    total += loss.detach() / updates
                self.mesh.sum_gradients([p for p in self.critic.parameters() if p.requires_grad and not is_shared(p)])
                self.sharding.clip(self._learnt, settings.gradient_clip)
                self.optimizer.step()
        self.critic.eval()
        return float(self.mesh.gather(total[None]).sum())

    def state(self) -> dict[str, Tensor]:
        """Everything that `learn` depends on; see `Trainer.state`."""
        replay = self.replay.tensors() if self.replay else {}
        return {
            **{f"critic.{name}": tensor for name, tensor in self.critic_weights().items()},
            **{f"{_PREFIX}{name}": tensor for name, tensor in replay.items()},
            **optimizer_tensors(self.optimizer, "critic_optimizer", self.sharding.whole),
        }

    def critic_weights(self) -> dict[str, Tensor]:
        """The critic's weights and buffers by name; see `Sharding.whole`."""
        return {
            name: self.sharding.whole(own_rows(tensor), tensor) for name, tensor in self.critic.state_dict().items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._load_critic(_below("critic.", tensors))
        restore_optimizer(self.optimizer, "critic_optimizer", tensors, self.sharding.own)
        replay = _below(_PREFIX, tensors)
        self.replay = self._placed(Replay(**replay)) if replay else None

    def _placed(self, replay: Replay) -> Replay:
        """Its latents on the device, or in the host's memory where they are more than `train.memory` allows."""
        device = self.mesh.device
        fits = self._memory.fits_device(replay.clean.nbytes, device.type)
        return replay.to(device, device if fits else torch.device("cpu"))

    @torch.no_grad()
    def _load_critic(self, weights: dict[str, Tensor]) -> None:
        """Undo `critic_weights`. Raises RuntimeError for the weights of another critic."""
        here = self.critic.state_dict()
        if not self.sharding.active:
            self.critic.load_state_dict(weights)
        elif {name: tensor.shape for name, tensor in here.items()} != {n: t.shape for n, t in weights.items()}:
            raise RuntimeError("the critic has other weights")
        else:
            for name, tensor in here.items():
                own_rows(tensor).copy_(self.sharding.own(weights[name], tensor))

    def _share(self, trajectory: Trajectory, returns: Tensor, key: tuple[int, int, int, int]) -> Tensor:
        """The flattened (image, step) rows of a block that belong to an update."""
        iteration, number, update, index = key
        generator = generator_for(self._seed, "order", "critic", iteration, number, index)
        order = torch.randperm(len(returns) * trajectory.num_steps, generator=generator)
        return order.tensor_split(self._updates_per_pass)[update].to(self.mesh.device)

    def _rollout_loss(self, trajectory: Trajectory, returns: Tensor, rows: Tensor) -> Tensor:
        image, step = rows // trajectory.num_steps, rows % trajectory.num_steps
        device = self.mesh.device
        features = {name: taken(feature, (image, step), device) for name, feature in trajectory.features.items()}
        conditioning = trajectory.conditioning.rows(image.to(trajectory.conditioning.tokens.device)).to(device)
        return self._loss(features, trajectory.sigmas[step], conditioning, returns[image, step])

    def _replay_loss(self, replay: Replay, count: int, sigmas: Tensor, key: tuple[int, int, int, int]) -> Tensor:
        """On as many forward-noised states, drawn anew, of images scored in this and earlier iterations. At low noise
        the reward is that of the image, whoever made it; at high noise the target is that of earlier policies too."""
        generator = generator_for(self._seed, "replay", *key)
        image = torch.randint(len(replay.clean), (count,), generator=generator).to(self.mesh.device)
        step = torch.randint(len(sigmas) - 1, (count,), generator=generator).to(self.mesh.device)
        clean, sigma = taken(replay.clean, image, self.mesh.device), sigmas[step]
        noise = torch.randn(clean.shape, generator=generator).to(self.mesh.device)
        latents = forward_noise(clean, noise, sigma, self.policy.backbone.path)
        conditioning = self.conditioning.rows(replay.prompts[image])
        features = observe(self.policy, self.critic, latents, sigma, conditioning)
        return self._loss(features, sigma, conditioning, replay.rewards[image])

    def _loss(self, features: dict[str, Tensor], sigma: Tensor, conditioning: Conditioning, returns: Tensor) -> Tensor:
        values = self.critic.standardised(features, sigma, conditioning)
        return critic_loss(self.critic, values, returns, self._weights)


def critic_loss(critic: Critic, values: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """The value loss of standardised values [N, M] for returns [N, M] in the rewards' units.

    weights: [M], the training weights of the rewards. A shared head learns the trained rewards alone, by their weights.
    Separate heads do not disturb each other.
    """
    shared = weights if critic.settings.shared_head else None
    return value_loss(values, critic.standardise(returns), critic.settings.target_clip, shared)


@torch.no_grad()
def observe(
    policy: Policy, critic: Critic, latents: Tensor, sigma: Tensor, conditioning: Conditioning
) -> dict[str, Tensor]:
    """What the critic reads of latents that no rollout passed, in parts of the policy's rows."""

    def of(part: range) -> dict[str, Tensor]:
        if len(part) == len(latents):
            return critic.features(latents, *policy.backbone.predict(latents, sigma, conditioning))
        rows = torch.arange(part.start, part.stop, device=latents.device)
        found = policy.backbone.predict(latents[rows], sigma[rows], conditioning.rows(rows))
        return critic.features(latents[rows], *found)

    parts = policy.rows.run(len(latents), of)
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _master(weight: Tensor) -> Tensor:
    """What the optimizer updates in place of a weight: see `MasterWeights`."""
    master: Tensor = getattr(weight, "master", weight)
    return master


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

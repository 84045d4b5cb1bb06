"""Value pretraining: Monte-Carlo regression of the critic on rollouts of the frozen policy.

Each state of a rollout has the rollout's reward as its target. The policy does not change, so the taps of its own
forward are kept and every further pass over the states costs the heads only. Where they are kept is `train.memory`'s
affair. If there is no room, the latents are kept instead, and each pass costs a forward of the policy.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentac.config.learning import Memory, Pretrain
from latentac.config.schema import Config
from latentac.critic import Critic
from latentac.method.constraints import clip_rewards
from latentac.method.diffusion import forward_noise
from latentac.method.randomness import generator_for, noise_for, seed_for
from latentac.method.records import Conditioning, Trajectory, join, taken
from latentac.method.returns import explained_variance, rank_correlation
from latentac.rewards.configured import ConfiguredReward, any_outside
from latentac.sampling.devices import map_overlapped
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import Keep, rollout, score
from latentac.system.progress import Progress, progress
from latentac.training.critic_learning import Replay, critic_loss, observe
from latentac.worlds.prompts import Prompt, PromptSet, balanced

_log = logging.getLogger(__name__)
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class States:
    """Rollouts of a frozen policy as the critic reads them.

    features: name -> [B, K, ...], on the device or in the host's memory; nothing where they are computed again
    clean: [B, *latent]     sigmas: [K]     rewards: [B, M]
    conditioning: B rows, in the host's memory: of a large text encoder they are what takes most room
    prompts: int64 [B], which prompt of the split
    latents: [B, K, *latent], in the host's memory, where the features are computed again by `observe`
    """

    features: dict[str, Tensor]
    clean: Tensor
    sigmas: Tensor
    conditioning: Conditioning
    rewards: Tensor
    prompts: Tensor
    latents: Tensor | None = None
    observe: Callable[[Tensor, Tensor, Conditioning], dict[str, Tensor]] | None = None

    def inputs(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor, Conditioning]:
        """The critic's arguments at flattened (image, step) rows."""
        image, step = rows // len(self.sigmas), rows % len(self.sigmas)
        sigma, conditioning, device = self.sigmas[step], self.conditioned(image), self.clean.device
        if self.latents is not None and self.observe is not None:
            latents = taken(self.latents, (image, step), device)
            return self.observe(latents, sigma, conditioning), sigma, conditioning
        features = {name: taken(feature, (image, step), device) for name, feature in self.features.items()}
        return features, sigma, conditioning

    def conditioned(self, image: Tensor) -> Conditioning:
        """The conditioning of these images, where the rest is."""
        return self.conditioning.rows(image.to(self.conditioning.tokens.device)).to(self.clean.device)


def new_critic(config: Config, policy: Policy) -> Critic:
    """A critic for the policy's backbone with a head a reward, initialised from the run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        critic = Critic(policy.backbone, config.reward_names, config.critic)
    return critic.to(policy.backbone.device).eval()


@dataclass(frozen=True)
class Draw:
    """Which rollouts to collect. count: images; purpose: what the seed's numbers are drawn for; num_steps: K;
    block_images: so many go through the denoiser together; memory: where features are kept; num_kept: images whose
    features are kept at the same time."""

    count: int
    purpose: str
    seed: int
    num_steps: int
    block_images: int
    memory: Memory
    num_kept: int


def draws(config: Config) -> tuple[Draw, Draw]:
    """What value pretraining learns from, and what it is measured on."""
    settings, train = config.pretrain, config.train
    own = Draw(
        count=settings.num_images,
        purpose="pretraining",
        seed=config.seed,
        num_steps=config.kernel.num_steps,
        block_images=train.block_images,
        memory=train.memory,
        num_kept=settings.num_images + settings.num_held_out_images,
    )
    return own, replace(own, count=settings.num_held_out_images, purpose="held-out")


def collect(
    policy: Policy,
    critic: Critic,
    rewards: Sequence[ConfiguredReward],
    prompts: Sequence[Prompt],
    draw: Draw,
) -> States:
    """Rollouts on `prompts`, the categories in turn, with the critic's inputs at each state."""
    chosen = balanced(prompts, draw.count, draw.seed, draw.purpose)
    keys = [(draw.purpose, prompt, slot) for slot, prompt in enumerate(chosen)]
    blocks = [keys[start : start + draw.block_images] for start in range(0, draw.count, draw.block_images)]
    device = policy.backbone.device
    with progress(draw.count, f"rollouts ({draw.purpose})", "images") as bar:
        parts = map_overlapped(
            lambda keys: _roll_out(policy, critic, prompts, draw, keys),
            lambda made: _score(rewards, prompts, made, draw, bar),
            blocks,
            device,
            outside=any_outside(rewards),
        )
    kept = [part.latents for part in parts if part.latents is not None]
    if kept:
        _log.info("the features of value pretraining are larger than train.memory allows: each pass computes them")
    return States(
        latents=torch.cat(kept) if kept else None,
        observe=partial(observe, policy, critic) if kept else None,
        features={name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features},
        clean=torch.cat([part.clean for part in parts]),
        sigmas=parts[0].sigmas,
        conditioning=join([part.conditioning for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
        prompts=torch.tensor(chosen, device=device),
    )


class _Rollouts(NamedTuple):
    """Those of one block, before they are scored. keys: of each image's noise: (purpose, index of its prompt, place);
    images: uint8 [B, H, W, 3]."""

    keys: Sequence[tuple[str, int, int]]
    conditioning: Conditioning
    trajectory: Trajectory
    images: np.ndarray


def _roll_out(
    policy: Policy, critic: Critic, prompts: Sequence[Prompt], draw: Draw, keys: Sequence[tuple[str, int, int]]
) -> _Rollouts:
    noise = noise_for(keys, draw.seed, draw.num_steps, policy.backbone.latent_shape)
    conditioning = policy.backbone.encode([prompts[index].text for _, index, _ in keys])
    trajectory = rollout(policy, critic, conditioning, noise.to(policy.backbone.device), keep=Keep(features=True))
    return _Rollouts(keys, conditioning, trajectory, policy.backbone.decode(trajectory.clean))


def _score(
    rewards: Sequence[ConfiguredReward], prompts: Sequence[Prompt], made: _Rollouts, draw: Draw, bar: Progress[Any]
) -> States:
    scores = score(rewards, made.images, [prompts[index] for _, index, _ in made.keys])
    bar.update(len(made.keys))
    trajectory = made.trajectory
    size = sum(feature[0].nbytes for feature in trajectory.features.values()) * draw.num_kept
    place = draw.memory.place_of_features(size, trajectory.clean.device.type)
    features = dict(trajectory.features) if place != "again" else {}
    return States(
        features if place == "device" else {name: feature.to(_HOST) for name, feature in features.items()},
        trajectory.clean,
        trajectory.sigmas[:-1],
        made.conditioning.to(_HOST),
        clip_rewards(scores.rewards, [reward.bounds for reward in rewards]).to(trajectory.clean.device),
        torch.tensor([index for _, index, _ in made.keys]),
        trajectory.latents[:, :-1].to(_HOST) if place == "again" else None,
    )


def predict(critic: Critic, states: States, minibatch_states: int) -> Tensor:
    """[B, K, M] values in each reward's own unit, of so many states at once."""
    images, steps = states.rewards.shape[0], len(states.sigmas)
    rows = torch.arange(images * steps, device=states.rewards.device)
    critic.eval()
    with torch.no_grad():
        values = [critic(*states.inputs(part)) for part in rows.split(minibatch_states)]
    return torch.cat(values).unflatten(0, (images, steps))


def fit(
    settings: Pretrain,
    policy: Policy,
    critic: Critic,
    states: States,
    held_out: States,
    *,
    seed: int,
    weights: Sequence[float],
) -> list[dict[str, Any]]:
    """Regress the critic on `states`. Returns one entry per pass: its loss, and the held-out explained variance and
    within-prompt rank correlation of each step.

    weights: of the rewards; the measures are of the first one above 0. The learning rate falls linearly to zero, so
    that the last pass ends where it converges. A share `pretrain.forward_noised` of the minibatches is drawn anew each
    time, as forward-noised states of the scored images.
    """
    main = next(index for index, weight in enumerate(weights) if weight > 0)
    columns = torch.tensor(weights, device=states.rewards.device)
    critic.update_scale(states.rewards)
    critic.train_heads()
    optimizer = torch.optim.AdamW(
        critic.parameter_groups(), betas=(0.9, 0.95), weight_decay=critic.settings.weight_decay
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    total = states.rewards.shape[0] * len(states.sigmas)
    per_pass = -(-total // settings.minibatch_states)
    updates = settings.num_passes * per_pass
    history: list[dict[str, Any]] = []
    with progress(updates, "value pretraining", "updates") as bar:
        for index in range(settings.num_passes):
            generator = generator_for(seed, "value pretraining", index)
            order = torch.randperm(total, generator=generator).to(states.rewards.device)
            losses = []
            critic.train()
            torch.manual_seed(seed_for(seed, "value pretraining dropout", index))
            for number, rows in enumerate(order.split(settings.minibatch_states)):
                fraction = (index * per_pass + number) / updates
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - fraction)
                noised = float(torch.rand((), generator=generator)) < settings.forward_noised
                inputs = _noised(policy, critic, states, rows, generator) if noised else states.inputs(rows)
                losses.append(_step(critic, optimizer, inputs, states.rewards[rows // len(states.sigmas)], columns))
                bar.update()
            values = predict(critic, held_out, settings.minibatch_states)[..., main]
            rewards = held_out.rewards[:, main]
            explained = explained_variance(values, rewards)
            bar.note(f"held-out explained variance {float(explained.mean()):.3f}")
            history.append(
                {
                    "pass": index + 1,
                    "value_loss": sum(losses) / len(losses),
                    "held_out_explained_variance": explained.tolist(),
                    "held_out_rank_correlation": rank_correlation(values, rewards, held_out.prompts).tolist(),
                }
            )
    critic.eval().requires_grad_(False)
    return history


def pretrain(
    config: Config, policy: Policy, critic: Critic, rewards: Sequence[ConfiguredReward], prompts: PromptSet
) -> tuple[list[dict[str, Any]], Replay | None]:
    """Collect and fit. Returns the passes' history, and the scored images for the critic to go on from; neither where
    no images are asked for."""
    settings = config.pretrain
    if settings.num_images == 0:
        return [], None
    own, other = draws(config)
    states = collect(policy, critic, rewards, prompts.train, own)
    held_out = collect(policy, critic, rewards, prompts.held_out, other)
    weights = [reward.weight for reward in rewards]
    history = fit(settings, policy, critic, states, held_out, seed=config.seed, weights=weights)
    return history, Replay(states.clean, states.rewards, states.prompts)


def _noised(
    policy: Policy, critic: Critic, states: States, rows: Tensor, generator: torch.Generator
) -> tuple[dict[str, Tensor], Tensor, Conditioning]:
    """As `States.inputs`, of fresh noise on the images instead of the states that the rollouts passed."""
    image, step = rows // len(states.sigmas), rows % len(states.sigmas)
    clean, sigma, conditioning = states.clean[image], states.sigmas[step], states.conditioned(image)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    latents = forward_noise(clean, noise, sigma, policy.backbone.path)
    return observe(policy, critic, latents, sigma, conditioning), sigma, conditioning


def _step(
    critic: Critic,
    optimizer: torch.optim.Optimizer,
    inputs: tuple[dict[str, Tensor], Tensor, Conditioning],
    rewards: Tensor,
    weights: Tensor,
) -> float:
    loss = critic_loss(critic, critic.standardised(*inputs), rewards, weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(critic.parameters(), critic.settings.gradient_clip)
    optimizer.step()
    return float(loss.detach())

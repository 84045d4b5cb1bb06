"""Value pretraining: Monte-Carlo regression of the critic on rollouts of the frozen actor.

Each state of a rollout has the rollout's reward as its target. The actor does not change, so the taps of its own
forward are kept and every further pass over the states costs the heads only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentac.config import Config
from latentac.critic import Critic
from latentac.distributed import generator_for, map_blocks, noise_for, seed_for
from latentac.losses import value_loss
from latentac.policy import Policy, PolicyOutput
from latentac.progress import Progress, progress
from latentac.prompts import Prompt, PromptSet, balanced
from latentac.returns import explained_variance
from latentac.rewards import Reward
from latentac.rollout import rollout, score
from latentac.types import Conditioning


@dataclass(frozen=True)
class States:
    """Rollouts of a frozen actor as the critic sees them.

    taps: name -> [B, K, c, h, w]     sigmas: [K]     tokens: [B, L, C]     rewards: [B, M]
    """

    taps: dict[str, Tensor]
    sigmas: Tensor
    tokens: Tensor
    rewards: Tensor


def new_critic(config: Config, policy: Policy) -> Critic:
    """A critic for the policy's backbone with a head a reward, initialised from the run's seed."""
    backbone, settings = policy.backbone, config.critic
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return Critic(
            backbone.tap_shapes,
            backbone.text_width,
            config.reward_names,
            settings.width,
            settings.num_heads,
            settings.num_queries,
            settings.depth,
            settings.dropout,
        )


def collect(
    config: Config, policy: Policy, rewards: Sequence[Reward], prompts: Sequence[Prompt], count: int, purpose: str
) -> States:
    """`count` rollouts on `prompts`, the categories in turn, with the taps of every state."""
    chosen = balanced(prompts, count, config.seed, purpose)
    size = config.train.block_images
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    device = policy.backbone.encode([prompts[0].text]).tokens.device
    with progress(count, f"rollouts ({purpose})", "images") as bar:
        parts = map_blocks(
            lambda block: _collect_block(config, policy, rewards, prompts, chosen, block, purpose, bar), blocks, device
        )
    return States(
        taps={name: torch.cat([part.taps[name] for part in parts]) for name in parts[0].taps},
        sigmas=parts[0].sigmas,
        tokens=torch.cat([part.tokens for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
    )


def _collect_block(
    config: Config,
    policy: Policy,
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    chosen: Sequence[int],
    block: range,
    purpose: str,
    bar: Progress[Any],
) -> States:
    keys = [(purpose, chosen[slot], slot) for slot in block]
    noise = noise_for(keys, config.seed, config.kernel.num_steps, policy.backbone.latent_shape)
    texts = [prompts[chosen[slot]].text for slot in block]
    conditioning = policy.backbone.encode(texts)
    seen: list[dict[str, Tensor]] = []

    def observe(output: PolicyOutput) -> None:
        seen.append(output.taps)

    trajectory = rollout(policy, None, texts, conditioning, noise.to(conditioning.tokens.device), observe=observe)
    scores = score(rewards, policy.backbone.decode(trajectory.clean), texts)
    bar.update(len(block))
    taps = {name: torch.stack([step[name] for step in seen], 1) for name in seen[0]}
    return States(taps, trajectory.sigmas[:-1], conditioning.tokens, scores.rewards.to(noise.device))


def predict(critic: Critic, states: States, block: int = 256) -> Tensor:
    """[B, K, M] values in each reward's own unit."""
    images, steps = states.rewards.shape[0], len(states.sigmas)
    rows = torch.arange(images * steps)
    critic.eval()
    with torch.no_grad():
        values = [critic(*_inputs(states, part)) for part in rows.split(block)]
    return torch.cat(values).unflatten(0, (images, steps))


def fit(config: Config, critic: Critic, states: States, held_out: States, main: int) -> list[dict[str, Any]]:
    """Regress the heads on `states`; one entry a pass with the loss and the held-out explained variance a step.

    The rate falls linearly to zero, so that the last pass ends where it converges. `main` is the column reported.
    """
    settings = config.pretrain
    critic.update_scale(states.rewards)
    critic.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        critic.parameters(), config.critic.learning_rate, (0.9, 0.95), weight_decay=config.critic.weight_decay
    )
    total = states.rewards.shape[0] * len(states.sigmas)
    per_pass = -(-total // settings.minibatch_states)
    updates = settings.num_passes * per_pass
    history: list[dict[str, Any]] = []
    with progress(updates, "value pretraining", "updates") as bar:
        for index in range(settings.num_passes):
            order = torch.randperm(total, generator=generator_for(config.seed, "value pretraining", index))
            losses = []
            critic.train()
            torch.manual_seed(seed_for(config.seed, "value pretraining dropout", index))
            for number, rows in enumerate(order.split(settings.minibatch_states)):
                fraction = (index * per_pass + number) / updates
                optimizer.param_groups[0]["lr"] = config.critic.learning_rate * (1 - fraction)
                losses.append(_step(config, critic, optimizer, states, rows))
                bar.update()
            explained = explained_variance(predict(critic, held_out)[..., main], held_out.rewards[:, main])
            bar.note(f"held-out explained variance {float(explained.mean()):.3f}")
            history.append(
                {
                    "pass": index + 1,
                    "value_loss": sum(losses) / len(losses),
                    "held_out_explained_variance": explained.tolist(),
                }
            )
    critic.eval().requires_grad_(False)
    return history


def pretrain(
    config: Config, policy: Policy, critic: Critic, rewards: Sequence[Reward], prompts: PromptSet
) -> tuple[list[dict[str, Any]], States]:
    """Collect and fit. Returns the passes' history and the held-out states, for a critic trained further."""
    main = next(index for index, reward in enumerate(config.rewards) if reward.weight > 0)
    settings = config.pretrain
    states = collect(config, policy, rewards, prompts.train, settings.num_images, "pretraining")
    held_out = collect(config, policy, rewards, prompts.held_out, settings.num_held_out_images, "held-out")
    return fit(config, critic, states, held_out, main), held_out


def _inputs(states: States, rows: Tensor) -> tuple[dict[str, Tensor], Tensor, Conditioning]:
    """The critic's arguments at flattened (image, step) rows."""
    steps = len(states.sigmas)
    image, step = rows // steps, rows % steps
    taps = {name: tap[image, step] for name, tap in states.taps.items()}
    return taps, states.sigmas[step], Conditioning(states.tokens[image])


def _step(config: Config, critic: Critic, optimizer: torch.optim.Optimizer, states: States, rows: Tensor) -> float:
    targets = critic.standardise(states.rewards[rows // len(states.sigmas)])
    loss = value_loss(critic.standardised(*_inputs(states, rows)), targets, config.critic.target_clip)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(critic.parameters(), config.critic.gradient_clip)
    optimizer.step()
    return float(loss.detach())

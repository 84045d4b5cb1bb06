"""The only denoising loop: training, value pretraining, evaluation, steering and serving all sample here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentac.critic import ValueFunction
from latentac.method.diffusion import num_stochastic_steps
from latentac.method.records import Conditioning, Scores, Trajectory, ValueGradients, join_trajectories
from latentac.rewards.configured import ConfiguredReward
from latentac.sampling.policy import Policy
from latentac.sampling.steering import SteeringState
from latentac.sampling.steering.run import SteeringRun
from latentac.worlds.prompts import Prompt


@dataclass(frozen=True)
class Keep:
    """What a trajectory keeps beside latents, means, log-probabilities and values.

    features: the critic's inputs at each state, to learn from. value_gradient: [M], the weight of each head; keeps the
    gradient of the weighted, standardised values with respect to the latents. A step then costs three forwards.
    """

    features: bool = False
    value_gradient: Tensor | None = None


NOTHING = Keep()


def rollout(
    policy: Policy,
    critic: ValueFunction | None,
    conditioning: Conditioning,
    noise: Tensor,
    *,
    steering: SteeringRun | None = None,
    keep: Keep = NOTHING,
) -> Trajectory:
    """Denoise from `noise`, [B, K+1, *latent] standard normal, whose entry k + 1 is the draw of step k.

    The schedule follows from K. conditioning: B rows. Steered log-probs are those of the policy, not of the steered
    transition.

    Steering needs a state's value before the next state is drawn, and so does a callback. Without them the critic is
    called once, at the end, on all states: small products cost more to start than to do. The images are then divided
    into parts of `policy.rows`, one rollout after the other.
    """
    if steering is None:

        def of(part: range) -> Trajectory:
            if len(part) == len(noise):
                return _rollout(policy, critic, conditioning, noise, keep=keep)
            rows = torch.arange(part.start, part.stop, device=noise.device)
            return _rollout(policy, critic, conditioning.rows(rows), noise[rows], keep=keep)

        parts = policy.rows.run(len(noise), of)
        return parts[0] if len(parts) == 1 else join_trajectories(parts)
    steering.begin(noise, critic)
    return _rollout(policy, critic, conditioning, noise, steering=steering, keep=keep)


def _rollout(
    policy: Policy,
    critic: ValueFunction | None,
    conditioning: Conditioning,
    noise: Tensor,
    *,
    steering: SteeringRun | None = None,
    keep: Keep = NOTHING,
) -> Trajectory:
    """`rollout` of images whose network passes fit into memory together. `steering` has begun."""
    num_steps = noise.shape[1] - 1
    sigmas = policy.backbone.schedule(num_steps)
    num_stochastic = num_stochastic_steps(policy.kernel, sigmas)  # on the CPU: the answer decides what is done next
    sigmas = sigmas.to(noise.device)
    latents: list[Tensor] = [noise[:, 0]]
    means: list[Tensor] = []
    log_probs: list[Tensor] = []
    values: list[Tensor] = []
    gradients: dict[int, Tensor] = {}
    features: dict[str, list[Tensor]] = {}
    for step in range(num_steps):
        state = latents[-1].detach()
        sigma, sigma_next = sigmas[step].expand(len(state)), sigmas[step + 1].expand(len(state))
        weights = keep.value_gradient if 0 < step <= num_stochastic else None
        needs_gradient = weights is not None or (steering is not None and steering.needs_gradient(step))
        with torch.set_grad_enabled(needs_gradient):
            state.requires_grad_(needs_gradient)
            output = policy.forward(state, sigma, sigma_next, conditioning)
            current = critic.features(state, output.prediction, output.taps) if critic is not None else {}
            transition = proposal = output.transition
            if weights is not None and critic is not None:
                weighted = critic.standardised(current, sigma, conditioning) @ weights
                (gradients[step - 1],) = torch.autograd.grad(weighted.sum(), state)
            if steering is not None:
                value = _standardised(critic, current, sigma, conditioning)
                values.append(value.detach())
                transition, proposal, rows = steering.act(SteeringState(step, state, transition, value))
                if rows is not None:
                    current = {name: feature[rows] for name, feature in current.items()}
                    for past in (latents, means, log_probs, values, *features.values()):
                        past[:] = [each[rows] for each in past]
        with torch.no_grad():
            latents.append(proposal.sample(noise[:, step + 1]).detach())
            if steering is not None:
                steering.moved(transition, proposal, latents[-1])
            if step < num_stochastic:
                means.append(transition.mean.detach())
                log_probs.append(transition.log_prob(latents[-1]).detach())
            for name, feature in current.items() if keep.features or steering is None else ():
                features.setdefault(name, []).append(feature.detach())
    kept = {name: torch.stack(steps, 1) for name, steps in features.items()}
    return Trajectory(
        conditioning=conditioning,
        latents=torch.stack(latents, 1).detach(),
        sigmas=sigmas,
        means=torch.stack(means, 1) if means else noise.new_zeros(len(noise), 0, *noise.shape[2:]),
        log_probs=torch.stack(log_probs, 1) if log_probs else noise.new_zeros(len(noise), 0),
        values=_values(critic, kept, values, sigmas[:-1], conditioning, noise),
        features=kept if keep.features else {},
        value_gradients=_value_gradients(gradients, num_stochastic, noise) if gradients else None,
    )


def _standardised(
    critic: ValueFunction | None, features: dict[str, Tensor], sigma: Tensor, conditioning: Conditioning
) -> Tensor:
    """[B, M], with the graph to the latents; without a critic M is 0."""
    return sigma.new_zeros(len(sigma), 0) if critic is None else critic.standardised(features, sigma, conditioning)


def _value_gradients(gradients: dict[int, Tensor], num_stochastic: int, noise: Tensor) -> ValueGradients:
    """`gradients`: stochastic step -> [B, *latent]."""
    nothing = torch.zeros_like(noise[:, 0])
    known = torch.tensor([step in gradients for step in range(num_stochastic)], device=noise.device)
    stacked = torch.stack([gradients.get(step, nothing) for step in range(num_stochastic)], 1)
    return ValueGradients(stacked, known.expand(len(noise), -1))


@torch.no_grad()
def _values(
    critic: ValueFunction | None,
    features: dict[str, Tensor],
    known: Sequence[Tensor],
    sigmas: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
) -> Tensor:
    """[B, K, M] in the rewards' units: the standardised ones that steering asked for, or else those of the features
    [B, K, ...] of all states at once. Without a critic M is 0."""
    size, steps = len(noise), len(sigmas)
    if critic is None:
        return noise.new_zeros(size, steps, 0)
    if known:
        return critic.unstandardise(torch.stack(tuple(known), 1))
    image = torch.arange(size, device=noise.device).repeat_interleave(steps)
    flat = {name: feature.flatten(0, 1) for name, feature in features.items()}
    values = critic.standardised(flat, sigmas.repeat(size), conditioning.rows(image))
    return critic.unstandardise(values).unflatten(0, (size, steps))


def steered_rollout(
    policy: Policy,
    critic: ValueFunction,
    conditioning: Conditioning,
    noise: Tensor,
    steering: SteeringRun,
    *,
    judge: Callable[[Trajectory], Tensor] | None = None,
) -> Trajectory:
    """One trajectory per image, chosen among N particles. noise: [B, N, K+1, *latent]; conditioning: B rows.

    judge: what the choice is made by, standardised values [B N, M] of the particles' trajectories; if None, the
    critic's values at the last denoised state.
    """
    images, particles = noise.shape[:2]
    repeated = torch.arange(images, device=noise.device).repeat_interleave(particles)
    trajectory = rollout(policy, critic, conditioning.rows(repeated), noise.flatten(0, 1), steering=steering)
    last = critic.standardise(trajectory.values[:, -1]) if judge is None else judge(trajectory)
    chosen = steering.select(last.unflatten(0, (images, particles)))
    rows = torch.arange(images, device=noise.device) * particles + chosen
    return trajectory.rows(rows)


def score(rewards: Sequence[ConfiguredReward], images: np.ndarray, prompts: Sequence[Prompt]) -> Scores:
    """Every reward of every image. images: uint8 [B, H, W, 3]. Raises RewardError by name."""
    columns = [torch.from_numpy(reward(images, prompts)) for reward in rewards]
    table = torch.stack(columns, 1) if columns else torch.zeros(len(images), 0)
    return Scores(table, tuple(reward.name for reward in rewards))

"""The only denoising loop: training, value pretraining, evaluation, steering and serving all sample here."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from latentac.critic import ValueFunction
from latentac.method.diffusion import GaussianTransition, num_stochastic_steps
from latentac.method.records import Conditioning, Guidance, Scores, Trajectory
from latentac.rewards.configured import ConfiguredReward
from latentac.sampling.policy import Policy
from latentac.sampling.steering import Guide, Steering, SteeringState
from latentac.worlds.prompts import Prompt

Observer = Callable[[int, Tensor], None]
"""Told of each step, and of the values of its states: [B, N, M], B images of N candidates, in each reward's own unit.
What it raises ends the rollout."""


def rollout(
    policy: Policy,
    critic: ValueFunction | None,
    prompts: Sequence[str],
    conditioning: Conditioning,
    noise: Tensor,
    *,
    steering: Steering | None = None,
    uniforms: Tensor | None = None,
    policy_version: int = 0,
    keep_features: bool = False,
    value_weights: Tensor | None = None,
    observe: Observer | None = None,
) -> Trajectory:
    """Denoise from `noise`, [B, K+1, *latent] standard normal, whose entry k + 1 is the draw of step k.

    The schedule follows from K. Steered log-probs are those of the policy, not of the steered transition.
    uniforms: [B / N, K] from U(0, 1), for steering with N > 1 candidates an image, which are consecutive rows. A row
    that goes on from another one has that one's past.
    keep_features: what the critic sees of each state is kept with it, to learn from.
    value_weights: [M], asks for the gradient of the values with each reward's head weighted so; a step then costs three
    forwards.
    observe: told of each step's values as soon as they are known, before any candidate goes on from another.

    Steering needs a state's value before the next one is drawn, and so does an observer. Without them the critic is
    asked once, at the end, about all states: small products cost more to start than to do.
    """
    num_steps = noise.shape[1] - 1
    sigmas = policy.backbone.schedule(num_steps).to(noise.device)
    num_stochastic = num_stochastic_steps(policy.kernel, sigmas)
    guide, steered = _begin(steering, uniforms, noise, observe)
    latents: list[Tensor] = [noise[:, 0]]
    means: list[Tensor] = []
    log_probs: list[Tensor] = []
    values: list[Tensor] = []
    gradients: dict[int, Tensor] = {}
    features: dict[str, list[Tensor]] = {}
    for step in range(num_steps):
        state = latents[-1].detach()
        sigma, sigma_next = sigmas[step].expand(len(state)), sigmas[step + 1].expand(len(state))
        weights = value_weights if 0 < step <= num_stochastic else None
        needs_gradient = weights is not None or (step in steered and steering is not None and steering.needs_gradient)
        with torch.set_grad_enabled(needs_gradient):
            state.requires_grad_(needs_gradient)
            output = policy.forward(state, sigma, sigma_next, conditioning)
            seen = critic.features(state, output.prediction, output.taps) if critic is not None else {}
            transition = proposal = output.transition
            if weights is not None and critic is not None:
                weighted = critic.standardised(seen, sigma, conditioning) @ weights
                (gradients[step - 1],) = torch.autograd.grad(weighted.sum(), state)
            if guide is not None:
                value = _standardised(critic, seen, sigma, conditioning)
                values.append(value.detach())
                _tell(observe, step, values[-1], critic, steering)
                transition, proposal, rows = _steered(
                    guide if step in steered else Guide(), SteeringState(step, state, transition, value)
                )
                if rows is not None:
                    seen = {name: feature[rows] for name, feature in seen.items()}
                    for past in (latents, means, log_probs, values, *features.values()):
                        past[:] = [each[rows] for each in past]
        with torch.no_grad():
            latents.append(proposal.sample(noise[:, step + 1]).detach())
            if guide is not None:
                guide.moved(transition, proposal, latents[-1])
            if step < num_stochastic:
                means.append(transition.mean.detach())
                log_probs.append(transition.log_prob(latents[-1]).detach())
            for name, feature in seen.items() if keep_features or guide is None else ():
                features.setdefault(name, []).append(feature.detach())
    kept = {name: torch.stack(steps, 1) for name, steps in features.items()}
    return Trajectory(
        prompts=prompts,
        conditioning=conditioning,
        latents=torch.stack(latents, 1).detach(),
        sigmas=sigmas,
        means=torch.stack(means, 1) if means else noise.new_zeros(len(noise), 0, *noise.shape[2:]),
        log_probs=torch.stack(log_probs, 1) if log_probs else noise.new_zeros(len(noise), 0),
        values=_values(critic, kept, values, sigmas[:-1], conditioning, noise),
        policy_version=policy_version,
        features=kept if keep_features else {},
        guidance=_guidance(gradients, num_stochastic, noise) if gradients else None,
    )


def _begin(
    steering: Steering | None, uniforms: Tensor | None, noise: Tensor, observe: Observer | None
) -> tuple[Guide | None, range]:
    """The guide, and the steps at which it acts. Who only observes has one that never does."""
    num_steps = noise.shape[1] - 1
    if steering is None:
        return None if observe is None else Guide(), range(0)
    if uniforms is None:
        if steering.candidates > 1:
            raise ValueError(f"{steering.candidates} candidates an image need uniforms, [images, steps]")
        uniforms = noise.new_zeros(len(noise), num_steps)  # one candidate alone is never resampled
    return steering.begin(uniforms), steering.steps(num_steps)


def _standardised(
    critic: ValueFunction | None, features: dict[str, Tensor], sigma: Tensor, conditioning: Conditioning
) -> Tensor:
    """[B, M], with the graph to the latents; without a critic M is 0."""
    return sigma.new_zeros(len(sigma), 0) if critic is None else critic.standardised(features, sigma, conditioning)


def _tell(
    observe: Observer | None, step: int, values: Tensor, critic: ValueFunction | None, steering: Steering | None
) -> None:
    if observe is not None:
        told = values if critic is None else critic.unstandardise(values)
        observe(step, told.unflatten(0, (-1, steering.candidates if steering else 1)))


def _steered(guide: Guide, state: SteeringState) -> tuple[GaussianTransition, GaussianTransition, Tensor | None]:
    """The policy's transition, the proposal, and the rows that they go on from, if not from their own."""
    proposal, rows = guide.guide(state), guide.resample(state)
    if rows is None:
        return state.transition, proposal, None
    transition = state.transition.rows(rows)
    return transition, transition if proposal is state.transition else proposal.rows(rows), rows


def _guidance(gradients: dict[int, Tensor], num_stochastic: int, noise: Tensor) -> Guidance:
    """`gradients`: stochastic step -> [B, *latent]."""
    nothing = torch.zeros_like(noise[:, 0])
    known = torch.tensor([step in gradients for step in range(num_stochastic)], device=noise.device)
    stacked = torch.stack([gradients.get(step, nothing) for step in range(num_stochastic)], 1)
    return Guidance(stacked, known.expand(len(noise), -1))


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
    prompts: Sequence[str],
    conditioning: Conditioning,
    noise: Tensor,
    steering: Steering,
    uniforms: Tensor,
    observe: Observer | None = None,
    judge: Callable[[Trajectory], Tensor] | None = None,
) -> Trajectory:
    """One trajectory an image, chosen among `steering.candidates`. noise: [B, N, K+1, *latent], N = candidates;
    uniforms: [B, K]; observe: as in `rollout`.

    judge: says what is chosen by, standardised values [B N, M] of the candidates' trajectories; if None, those of the
    critic at the last denoised state.
    """
    images, candidates = noise.shape[:2]
    repeated = torch.arange(images, device=noise.device).repeat_interleave(candidates)
    trajectory = rollout(
        policy,
        critic,
        [prompt for prompt in prompts for _ in range(candidates)],
        conditioning.rows(repeated),
        noise.flatten(0, 1),
        steering=steering,
        uniforms=uniforms,
        observe=observe,
    )
    last = critic.standardise(trajectory.values[:, -1]) if judge is None else judge(trajectory)
    chosen = steering.select(last.unflatten(0, (images, candidates)))
    rows = torch.arange(images, device=noise.device) * candidates + chosen
    return trajectory.rows(rows)


def score(rewards: Sequence[ConfiguredReward], images: np.ndarray, prompts: Sequence[Prompt]) -> Scores:
    """Every reward of every picture. images: uint8 [B, H, W, 3]. Raises RewardError by name."""
    columns = [torch.from_numpy(reward(images, prompts)) for reward in rewards]
    table = torch.stack(columns, 1) if columns else torch.zeros(len(images), 0)
    return Scores(table, tuple(reward.name for reward in rewards))

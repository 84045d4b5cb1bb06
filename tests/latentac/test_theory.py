"""Critic, gradient and steering against the closed forms of a linear-Gaussian chain (method tests 4, 5, 8 and 15)."""

import pytest
import torch
from torch import Tensor

from latentac.config.fields import merge
from latentac.config.recipes import RECIPES
from latentac.config.validation import resolve
from latentac.critic import Critic
from latentac.method.diffusion import alpha_of, broadcast, forward_noise
from latentac.method.losses import clipped_surrogate, value_gradient_loss
from latentac.method.records import flatten_steps
from latentac.method.returns import explained_variance, gae
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import Keep, rollout
from latentac.sampling.steering import STEERING
from latentac.sampling.steering.run import SteeringRun
from latentac.training.value_pretraining import States, fit, predict
from tests.latentac.worlds import NOISY, REWARD, STEPS, AnalyticCritic, GaussianBackbone, affine_steps


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, STEPS + 1, 1, 1, 1, generator=torch.Generator().manual_seed(seed))


def roll(policy: Policy, critic, count: int, seed: int, steering=None, **settings):
    prompts = [""] * count
    conditioning = policy.backbone.encode(prompts)
    return rollout(
        policy,
        critic,
        conditioning,
        noise(count, seed),
        steering=SteeringRun(steering) if steering else None,
        **settings,
    )


def states(policy: Policy, critic: Critic, count: int, seed: int) -> States:
    """Rollouts as value pretraining collects them."""
    trajectory = roll(policy, critic, count, seed, keep=Keep(features=True))
    rewards = REWARD(trajectory.clean.flatten(1))
    return States(
        dict(trajectory.features),
        trajectory.clean,
        trajectory.sigmas[:-1],
        trajectory.conditioning,
        rewards,
        torch.arange(count),
    )


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
def test_the_analytic_value_is_the_mean_reward_from_each_state(kernel):
    """E[R - V_k] = 0 and V_k explains more the later the step: the closed form describes the product's own rollout."""
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    trajectory = roll(policy, AnalyticCritic(policy.backbone, kernel), 20000, seed=1)
    rewards = REWARD(trajectory.clean.flatten())
    residual = rewards[:, None] - trajectory.values[..., 0]
    assert float(residual.mean(0).abs().max()) < 4 * float(rewards.std()) / 20000**0.5
    explained = explained_variance(trajectory.values[..., 0], rewards)
    assert bool((explained.diff() > -0.01).all())
    assert float(explained[-1]) > 0.5 > float(explained[0])


def fitted(policy: Policy, forward_noised: float) -> Critic:
    """A critic after value pretraining. Its targets are not clamped, for those of V* are not either."""
    body = {"width": 32, "num_heads": 2, "num_queries": 1, "text_conditioning": False, "dropout": 0.0}
    settings = {
        "critic": {"body": body, "learning_rate": 1e-2, "target_clip": 99.0},
        "pretrain": {"num_passes": 3, "minibatch_states": 512, "forward_noised": forward_noised},
    }
    config = resolve(merge(RECIPES["shapes-unet"], settings))
    torch.manual_seed(0)
    critic = Critic(policy.backbone, ("reward",), config.critic)
    learnt, held_out = states(policy, critic, 4096, seed=1), states(policy, critic, 64, seed=2)
    fit(config.pretrain, policy, critic, learnt, held_out, seed=config.seed, weights=[1.0])
    return critic


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
def test_a_trained_critic_reaches_the_analytic_explained_variance(kernel):
    """Regression on rollouts comes within 0.02 of V* at each denoising step, on fresh rollouts."""
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    critic = fitted(policy, forward_noised=0.0)
    fresh = states(policy, critic, 4096, seed=3)
    exact = roll(policy, AnalyticCritic(policy.backbone, kernel), 4096, seed=3).values[..., 0]
    trained, analytic = (
        explained_variance(values, fresh.rewards[:, 0]) for values in (predict(critic, fresh, 256)[..., 0], exact)
    )
    assert float((trained - analytic).abs().max()) < 0.02, f"trained {trained.tolist()}, analytic {analytic.tolist()}"


def test_a_critic_of_forward_noised_images_is_the_posterior_mean_of_the_reward():
    """With fresh noise on scored images alone it learns E[R(x0) | x_t], which is a quadratic of x_t here, to 0.04 of
    explained variance at each noise level."""
    kernel = KERNELS.build("ddim", noise=1.0)
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    critic = fitted(policy, forward_noised=1.0)
    clean = roll(policy, None, 4096, seed=3).clean
    mean, variance, rewards = float(clean.mean()), float(clean.var()), REWARD(clean.flatten())
    for index, sigma in enumerate(policy.backbone.schedule(STEPS)[:-1]):
        level = sigma.expand(len(clean))
        latents = forward_noise(clean, noise(len(clean), 10 + index)[:, 0], level, kernel.path)
        alpha = float(alpha_of(sigma, kernel.path))
        total = alpha**2 * variance + float(sigma) ** 2
        posterior = mean + alpha * variance / total * (latents.flatten() - alpha * mean)
        exact = REWARD(posterior) + REWARD.p / 2 * variance * float(sigma) ** 2 / total
        conditioning = policy.backbone.encode([""] * len(clean))
        with torch.no_grad():
            prediction, taps = policy.backbone.predict(latents, level, conditioning)
            values = critic(critic.features(latents, prediction, taps), level, conditioning)
        found, expected = explained_variance(torch.stack([values[:, 0], exact], 1), rewards).tolist()
        assert abs(found - expected) < 0.04, f"step {index}: trained {found}, analytic {expected}"


def gradients(policy: Policy, trajectory, advantages: Tensor) -> Tensor:
    """[B], each rollout's estimate of dE[R]/dtheta, for an offset theta of every stochastic step's mean, from the loss
    that trains the policy. advantages: [B, S]."""
    images, steps = advantages.shape
    rows = torch.arange(images * steps)
    batch = flatten_steps(trajectory, advantages, rows // steps, rows % steps)
    theta = torch.zeros(images, requires_grad=True)
    transition = policy.transition(batch.latents, batch.sigma, batch.sigma_next, batch.conditioning)
    moved = transition.shifted(theta[rows // steps].reshape(-1, 1, 1, 1))
    surrogate = clipped_surrogate(moved.log_prob(batch.next_latents) - batch.old_log_probs, batch.advantages, 0.2)
    (gradient,) = torch.autograd.grad(surrogate.loss, theta)
    return -gradient * images * steps


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
def test_the_policy_gradient_is_that_of_the_mean_reward(kernel):
    """The loss's gradient estimates the analytic dE[R]/dtheta, with the reward alone and with the baseline V*, and V*
    takes away a good part of its variance."""
    backbone, count = GaussianBackbone(kernel.path), 20000
    policy = Policy(backbone, kernel)
    trajectory = roll(policy, AnalyticCritic(policy.backbone, kernel), count, seed=5)
    rewards, stochastic = REWARD(trajectory.clean.flatten(1)), trajectory.num_stochastic_steps

    steps = affine_steps(backbone, kernel, STEPS)
    mean, variance, moved = 0.0, 1.0, 0.0  # of x, which begins as N(0, 1), and d mean / d theta
    for index, step in enumerate(steps):
        mean, variance = step.slope * mean + step.offset, step.slope**2 * variance + step.std**2
        moved = step.slope * moved + (index < stochastic)
    expected = (REWARD.p * mean + REWARD.q) * moved

    plain = gradients(policy, trajectory, rewards.expand(-1, stochastic))
    advantages, _ = gae(rewards, trajectory.values[:, :stochastic], 1.0, 1.0)
    reduced = gradients(policy, trajectory, advantages[..., 0])
    for estimate in (plain, reduced):
        assert abs(float(estimate.mean()) - expected) < 4 * float(estimate.std()) / count**0.5
    assert float(reduced.var()) < 0.8 * float(plain.var())


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
def test_the_values_gradient_is_the_policy_gradient_without_its_noise(kernel):
    """The gradient of V* gives the analytic dE[R]/dtheta too (Stein's identity), and its variance is less than half of
    the best likelihood-ratio estimate's. Its optimum is the steered policy, where it has no gradient left."""
    policy, count = Policy(GaussianBackbone(kernel.path), kernel), 20000
    critic = AnalyticCritic(policy.backbone, kernel)
    trajectory = roll(policy, critic, count, seed=5, keep=Keep(value_gradient=torch.ones(1)))
    stochastic = trajectory.num_stochastic_steps
    assert trajectory.value_gradients is not None
    known = trajectory.value_gradients.known[0]
    assert bool(known[: STEPS - 1].all())  # a step that leads to the image itself has no value behind it
    assert len(known) == stochastic
    rewards = REWARD(trajectory.clean.flatten(1))
    advantages, _ = gae(rewards, trajectory.values[:, :stochastic], 1.0, 1.0)
    noisy = gradients(policy, trajectory, advantages[..., 0] * known)

    rows = torch.arange(count * stochastic)
    batch = flatten_steps(trajectory, advantages[..., 0], rows // stochastic, rows % stochastic)
    value_gradients = batch.value_gradients
    assert value_gradients is not None
    theta = torch.zeros(len(batch.latents), 1, 1, 1, requires_grad=True)
    transition = policy.transition(batch.latents, batch.sigma, batch.sigma_next, batch.conditioning)
    loss = value_gradient_loss(transition.shifted(theta), batch.old_means, value_gradients, 1.0)
    (pathwise,) = torch.autograd.grad(-loss * len(theta), theta)
    pathwise = pathwise.reshape(count, stochastic).sum(1)
    error = 4 * (float(noisy.var()) / count + float(pathwise.var()) / count) ** 0.5
    assert abs(float(pathwise.mean()) - float(noisy.mean())) < error
    assert float(pathwise.var()) < 0.5 * float(noisy.var())

    steered = transition.shifted(broadcast(transition.std**2, batch.latents) * value_gradients.gradients)
    assert float(value_gradient_loss(steered, batch.old_means, value_gradients, 1.0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
def test_steering_up_the_value_raises_the_reward_and_down_lowers_it(kernel):
    """The sign trap: with V*, plus must beat the plain rollout and minus must lose to it."""
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    critic = AnalyticCritic(policy.backbone, kernel)

    def mean_reward(strength: float) -> float:
        steering = STEERING.build("value_gradient", torch.tensor([strength]), 1)
        return float(REWARD(roll(policy, critic, 4000, 3, steering).clean.flatten()).mean())

    assert mean_reward(1.0) > mean_reward(0.0) + 0.03
    assert mean_reward(-1.0) < mean_reward(0.0) - 0.03


@pytest.mark.parametrize("kernel", NOISY, ids=repr)
@pytest.mark.parametrize(("method", "weight"), [("value_gradient", 0.0), ("best_of_n", 1.0)], ids=["grad", "best"])
def test_strength_0_is_bitwise_the_plain_rollout(kernel, method, weight):
    """Steering that asks for nothing changes nothing: latents and log-probs. Values are asked for all states at once in
    one and step by step in the other: equal to float error."""
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    critic = AnalyticCritic(policy.backbone, kernel)
    steering = STEERING.build(method, torch.tensor([weight]), 1)
    plain, steered = roll(policy, critic, 64, 4), roll(policy, critic, 64, 4, steering)
    assert torch.equal(plain.latents, steered.latents)
    assert torch.equal(plain.log_probs, steered.log_probs)
    torch.testing.assert_close(plain.values, steered.values)


def test_best_of_n_keeps_the_particle_with_the_highest_value():
    """By the weighted sum of the heads at the last state."""
    values = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [0.0, 1.0]]])
    assert STEERING.build("best_of_n", torch.tensor([1.0, 1.0]), 2).select(values).tolist() == [1, 0]
    assert STEERING.build("best_of_n", torch.tensor([1.0, 0.0]), 2).select(values).tolist() == [0, 0]

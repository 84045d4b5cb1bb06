"""The critic and steering against the analytic value function of a linear-Gaussian chain (method test 4 and 15)."""

import pytest
import torch
from torch import nn

from latentac.config import Pretrain, merge, resolve
from latentac.critic import Critic
from latentac.diffusion import CPS, DDIM, FlowSDE
from latentac.policy import Policy
from latentac.pretraining import States, fit, predict
from latentac.recipes import RECIPES
from latentac.returns import explained_variance
from latentac.rollout import rollout
from latentac.steering.best_of_n import BestOfN
from latentac.steering.value_gradient import ValueGradient
from tests.latentac.worlds import GaussianBackbone, Quadratic, affine_steps, analytic_values

REWARD = Quadratic(-2.0, 1.0, 0.5)
STEPS = 8
KERNELS = [DDIM(1.0), FlowSDE(0.7), CPS(0.5)]


class AnalyticCritic(nn.Module):
    """V* as a critic: what the trained one approximates."""

    def __init__(self, backbone, kernel):
        super().__init__()
        self.mean, self.std = torch.zeros(1), torch.ones(1)
        self.sigmas = backbone.schedule(STEPS)[:-1]
        self.values = analytic_values(affine_steps(backbone, kernel, STEPS), REWARD)

    def standardised(self, taps, sigma, conditioning):
        step = int((self.sigmas - sigma[0]).abs().argmin())
        return self.values[step](taps["state"][:, :1, 0, 0])


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, STEPS + 1, 1, 1, 1, generator=torch.Generator().manual_seed(seed))


def roll(policy: Policy, critic, count: int, seed: int, steering=None):
    prompts = [""] * count
    return rollout(policy, critic, prompts, policy.backbone.encode(prompts), noise(count, seed), steering=steering)


def states(policy: Policy, count: int, seed: int) -> States:
    """Rollouts as value pretraining collects them."""
    taps = []
    prompts = [""] * count
    conditioning = policy.backbone.encode(prompts)
    trajectory = rollout(
        policy, None, prompts, conditioning, noise(count, seed), observe=lambda output: taps.append(output.taps)
    )
    rewards = REWARD(trajectory.clean.flatten(1))
    return States(
        {"state": torch.stack([tap["state"] for tap in taps], 1)}, trajectory.sigmas[:-1], conditioning.tokens, rewards
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_the_analytic_value_is_the_mean_reward_from_each_state(kernel):
    """E[R - V_k] = 0 and V_k explains more the later the step: the closed form describes the product's own rollout."""
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    trajectory = roll(policy, AnalyticCritic(policy.backbone, kernel), 20000, seed=1)
    rewards = REWARD(trajectory.clean.flatten())
    residual = rewards[:, None] - trajectory.values[..., 0]
    assert float(residual.mean(0).abs().max()) < 4 * float(rewards.std()) / 20000**0.5
    explained = explained_variance(trajectory.values[..., 0], rewards)
    assert bool((explained.diff() > -0.01).all())
    assert float(explained[-1]) > 0.9 > 0.1 > float(explained[0])


def test_a_trained_critic_reaches_the_analytic_explained_variance():
    """Regression on rollouts comes within 0.02 of V* at each denoising step, on fresh rollouts."""
    kernel = DDIM(1.0)
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    settings = {"critic": {"width": 32, "num_heads": 2, "num_queries": 1, "learning_rate": 3e-3}}
    config = resolve(merge(RECIPES["shapes-unet"], settings))
    config = config.model_copy(update={"pretrain": Pretrain(num_passes=6, minibatch_states=1024)})
    torch.manual_seed(0)
    critic = Critic(policy.backbone.tap_shapes, 1, ("reward",), 32, 2, 1)
    fresh = states(policy, 4096, seed=2)
    fit(config, critic, states(policy, 4096, seed=1), fresh, 0)
    trained = explained_variance(predict(critic, fresh)[..., 0], fresh.rewards[:, 0])
    exact = roll(policy, AnalyticCritic(policy.backbone, kernel), 4096, seed=2).values[..., 0]
    analytic = explained_variance(exact, fresh.rewards[:, 0])
    assert float((trained - analytic).abs().max()) < 0.02, f"trained {trained.tolist()}, analytic {analytic.tolist()}"


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_steering_up_the_value_raises_the_reward_and_down_lowers_it(kernel):
    """The sign trap: with V*, plus must beat the plain rollout and minus must lose to it."""
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    critic = AnalyticCritic(policy.backbone, kernel)

    def mean_reward(strength: float) -> float:
        steering = ValueGradient(torch.tensor([strength]))
        return float(REWARD(roll(policy, critic, 4000, 3, steering).clean.flatten()).mean())

    assert mean_reward(1.0) > mean_reward(0.0) + 0.03
    assert mean_reward(-1.0) < mean_reward(0.0) - 0.03


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("steering", [ValueGradient(torch.zeros(1)), BestOfN(torch.ones(1), 1)], ids=["grad", "best"])
def test_strength_0_is_bitwise_the_plain_rollout(kernel, steering):
    """Steering that asks for nothing changes nothing: latents, log-probs and values."""
    policy = Policy(GaussianBackbone(kernel.path), kernel)
    critic = AnalyticCritic(policy.backbone, kernel)
    plain, steered = roll(policy, critic, 64, 4), roll(policy, critic, 64, 4, steering)
    assert torch.equal(plain.latents, steered.latents)
    assert torch.equal(plain.log_probs, steered.log_probs)
    assert torch.equal(plain.values, steered.values)


def test_best_of_n_keeps_the_candidate_with_the_highest_value():
    """By the weighted sum of the heads at the last state."""
    values = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[2.0, 0.0], [0.0, 1.0]]])
    assert BestOfN(torch.tensor([1.0, 1.0]), 2).select(values).tolist() == [1, 0]
    assert BestOfN(torch.tensor([1.0, 0.0]), 2).select(values).tolist() == [0, 0]

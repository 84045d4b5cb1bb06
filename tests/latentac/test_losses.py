"""Objectives: what raises a likelihood, what is clipped, what is measured."""

import torch

from latentac.diffusion import GaussianTransition
from latentac.losses import clipped_surrogate, transition_kl, value_loss


def test_the_gradient_at_ratio_1_is_the_policy_gradient():
    """Before the first update d loss / d log_prob = -A / N."""
    log_probs = torch.tensor([-3.0, -1.0, 2.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    surrogate = clipped_surrogate(log_probs, log_probs.detach(), advantages, 0.2)
    surrogate.loss.backward()
    torch.testing.assert_close(log_probs.grad, -advantages / 3)
    assert torch.equal(surrogate.ratio, torch.ones(3))
    assert float(surrogate.clip_share) == 0


def test_the_clip_stops_what_went_far_enough_and_nothing_else():
    """Beyond the clip in the advantage's direction there is no gradient; against it there is."""
    old = torch.zeros(4)
    log_probs = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    surrogate = clipped_surrogate(log_probs, old, advantages, 0.2)
    surrogate.loss.backward()
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad[:2], torch.zeros(2))
    assert bool((log_probs.grad[2:].abs() > 0).all())
    assert float(surrogate.clip_share) == 0.5


def test_value_targets_are_clamped_and_predictions_are_not():
    """The gradient of a prediction beyond the clamp still points back."""
    values = torch.tensor([[7.0]], requires_grad=True)
    loss = value_loss(values, torch.tensor([[100.0]]), 5.0)
    loss.backward()
    assert float(loss.detach()) == 0.5 * (7 - 5) ** 2
    assert values.grad is not None
    assert float(values.grad) == 2.0


def test_kl_is_that_of_two_normals_and_has_a_gradient():
    """Against torch.distributions, and a KL that trains nothing would be no KL."""
    mean = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    std = torch.tensor([0.5, 1.0, 2.0])
    p, q = GaussianTransition(mean, std), GaussianTransition(torch.zeros(3, 2, 2, 2), std)
    normal = torch.distributions.Normal
    wide = std[:, None, None, None]
    expected = torch.distributions.kl_divergence(normal(mean, wide), normal(torch.zeros_like(mean), wide))
    kl = transition_kl(p, q)
    torch.testing.assert_close(kl, expected.sum((1, 2, 3)))
    kl.sum().backward()
    assert mean.grad is not None
    assert float(mean.grad.abs().min()) > 0

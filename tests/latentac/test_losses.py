"""Objectives: what raises a likelihood, what is clipped, what is measured."""

import torch

from latentac.method.diffusion import GaussianTransition, Prediction
from latentac.method.losses import clipped_surrogate, prediction_kl, transition_kl, value_loss


def test_the_gradient_at_ratio_1_is_the_policy_gradient():
    """Before the first update d loss / d log_prob = -A / N."""
    log_ratio = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    surrogate = clipped_surrogate(log_ratio, advantages, 0.2)
    surrogate.loss.backward()
    torch.testing.assert_close(log_ratio.grad, -advantages / 3)
    assert torch.equal(surrogate.ratio, torch.ones(3))
    assert float(surrogate.clip_share) == 0


def test_the_clip_stops_what_went_far_enough_and_nothing_else():
    """Beyond the clip in the advantage's direction there is no gradient; against it there is."""
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    surrogate = clipped_surrogate(log_ratio, advantages, 0.2)
    surrogate.loss.backward()
    assert log_ratio.grad is not None
    assert torch.equal(log_ratio.grad[:2], torch.zeros(2))
    assert bool((log_ratio.grad[2:].abs() > 0).all())
    assert float(surrogate.clip_share) == 0.5


def test_value_targets_are_clamped_and_predictions_are_not():
    """The gradient of a prediction beyond the clamp still points back."""
    values = torch.tensor([[7.0]], requires_grad=True)
    loss = value_loss(values, torch.tensor([[100.0]]), 5.0)
    loss.backward()
    assert float(loss.detach()) == 0.5 * (7 - 5) ** 2
    assert values.grad is not None
    assert float(values.grad) == 2.0


def test_value_weights_say_how_much_each_reward_counts():
    """The weighted mean over the rewards; all alike is the plain mean, and 0 leaves a reward out."""
    values, returns = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.zeros(2, 2)
    assert float(value_loss(values, returns, 5.0)) == 0.5 * (1 + 4 + 0 + 16) / 4
    assert float(value_loss(values, returns, 5.0, torch.tensor([2.0, 2.0]))) == 0.5 * (1 + 4 + 0 + 16) / 4
    assert float(value_loss(values, returns, 5.0, torch.tensor([3.0, 0.0]))) == 0.5 * (1 + 0) / 2


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


def test_the_prediction_kl_is_in_what_the_denoiser_predicts():
    """Of the noise where that is predicted, of the velocity n - x0 for flows; by hand, with a gradient that leads back
    to the reference, and 0 at it."""
    clean, noise = torch.full((2, 1, 2, 2), 3.0, requires_grad=True), torch.full((2, 1, 2, 2), 2.0, requires_grad=True)
    prediction, reference = Prediction(clean, noise), Prediction(torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2))
    assert float(prediction_kl(prediction, reference, "variance_preserving").detach()) == 1
    drift = prediction_kl(prediction, reference, "flow")
    assert float(drift.detach()) == ((2 - 3) - (1 - 1)) ** 2
    drift.backward()
    assert clean.grad is not None
    assert noise.grad is not None
    torch.testing.assert_close(noise.grad, torch.full((2, 1, 2, 2), 2 * -1.0 / 8))
    torch.testing.assert_close(clean.grad, torch.full((2, 1, 2, 2), 2 * 1.0 / 8))
    assert float(prediction_kl(reference, reference, "flow")) == 0

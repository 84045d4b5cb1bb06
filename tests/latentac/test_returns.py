"""Credit: advantages against brute force, and the scales that whitening leaves."""

import pytest
import torch

from latentac.method.returns import combine, explained_variance, gae, group_advantages, rank_correlation, whiten


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_gae_is_the_brute_force_sum(gae_lambda, discount):
    """A_k = sum over j >= k of (discount lambda)^(j-k) d_j, by the O(S^2) double loop."""
    reward, values = draw(4, 2), draw(4, 7, 2, seed=1)
    padded = torch.cat([values, torch.zeros(4, 1, 2)], 1)
    deltas = discount * padded[:, 1:] - padded[:, :-1]
    deltas[:, -1] += reward
    expected = torch.zeros_like(values)
    for k in range(7):
        for j in range(k, 7):
            expected[:, k] += (discount * gae_lambda) ** (j - k) * deltas[:, j]
    advantages, returns = gae(reward, values, discount, gae_lambda)
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, expected + values, rtol=1e-5, atol=1e-5)


def test_without_discount_the_return_is_the_reward():
    """With discount = lambda = 1 every state's target is the trajectory's reward."""
    reward, values = draw(3, 2), draw(3, 5, 2, seed=1)
    _, returns = gae(reward, values, 1.0, 1.0)
    torch.testing.assert_close(returns, reward[:, None].expand(3, 5, 2), rtol=1e-5, atol=1e-5)


def test_group_advantages_compare_within_a_prompt():
    """Each group is centred and scaled by itself; a group without spread teaches nothing; a group of one is refused."""
    rewards = torch.tensor([[1.0, 2.0], [3.0, 2.0], [10.0, 4.0], [30.0, 3.0], [5.0, 0.1], [5.0, 0.1]])
    advantages, found = group_advantages(rewards, 2)
    expected = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, expected != 0)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(rewards, 1)


def test_whitening_gives_mean_0_and_std_1():
    """And a constant stays finite."""
    whitened = whiten(3 + 5 * draw(50, 4))
    assert abs(float(whitened.mean())) < 1e-5
    assert abs(float(whitened.std(correction=0)) - 1) < 1e-5
    assert torch.equal(whiten(torch.ones(4)), torch.zeros(4))


def test_whitening_along_an_axis_is_that_of_each_slice():
    """And a slice that is constant becomes zeros."""
    x = draw(20, 3) * torch.tensor([1.0, 5.0, 0.0]) + 2
    found = whiten(x, dim=0)
    for column in range(3):
        torch.testing.assert_close(found[:, column], whiten(x[:, column]))
    assert torch.equal(found[:, 2], torch.zeros(20))


def test_combination_does_not_depend_on_a_rewards_unit():
    """A reward given in thousandths counts as much as before; a weight of 0 removes it; the clip holds."""
    advantages = draw(64, 3, 2)
    weights = torch.tensor([1.0, 1.0])
    scaled = advantages * torch.tensor([1.0, 1000.0])
    torch.testing.assert_close(combine(advantages, weights, 10.0), combine(scaled, weights, 10.0), rtol=1e-4, atol=1e-4)
    alone = combine(advantages, torch.tensor([1.0, 0.0]), 10.0)
    torch.testing.assert_close(alone, whiten(advantages[..., 0]), rtol=1e-4, atol=1e-4)
    assert float(combine(advantages, weights, 0.5).abs().max()) <= 0.5


def test_combination_by_the_plain_sum_and_by_step():
    """Without by_head the weighted sum is whitened as it is; per_step whitens the images of each step among
    themselves, rewards first."""
    advantages, weights = draw(64, 3, 2) * torch.tensor([1.0, 10.0, 100.0])[:, None], torch.tensor([1.0, 2.0])
    plain = combine(advantages, weights, 10.0, by_head=False)
    torch.testing.assert_close(plain, whiten(advantages @ weights))
    apart = combine(advantages, weights, 10.0, per_step=True)
    for step in range(3):
        alone = combine(advantages[:, step : step + 1], weights, 10.0)
        torch.testing.assert_close(apart[:, step], alone[:, 0], rtol=1e-4, atol=1e-4)


def test_rank_correlation_at_its_fixed_points():
    """Over the pairs within a group: 1 where values order them as rewards do, -1 the other way about, 0 for a constant;
    pairs of equal reward and other groups do not count; by hand for one that is half right."""
    reward, groups = torch.tensor([1.0, 2.0, 5.0, 0.0, 0.0, 3.0]), torch.tensor([0, 0, 0, 1, 1, 2])
    values = torch.stack([reward * 10, -reward, torch.zeros(6), torch.tensor([2.0, 1.0, 3.0, 7.0, 8.0, 9.0])], 1)
    torch.testing.assert_close(rank_correlation(values, reward, groups), torch.tensor([1.0, -1.0, 0.0, 1 / 3]))
    assert torch.equal(rank_correlation(values, torch.ones(6), groups), torch.zeros(4))
    assert torch.equal(rank_correlation(values, reward, torch.arange(6)), torch.zeros(4))


def test_explained_variance_at_its_fixed_points():
    """1 for a perfect critic, 0 for a constant one, negative for one that adds error, 0 where nothing varies."""
    reward = draw(100)
    values = torch.stack([reward, torch.zeros(100), -reward], 1)
    torch.testing.assert_close(explained_variance(values, reward), torch.tensor([1.0, 0.0, -3.0]), rtol=1e-5, atol=1e-5)
    assert torch.equal(explained_variance(values, torch.ones(100)), torch.zeros(3))

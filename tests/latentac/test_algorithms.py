"""The algorithms: what every row of the table promises, and the credit of each by hand."""

import pytest
import torch

from latentac.method.diffusion import GaussianTransition
from latentac.method.losses import guarded_log_ratio, masked_surrogate, transition_kl
from latentac.method.records import Conditioning, Minibatch
from latentac.method.returns import gae, whiten
from latentac.training.algorithms import ALGORITHMS
from latentac.training.checkpoint import read_state, write_state
from tests.latentac.trainers import (
    BRIGHTNESS,
    REDNESS,
    SHIPPED,
    algorithm_of,
    credited,
    make_config,
    make_trainer,
    rolled_out,
)

TWO = [BRIGHTNESS, REDNESS]
LATENT = (2, 3, 3)
VARIANTS = [(ratio, region) for ratio in ("likelihood", "guard") for region in ("clip", "divergence")]


def algorithm(name, rewards=1, **settings):
    group = {"group_size": 2} if name == "grpo" else {}
    return algorithm_of(make_config(rewards=TWO[:rewards], algorithm={"use": name, **group, **settings}))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def minibatch(advantages, seed=0):
    """Transitions that were sampled from means of their own, with stds from small to large; and those stds."""
    count = len(advantages)
    std, means = torch.linspace(0.05, 1.0, count), draw(count, *LATENT, seed=seed)
    old = GaussianTransition(means, std)
    sampled = old.sample(draw(count, *LATENT, seed=seed + 1))
    level = torch.ones(count)
    conditioning = Conditioning(torch.zeros(count, 1, 1))
    batch = Minibatch(
        torch.zeros_like(means), sampled, level, level / 2, conditioning, means, old.log_prob(sampled), advantages
    )
    return batch, std


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@pytest.mark.parametrize(("ratio", "region"), VARIANTS)
def test_each_advantage_moves_the_log_prob_of_its_own_transition(name, ratio, region):
    """A step down the gradient makes transitions of positive advantage more likely, those of negative advantage less
    likely, and one of advantage 0 gets no gradient at all."""
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 0.0])
    batch, std = minibatch(advantages)
    mean = batch.old_means.clone().requires_grad_()
    made = algorithm(name, ratio=ratio, trust_region=region)
    loss = made.loss(GaussianTransition(mean, std), batch)
    loss.loss.backward()
    assert mean.grad is not None
    assert torch.equal(mean.grad.flatten(1).abs().sum(1) > 0, advantages != 0)
    size = mean.grad.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, 1, 1, 1)
    step = mean.detach() - 1e-3 * mean.grad / size
    change = GaussianTransition(step, std).log_prob(batch.next_latents) - batch.old_log_probs
    assert change.sign().tolist() == advantages.sign().tolist()
    assert float(loss.metrics["ratio_deviation"]) == 0
    assert float(loss.metrics["kl"]) == 0
    assert float(loss.metrics["clip_share"]) == 0


@pytest.mark.parametrize("backbone", SHIPPED)
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_positive_advantage_raises_the_log_prob_of_a_network(name, backbone):
    """One small step of the actor's optimizer on transitions of advantage 1 makes them all more likely."""
    group = {"group_size": 2} if name == "grpo" else {}
    trainer = make_trainer(
        backbone, algorithm={"use": name, **group}, policy={"learning_rate": 1e-5, "warmup_updates": 0}
    )
    block = credited(rolled_out(trainer, 0), 1.0)
    batch = trainer.policy_learner.minibatch(block, trainer.iteration, 0)
    trainer.policy_learner.add_gradient(batch)
    trainer.policy_learner.optimizer.step()
    with torch.no_grad():
        moved = trainer.policy.transition(batch.latents, batch.sigma, batch.sigma_next, batch.conditioning)
    assert bool((moved.log_prob(batch.next_latents) > batch.old_log_probs).all())


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@pytest.mark.parametrize("combination", ["by_head", "sum"])
def test_credit_is_one_finite_advantage_a_step_and_ignores_what_is_only_watched(name, combination):
    """[B, S], bounded; a reward of weight 0 changes not a bit of it, and neither does a constant added to a reward."""
    made = algorithm_of(
        make_config(
            rewards=[TWO[0], {**TWO[1], "weight": 0.0}],
            algorithm={"use": name, "combination": combination, "group_size": 2, "advantage_clip": 1.5},
        )
    )
    prompts = torch.arange(8) // 2
    rewards, values = draw(8, 2), draw(8, 3, 2, seed=1) if made.uses_critic else torch.zeros(8, 3, 0)
    credit = made.credit(rewards, values, prompts)
    assert credit.advantages.shape == (8, 3)
    assert bool(credit.advantages.isfinite().all())
    assert float(credit.advantages.abs().max()) <= 1.5
    assert credit.returns.shape == values.shape
    other = made.credit(torch.stack([rewards[:, 0], 7 * rewards[:, 1] + 3], 1), values, prompts)
    assert torch.equal(other.advantages, credit.advantages)
    torch.testing.assert_close(
        made.credit(rewards + 5, values + 5 if made.uses_critic else values, prompts).advantages,
        credit.advantages,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_rewards_unit_matters_only_to_a_plain_sum(name):
    """By head, a reward given in thousandths counts as before; summed raw, the larger one is all that counts."""
    prompts, scale = torch.arange(32) // 2, torch.tensor([1.0, 1000.0])
    rewards = draw(32, 2)
    found = {}
    for combination in ("by_head", "sum"):
        made = algorithm(name, 2, combination=combination)
        values = draw(32, 3, 2, seed=1) if made.uses_critic else torch.zeros(32, 3, 0)
        other = values * scale if made.uses_critic else values
        found[combination] = [
            made.credit(given, seen, prompts).advantages
            for given, seen in ((rewards, values), (rewards * scale, other))
        ]
    before, after = found["by_head"]
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)
    before, after = found["sum"]
    assert float((before - after).abs().max()) > 0.5
    alone = algorithm_of(
        make_config(rewards=[TWO[0], TWO[1]], algorithm={"use": name, "combination": "sum", "group_size": 2})
    )
    only = torch.stack([torch.zeros(32), rewards[:, 1]], 1)
    values = draw(32, 3, 2, seed=1) * torch.tensor([0.0, 1.0]) if alone.uses_critic else torch.zeros(32, 3, 0)
    torch.testing.assert_close(alone.credit(only, values, prompts).advantages, after, rtol=0.05, atol=0.05)


def test_ppo_credits_each_step_with_what_the_critic_did_not_expect():
    """Whitened R - V_k at lambda 1; the critic's own targets follow value_lambda, not gae_lambda."""
    rewards, values, prompts = draw(16, 1), draw(16, 4, 1, seed=1), torch.arange(16)
    credit = algorithm("ppo").credit(rewards, values, prompts)
    torch.testing.assert_close(credit.advantages, whiten(rewards - values[..., 0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(credit.returns, rewards[:, None].expand_as(values), rtol=1e-4, atol=1e-4)
    credit = algorithm("ppo", gae_lambda=0.5, value_lambda=0.9).credit(rewards, values, prompts)
    torch.testing.assert_close(credit.advantages, whiten(gae(rewards, values, 1.0, 0.5)[0][..., 0]))
    torch.testing.assert_close(credit.returns, gae(rewards, values, 1.0, 0.9)[1])


def test_each_step_can_be_whitened_for_itself():
    """Then every step's advantages have mean 0 and standard deviation 1 over the images, however noisy the step."""
    rewards, values = draw(64, 1), draw(64, 4, 1, seed=1) * torch.tensor([1.0, 3.0, 0.1, 10.0])[:, None]
    together = algorithm("ppo").credit(rewards, values, torch.arange(64)).advantages
    apart = algorithm("ppo", whitening="per_step").credit(rewards, values, torch.arange(64)).advantages
    assert float(together.std(0, correction=0).max() / together.std(0, correction=0).min()) > 3
    torch.testing.assert_close(apart.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(apart.std(0, correction=0), torch.ones(4), rtol=1e-4, atol=1e-4)


def test_grpo_drops_and_counts_groups_that_tell_nothing():
    """Two of four groups have equal rewards: they get 0, the others +-1 in their own unit, times 2 so that a mean over
    all transitions is one over theirs; the share is told. With no group left all is 0."""
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0, 10.0, 30.0, 0.1, 0.1])[:, None]
    prompts, values = torch.arange(8) // 2, torch.zeros(8, 3, 0)
    credit = algorithm("grpo").credit(rewards, values, prompts)
    expected = 2 * torch.tensor([-1.0, 1.0, 0.0, 0.0, -1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(credit.advantages, expected[:, None].expand(8, 3), rtol=1e-4, atol=1e-4)
    assert credit.metrics == {"zero_std_share": 0.5}
    credit = algorithm("grpo").credit(torch.ones(8, 1), values, prompts)
    assert torch.equal(credit.advantages, torch.zeros(8, 3))
    assert credit.metrics == {"zero_std_share": 1.0}


def test_a_group_has_information_if_one_trained_reward_has():
    """Of two rewards by head, one that is equal within a group leaves the group to the other; one that is only watched
    does not save it."""
    rewards = torch.tensor([[1.0, 4.0], [1.0, 8.0], [2.0, 5.0], [6.0, 5.0]])
    prompts, values = torch.arange(4) // 2, torch.zeros(4, 1, 0)
    assert algorithm("grpo", 2).credit(rewards, values, prompts).metrics == {"zero_std_share": 0.0}
    watched = make_config(rewards=[TWO[0], {**TWO[1], "weight": 0.0}], algorithm={"use": "grpo", "group_size": 2})
    credit = algorithm_of(watched).credit(rewards, values, prompts)
    assert credit.metrics == {"zero_std_share": 0.5}
    assert torch.equal(credit.advantages[:2], torch.zeros(2, 1))


def test_ddpo_compares_with_the_mean_of_all_images():
    """The whitened reward, the same at every step."""
    rewards = draw(16, 1)
    credit = algorithm("ddpo").credit(rewards, torch.zeros(16, 3, 0), torch.zeros(16, dtype=torch.int64))
    torch.testing.assert_close(credit.advantages, whiten(rewards).expand(16, 3), rtol=1e-4, atol=1e-4)


def test_ddpo_remembers_what_a_prompt_is_worth():
    """By hand: prompt 0 has two rewards after the first iteration, below the three that it takes, so the mean of the
    iteration stands in; after the second it has four, and their mean over both iterations is its baseline."""
    made = algorithm("ddpo", baseline="prompt", prompt_min_count=3)
    values = torch.zeros(4, 1, 0)
    first = torch.tensor([[1.0], [3.0], [10.0], [6.0]])
    credit = made.credit(first, values, torch.tensor([0, 0, 2, 1]))
    torch.testing.assert_close(credit.advantages, whiten(first - 5.0))
    second = torch.tensor([[2.0], [6.0], [11.0], [1.0]])
    credit = made.credit(second, values, torch.tensor([0, 0, 2, 4]))
    baseline = torch.tensor([[3.0], [3.0], [5.0], [5.0]])
    torch.testing.assert_close(credit.advantages, whiten(second - baseline))
    assert made.memory["count"].tolist() == [4, 1, 2, 0, 1]
    assert made.memory["total"].flatten().tolist() == [12, 6, 21, 0, 1]


def test_what_ddpo_remembers_is_in_the_checkpoint(tmp_path):
    """And a run that goes on from it ends bitwise as one that was not stopped."""
    settings = {"use": "ddpo", "baseline": "prompt", "prompt_min_count": 1}
    whole = make_trainer(algorithm=settings)
    whole.iterate()
    write_state(tmp_path / "state", *whole.state())
    whole.iterate()
    resumed = make_trainer(algorithm=settings)
    resumed.load_state(*read_state(tmp_path / "state"))
    resumed.iterate()
    assert set(whole.algorithm.memory) == {"count", "total"}
    expected, found = whole.state()[0], resumed.state()[0]
    assert set(expected) == set(found)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_the_guarded_ratio_has_mean_0_and_is_the_log_ratio_without_its_kl():
    """log r = n delta / std - delta^2 / (2 std^2), summed over D dimensions; that of GRPO-Guard is mean_D(n delta), so
    it is (log r + KL) std / D exactly. Under the old policy its mean is 0, where that of log r is -KL."""
    count = 20000
    mean, old_mean = 0.3 * draw(1, *LATENT), torch.zeros(1, *LATENT)
    for level in (0.2, 1.0):
        std = torch.full((count,), level)
        old = GaussianTransition(old_mean.expand(count, -1, -1, -1), std)
        new = GaussianTransition(mean.expand(count, -1, -1, -1), std)
        sampled = old.sample(draw(count, *LATENT, seed=1))
        log_ratio, kl = new.log_prob(sampled) - old.log_prob(sampled), transition_kl(old, new)
        bounded = guarded_log_ratio(new, old.mean, sampled)
        torch.testing.assert_close(bounded, (log_ratio + kl) * level / mean.numel(), rtol=1e-3, atol=1e-4)
        error = 4 / count**0.5
        assert abs(float(bounded.mean())) < error * float(bounded.std())
        assert abs(float(log_ratio.mean() + kl[0])) < error * float(log_ratio.std())
        assert float(kl[0]) > 0.5


def test_the_mask_drops_exactly_what_is_beyond_the_bound_and_moves_away():
    """Of eight terms, one for each side of the ratio, sign of the advantage and side of the bound, two are dropped:
    they give neither loss nor gradient; the others give -A r."""
    log_ratio = torch.tensor([0.1, 0.1, -0.1, -0.1] * 2, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0] * 2)
    divergence = torch.tensor([0.5] * 4 + [2.0] * 4)
    surrogate = masked_surrogate(log_ratio, advantages, divergence, 1.0)
    surrogate.loss.backward()
    kept = torch.tensor([True] * 4 + [False, True, True, False])
    ratio = log_ratio.detach().exp()
    torch.testing.assert_close(log_ratio.grad, -advantages * ratio * kept / 8)
    torch.testing.assert_close(surrogate.loss.detach(), (-advantages * ratio * kept).mean())
    assert float(surrogate.clip_share) == 0.25


def test_the_trust_region_is_in_the_unit_that_was_chosen():
    """Per dimension, a clip of c / D stops what c stops on the summed log-prob; a divergence bound is per dimension."""
    batch, std = minibatch(torch.ones(6))
    dimensions = batch.next_latents[0].numel()
    towards = 0.5 * std.reshape(-1, 1, 1, 1) * (batch.next_latents - batch.old_means)
    moved = GaussianTransition(batch.old_means + towards, std)
    log_ratio = moved.log_prob(batch.next_latents) - batch.old_log_probs
    clip = float(log_ratio.median())
    expected = float((log_ratio.exp() > 1 + clip).float().mean())
    assert 0 < expected < 1
    for scale, bound in (("sum", clip), ("mean", clip / dimensions)):
        share = algorithm("ppo", log_prob_scale=scale, clip=bound).loss(moved, batch).metrics["clip_share"]
        assert float(share) == pytest.approx(expected, abs=0.2)
    divergence = transition_kl(GaussianTransition(batch.old_means, std), moved) / dimensions
    bound = float(divergence.sort().values[2:4].mean())
    metrics = algorithm("ppo", trust_region="divergence", divergence_bound=bound).loss(moved, batch).metrics
    assert float(metrics["clip_share"]) == 0.5
    assert float(metrics["kl"]) == pytest.approx(float(divergence.mean()) * dimensions, rel=1e-4)

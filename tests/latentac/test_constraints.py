"""Floors and bounds of rewards: the closed forms of their multipliers, and what they do to a run."""

from typing import Any

import pytest
import torch

from latentac.config.validation import examine, resolve
from latentac.method.constraints import clip_rewards, updated_multiplier, weights_under_floors
from latentac.runs.reporting.metrics import of_iteration
from latentac.runs.resolution import resolve_all
from latentac.system.errors import ConfigError
from latentac.training.checkpoint import read_state, write_state
from tests.latentac.trainers import (
    BRIGHTNESS,
    REDNESS,
    make_config,
    make_trainer,
    same,
    snapshot,
)

HIGH, LOW = 1e6, -1e6
"""A floor that no reward here reaches, and one that each reaches."""


def spread(mean: float, std: float = 1.0) -> torch.Tensor:
    return torch.tensor([mean - std, mean + std])


def followed(misses: list[float], rate: float = 0.1, most: float = 1.0, start: float = 0.0) -> list[float]:
    """The multiplier after each iteration whose mean misses the floor 5 by so many standard deviations."""
    found = [start]
    for miss in misses:
        found.append(updated_multiplier(found[-1], spread(5 - 2 * miss, 2.0), 5.0, rate=rate, most=most))
    return found[1:]


def test_the_multiplier_rises_by_the_miss() -> None:
    """lambda + rate (f - mean) / s, and with a constant miss n times that, up to its bound."""
    assert followed([0.5]) == pytest.approx([0.05])
    assert followed([0.25] * 4) == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert followed([1.0] * 12)[-3:] == pytest.approx([1.0] * 3)
    assert followed([50.0]) == pytest.approx([0.1])  # a larger miss counts as one


def test_the_multiplier_falls_to_0_above_the_floor() -> None:
    """And stays there; at the floor it does not move."""
    assert followed([-0.5] * 4, start=0.12) == pytest.approx([0.07, 0.02, 0.0, 0.0])
    assert followed([-0.5] * 4, start=0.12)[-2:] == [0.0, 0.0]
    assert followed([0.0] * 3, start=0.3) == [0.3] * 3


@pytest.mark.parametrize(("floor", "expected"), [(2.0, 0.6), (1.0, 0.5), (0.0, 0.4)])
def test_equal_rewards_count_as_a_miss_of_one(floor: float, expected: float) -> None:
    """Their deviation is 0; the direction is known."""
    assert updated_multiplier(0.5, torch.ones(8), floor, rate=0.1, most=9.0) == pytest.approx(expected)


def test_dual_ascent_finds_the_constrained_optimum() -> None:
    """Maximise -x^2 under -(x - 1)^2 >= -1/4: x = 1/2, and stationarity, 2 x = 2 lambda (1 - x), has lambda = 1."""
    multiplier = 0.0
    for _ in range(2000):
        point = multiplier / (1 + multiplier)  # where -x^2 - lambda (x - 1)^2 is largest
        multiplier = updated_multiplier(multiplier, spread(-((point - 1) ** 2)), -0.25, rate=0.5, most=10.0)
    assert multiplier == pytest.approx(1.0, abs=1e-4)


def test_multipliers_shift_weights_and_keep_their_sum() -> None:
    """At 0 they change no bit."""
    weights = torch.tensor([1.0, 0.3, 0.0])
    assert torch.equal(weights_under_floors(weights, torch.zeros(3)), weights)
    raised = weights_under_floors(weights, torch.tensor([0.0, 0.0, 2.6]))
    torch.testing.assert_close(raised, torch.tensor([1.0, 0.3, 2.6]) / 3)
    assert float(raised.sum()) == pytest.approx(1.3)


def test_rewards_are_clipped_by_column() -> None:
    """Without bounds they are the same tensor."""
    rewards = torch.tensor([[-1.0, 5.0, 5.0], [2.0, -5.0, -5.0]])
    assert clip_rewards(rewards, [None, None, None]) is rewards
    found = clip_rewards(rewards, [[0.0, 1.0], None, [-2.0, 2.0]])
    assert found.tolist() == [[0.0, 5.0, 2.0], [1.0, -5.0, -2.0]]


def trained(iterations: int = 3, second: dict[str, Any] | None = None, **sections: Any) -> Any:
    """A trainer after some iterations. second: fields of the second reward, which has weight 0."""
    rewards = [BRIGHTNESS, {**REDNESS, "weight": 0.0, **(second or {})}]
    trainer = make_trainer(**{"rewards": rewards, "algorithm": {"value_gradient": 2.0}, **sections})
    for _ in range(iterations):
        trainer.iterate()
    return trainer


def test_a_floor_that_holds_changes_no_bit() -> None:
    """Neither do bounds that no reward reaches."""
    plain = snapshot(trained())
    assert same(plain, snapshot(trained(second={"floor": LOW})))
    assert same(plain, snapshot(trained(second={"bounds": [LOW, HIGH]})))


@pytest.mark.parametrize(
    "algorithm", [{"use": "ppo", "value_gradient": 2.0}, {"use": "ddpo"}, {"use": "grpo", "group_size": 2}]
)
def test_a_missed_floor_gives_its_reward_weight(algorithm: dict[str, Any]) -> None:
    """From the iteration after, in the advantages and in the value gradient; even of a reward without weight."""
    sections = {"algorithm": algorithm}
    trainer = trained(1, second={"floor": HIGH, "multiplier_rate": 0.5, "multiplier_max": 0.8}, **sections)
    assert same(snapshot(trained(1, **sections)), snapshot(trainer), "actor.")
    for multiplier in (0.5, 0.8, 0.8):
        entry = trainer.iterate()
        assert entry["multipliers"] == {"redness": pytest.approx(multiplier)}
        expected = torch.tensor([1.0, multiplier]) / (1 + multiplier)
        torch.testing.assert_close(trainer.algorithm.weights, expected)
        if trainer.value_weights is not None:
            torch.testing.assert_close(trainer.value_weights, expected)
    assert trainer.history[0]["multipliers"] == {"redness": 0.0}
    assert of_iteration(entry)["policy/multipliers/redness"] == pytest.approx(0.8)
    assert not same(snapshot(trained(4, **sections)), snapshot(trainer), "actor.")


def test_a_run_with_floors_resumes_bitwise(tmp_path: Any) -> None:
    """The multipliers are part of the checkpoint."""
    fields = {"floor": HIGH, "bounds": [0.0, 2 * HIGH], "multiplier_rate": 0.37}
    whole = trained(2, second=fields)
    write_state(tmp_path / "state", *whole.state())
    resumed = trained(0, second=fields)
    resumed.load_state(*read_state(tmp_path / "state"))
    for trainer in (whole, resumed):
        trainer.iterate()
        trainer.iterate()
    assert same(snapshot(whole), snapshot(resumed))
    assert [entry["multipliers"] for entry in whole.history] == [entry["multipliers"] for entry in resumed.history]
    assert float(whole.state()[0]["multipliers"][1]) == pytest.approx(4 * 0.37)


def test_clipped_rewards_teach_and_measured_ones_are_reported() -> None:
    """A reward that is always beyond its bound is constant: it gives no advantage, and the critic learns the bound."""
    rewards = [{**BRIGHTNESS, "bounds": [0.0, 1.0]}]
    trainer = make_trainer(rewards=rewards, critic={"replay_images": 8})
    before = snapshot(trainer)
    entry = trainer.iterate()
    assert entry["reward_mean"] == entry["rewards"]["brightness"] > 5
    assert trainer.learner is not None
    assert trainer.learner.replay is not None
    assert trainer.learner.replay.rewards.unique().tolist() == [1.0]
    assert not same(before, snapshot(trainer), "critic.")


@pytest.mark.parametrize(
    ("fields", "sections", "problem"),
    [
        ({"bounds": [1.0, 1.0]}, {}, "rewards.1.bounds = [1.0, 1.0]: leave no room"),
        ({"bounds": [0.0, 1.0], "floor": 1.0}, {}, "rewards.1.floor = 1.0: is not below the reward's upper bound"),
        ({"floor": 1.0}, {"critic": {"shared_head": True}}, "rewards.1.floor = 1.0: needs a head of its own"),
        ({"scores_folder": "there"}, {}, "rewards.1.scores_folder = 'there': is not used"),
        ({"bounds": [1.0]}, {}, "rewards.1.bounds"),
        ({"multiplier_max": 0.0}, {}, "rewards.1.multiplier_max"),
        ({"floor": 1.0}, {"train": {"early_stopping": {"reward": "redness"}}}, "is not a watched reward of this run"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], sections: dict[str, Any], problem: str) -> None:
    """Before a run begins."""
    given = make_config(rewards=[BRIGHTNESS, {**REDNESS, "weight": 0.0}]).model_dump()
    given["rewards"][1] |= fields
    for section, changes in sections.items():
        given[section] |= changes
    _, problems = examine(given)
    assert [str(found) for found in problems if problem in str(found)]


class Fixed:
    """An algorithm that keeps its weights to itself."""

    uses_critic, group_size, value_gradient, prediction_kl = False, 1, 0.0, 0.0

    def __init__(self, weights: torch.Tensor) -> None:
        self._own = weights
        self.memory: dict[str, torch.Tensor] = {}

    def credit(self) -> None: ...

    def loss(self) -> None: ...


def test_a_floor_needs_an_algorithm_whose_weights_can_change() -> None:
    """One of the user's own, too."""
    fields = make_config(rewards=[{**BRIGHTNESS, "floor": 1.0}]).model_dump()
    fields["algorithm"] = {"use": f"{__name__}:Fixed"}
    assert resolve(fields)
    with pytest.raises(ConfigError, match="has no weights"):
        resolve_all(fields)
    fields["rewards"][0]["floor"] = None
    resolve_all(fields)

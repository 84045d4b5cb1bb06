"""Training does not depend, by a bit, on where rewards run, on overlapping, or on a cache of scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentac.evaluation.held_out import Sampling, sample
from latentac.rewards.configured import any_outside
from latentac.training.trainer import Trainer
from latentac.training.value_pretraining import collect, draws
from tests.latentac.trainers import BRIGHTNESS, REDNESS, make_trainer, prompts, same, snapshot


def trainer_with(fields: dict[str, Any] | None = None, second: bool = False) -> Trainer:
    """Four blocks per iteration; `fields` are of the first reward, or of both."""
    rewards = [{**BRIGHTNESS, **(fields or {})}, {**REDNESS, **((fields or {}) if second else {})}]
    train = {"images_per_iteration": 8, "block_images": 2, "updates_per_iteration": 2, "num_workers": 1}
    return make_trainer(rewards=rewards, train=train, critic={"replay_images": 8}, pretrain={"num_images": 8})


def after(trainer: Trainer, iterations: int = 2) -> dict[str, torch.Tensor]:
    for _ in range(iterations):
        trainer.iterate()
    return snapshot(trainer)


@pytest.mark.parametrize(
    ("fields", "second"),
    [({"processes": 1}, False), ({"processes": 2}, True), ({"processes": 2, "cached_scores": 5}, False)],
)
def test_training_is_bitwise_the_same(fields: dict[str, Any], second: bool) -> None:
    """With one reward in other processes, and with both; rollouts go on while they score."""
    plain, pooled = trainer_with(), trainer_with(fields, second)
    assert (any_outside(plain.rewards), any_outside(pooled.rewards)) == (False, True)
    assert same(after(plain), after(pooled))
    for one, other in zip(plain.history, pooled.history, strict=True):
        for entry in (one, other):
            for name in ("seconds", "rollout_seconds", "speed", "cache_hit_rate"):
                entry.pop(name, None)
        assert one == other


def test_pretraining_and_evaluation_are_the_same() -> None:
    """They overlap in the same way."""
    found = []
    for fields in (None, {"processes": 2}):
        trainer = trainer_with(fields)
        policy, critic, config = trainer.policy, trainer.critic, trainer.config
        states = collect(policy, critic, trainer.rewards, prompts(), draws(config)[0])
        arm = sample(policy, critic, trainer.rewards, prompts()[:5], Sampling(0, 3, 2))
        found.append((states.rewards, states.clean, states.prompts, arm.scores.rewards, torch.tensor(arm.images)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_hit_rate_is_logged(tmp_path: Path) -> None:
    """Two iterations with new images: nothing in memory. Another run of the same seed finds all in the folder."""
    fields = {"cached_scores": 1000, "scores_folder": str(tmp_path)}
    first, second = trainer_with(fields), trainer_with(fields)
    expected, found = after(first), after(second)
    assert [entry["cache_hit_rate"] for entry in first.history] == [{"brightness": 0.0}] * 2
    assert [entry["cache_hit_rate"] for entry in second.history] == [{"brightness": 1.0}] * 2
    assert same(expected, found)
    assert np.isfinite(second.history[-1]["reward_mean"])

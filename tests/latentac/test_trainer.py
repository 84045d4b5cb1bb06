"""The training loop: what learns, what must not, and what a resumed or shared run must reproduce."""

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentac.method.records import flatten_steps
from latentac.system.errors import RewardError
from latentac.training.checkpoint import read_state, write_state
from latentac.training.distributed import Mesh
from latentac.worlds.prompts import Prompt, balanced
from tests.latentac.peer import RUNS, do_run
from tests.latentac.trainers import (
    BRIGHTNESS,
    CPU,
    REDNESS,
    SHIPPED,
    Brightness,
    configured,
    credited,
    make_trainer,
    rolled_out,
    same,
    snapshot,
    with_advantages,
)

EVERYTHING: dict[str, Any] = {
    "rewards": [
        BRIGHTNESS,
        {**REDNESS, "weight": 0.0},
    ],
    "critic": {"replay_images": 12},
    "policy": {"ema_decay": 0.9},
    "algorithm": {"prediction_kl": 0.1, "value_gradient": 2.0},
    "train": {"early_stopping": {"reward": "redness", "window": 1, "patience": 9}},
}
"""Sections that turn on whatever has a state of its own."""


class Broken(Brightness):
    """NaN for the second image."""

    name = "broken"

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        scores[1] = np.nan
        return scores


def with_adaptation(adaptation):
    return {**EVERYTHING, "policy": {**EVERYTHING["policy"], "adaptation": adaptation}}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_the_first_ratio_of_an_iteration_is_exactly_1(name, adaptation):
    """Through blocks, shuffling and minibatches the first update of every iteration sees ratio 1 to the last bit."""
    trainer = make_trainer(name, policy={"adaptation": adaptation}, algorithm={"value_gradient": 2.0})
    for _ in range(2):
        assert trainer.iterate()["first_ratio_deviation"] == 0.0
    assert trainer.history[-1]["kl"] > 0


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_resumed_run_ends_bitwise_as_an_unbroken_one(name, adaptation, tmp_path):
    """Two iterations equal one, a fresh trainer that reads the checkpoint of it, and one more: actor, its average, the
    best so far, critic, both optimizers, and the images that are remembered."""
    sections = with_adaptation(adaptation)
    whole = make_trainer(name, **sections)
    whole.iterate()
    write_state(tmp_path / "state", *whole.state())
    whole.iterate()
    resumed = make_trainer(name, **sections)
    resumed.load_state(*read_state(tmp_path / "state"))
    assert resumed.iteration == 1
    resumed.iterate()
    expected, found = snapshot(whole), snapshot(resumed)
    assert set(expected) == set(found)
    for prefix in ("actor.", "ema.", "best.", "critic.", "replay.", "actor_optimizer.", "critic_optimizer."):
        assert same(expected, found, prefix), prefix
    assert [entry["rewards"] for entry in whole.history] == [entry["rewards"] for entry in resumed.history]
    for trainer in (whole, resumed):
        trainer.publish_weights()
    assert same(snapshot(whole), snapshot(resumed), "actor.")


def test_the_result_does_not_depend_on_how_blocks_are_dealt():
    """A worker of two rolls out and splits its block exactly as one worker alone does."""
    one = make_trainer()
    for rank in range(2):
        half = make_trainer(mesh=Mesh(rank, 2, CPU))
        (index,) = half.mesh.own(2)
        expected, found = rolled_out(one, index), rolled_out(half, index)
        assert torch.equal(expected.trajectory.latents, found.trajectory.latents)
        first = one.policy_learner.minibatch(credited(expected), 0, 1)
        second = half.policy_learner.minibatch(credited(found), 0, 1)
        assert torch.equal(first.latents, second.latents)
        assert torch.equal(first.old_log_probs, second.old_log_probs)


def gradient(trainer):
    """The actor's gradient, flat."""
    parameters = trainer.policy_learner.parameters.values()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("name", SHIPPED)
def test_blocks_and_steps_add_up_to_one_batch(name):
    """The gradient of one update is the same from two blocks of two images, from one of four, and from a loop over
    the denoising steps of all images."""
    found = []
    for block_images in (2, 4):
        train = {"block_images": block_images, "updates_per_iteration": 1}
        trainer = make_trainer(name, train=train, algorithm={"value_gradient": 2.0})
        blocks, *_ = trainer._credit([rolled_out(trainer, index) for index in range(4 // block_images)])
        for block in blocks:
            learner = trainer.policy_learner
            learner.add_gradient(learner.minibatch(block, trainer.iteration, 0))
        found.append(gradient(trainer))
    trainer.policy_learner.optimizer.zero_grad()
    (block,) = blocks
    steps, images = block.trajectory.num_stochastic_steps, torch.arange(4)
    for step in range(steps):
        minibatch = flatten_steps(block.trajectory, block.advantages, images, torch.full((4,), step))
        transition = trainer.policy.transition(
            minibatch.latents, minibatch.sigma, minibatch.sigma_next, minibatch.conditioning
        )
        (trainer.algorithm.loss(transition, minibatch).loss / steps).backward()
    found.append(gradient(trainer))
    scale = float(found[0].abs().max())
    assert scale > 0
    for other in found[1:]:
        torch.testing.assert_close(other / scale, found[0] / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("workers", "blocks"), [(1, 3), (2, 2), (2, 3), (3, 4), (4, 4), (4, 7)])
def test_each_block_has_one_worker(workers, blocks):
    """In the order of the ranks, and no worker has more than one block more than another."""
    shares = [Mesh(rank, workers, CPU).own(blocks) for rank in range(workers)]
    assert [block for share in shares for block in share] == list(range(blocks))
    assert min(map(len, shares)) >= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_do_what_one_does(tmp_path):
    """Two processes over gloo and one alone end two iterations with the same weights, critic, memory and history, but
    for the rounding of sums, for every algorithm, with all that has a state turned on, and with three blocks for two
    workers; the two agree bitwise."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.latentac.peer", str(tmp_path)]
    root = Path(__file__).parents[2]
    peers = [subprocess.Popen(command, cwd=root, env={**shared, "RANK": str(rank)}) for rank in range(2)]
    alone = {run: do_run(run, Mesh(0, 1, CPU)) for run in RUNS}
    assert [peer.wait(250) for peer in peers] == [0, 0]
    for run, trainer in alone.items():
        (first, progress), (second, _) = (read_state(tmp_path / run / str(rank)) for rank in range(2))
        assert same(first, second)
        expected = snapshot(trainer)
        assert set(expected) == set(first)
        for key, tensor in expected.items():
            assert torch.allclose(first[key], tensor, rtol=1e-3, atol=2e-5), key
        for entry, other in zip(trainer.history, progress["history"], strict=True):
            assert (entry["world_size"], other["world_size"]) == (1, 2)
            for key in ("reward_mean", "kl", "gradient_norm", *(["value_loss"] if "value_loss" in entry else [])):
                assert entry[key] == pytest.approx(other[key], rel=1e-3), key


@pytest.mark.parametrize("name", SHIPPED)
def test_actor_and_critic_do_not_shape_each_other(name):
    """The critic's passes leave actor and reference bitwise as they were, and give them no gradient; an update of the
    actor leaves the critic; with zero advantages the actor gets no gradient at all."""
    trainer = make_trainer(name, critic={"replay_images": 8}, algorithm={"prediction_kl": 0.1, "value_gradient": 2.0})
    assert trainer.policy_learner._reference is not None
    assert trainer.learner is not None
    reference = trainer.policy_learner._reference.backbone.module
    weights = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    blocks, *_ = trainer._credit([rolled_out(trainer, index) for index in range(2)])
    before = snapshot(trainer)
    trainer.learner.learn(
        0, [(block.index, block.trajectory, block.returns) for block in blocks if block.returns is not None]
    )
    assert same(before, snapshot(trainer), "actor")
    assert all(parameter.grad is None for parameter in trainer.policy_learner.parameters.values())
    assert not same(before, snapshot(trainer), "critic.heads")
    between = snapshot(trainer)
    trainer.learner.optimizer.zero_grad(set_to_none=True)
    trainer.policy_learner.update(blocks, trainer.iteration, 0, 1e-4)
    assert same(between, snapshot(trainer), "critic")
    assert all(parameter.grad is None for parameter in trainer.critic.parameters())
    assert not same(between, snapshot(trainer), "actor.")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in reference.state_dict().items())
    assert all(parameter.grad is None for parameter in reference.parameters())

    plain = make_trainer(name)
    for index in range(2):
        learner = plain.policy_learner
        learner.add_gradient(learner.minibatch(credited(rolled_out(plain, index)), plain.iteration, 0))
    assert float(gradient(plain).abs().max()) == 0


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("known", [1, 0], ids=["one image counts", "no image counts"])
def test_transitions_without_advantage_are_not_computed(name, known, monkeypatch):
    """The gradient of an update is that of all its transitions. Where none has an advantage, one is computed, so that
    workers do not wait for each other."""
    trainer = make_trainer(name, algorithm={"use": "grpo", "group_size": 2}, train={"updates_per_iteration": 1})
    learner, block = trainer.policy_learner, rolled_out(trainer, 0)
    advantages = torch.zeros_like(block.trajectory.log_probs)
    advantages[:known] = 0.7
    chosen = with_advantages(block, advantages)
    every = flatten_steps(block.trajectory, advantages, *[i.flatten() for i in torch.where(advantages == advantages)])
    learner.add_gradient(every)
    expected = gradient(trainer).clone()

    rows: list[int] = []
    forward = trainer.policy.forward

    def counting(*given):
        rows.append(len(given[0]))
        return forward(*given)

    monkeypatch.setattr(trainer.policy, "forward", counting)
    sums = learner._gradients([chosen], 0, 0)
    torch.testing.assert_close(gradient(trainer), expected, rtol=1e-4, atol=1e-7)
    steps = block.trajectory.num_stochastic_steps
    assert rows == [steps if known else 1]
    assert float(sums["kl"]) < 1e-6  # rounding depends on the number of rows
    assert (float(expected.abs().max()) > 0) == bool(known)


@pytest.mark.parametrize("algorithm", [{"value_gradient": 2.0}, {"prediction_kl": 0.1}])
def test_what_has_a_gradient_without_an_advantage_is_computed(algorithm):
    """The value gradient and the KL to the base act on every transition."""
    trainer = make_trainer(algorithm=algorithm)
    block = credited(rolled_out(trainer, 0))
    every = block.advantages.numel() // trainer.config.train.updates_per_iteration
    assert len(trainer.policy_learner.minibatch(block, 0, 0)) == every


@pytest.mark.parametrize("name", SHIPPED)
def test_the_prediction_kl_pulls_back(name):
    """It is 0 with a gradient of 0 at the base, and away from it steps down its gradient lead back."""
    trainer = make_trainer(name, algorithm={"prediction_kl": 1.0})
    block = credited(rolled_out(trainer, 0))
    minibatch = trainer.policy_learner.minibatch(block, trainer.iteration, 0)
    assert float(trainer.policy_learner.add_gradient(minibatch)["prediction_kl"]) == 0
    assert float(gradient(trainer).abs().max()) == 0

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy_learner.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    drifts = []
    for _ in range(2):
        trainer.policy_learner.optimizer.zero_grad()
        drifts.append(float(trainer.policy_learner.add_gradient(minibatch)["prediction_kl"]))
        norm = float(gradient(trainer).norm())
        assert norm > 0
        with torch.no_grad():
            for parameter in trainer.policy_learner.parameters.values():
                if parameter.grad is not None:
                    parameter.sub_(0.02 / norm * parameter.grad)
    assert drifts[1] < drifts[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_value_gradient_raises_the_critics_value(name):
    """With every advantage 0, updates towards the steered policy raise the critic's value of the very same draws, and
    against a negative weight they would lower it; the loss falls from one to the next. With weight 0, no gradient."""
    found = []
    for weight in (1.0, -1.0):
        trainer = make_trainer(name, algorithm={"value_gradient": 5.0}, critic={"num_passes": 8, "learning_rate": 5e-3})
        assert trainer.learner is not None
        blocks, *_ = trainer._credit([rolled_out(trainer, index) for index in range(2)])
        trainer.learner.learn(
            0, [(block.index, block.trajectory, block.returns) for block in blocks if block.returns is not None]
        )
        trainer.value_weights = torch.tensor([weight])
        block = credited(rolled_out(trainer, 0))
        minibatch, distances = trainer.policy_learner.minibatch(block, trainer.iteration, 0), []
        scale = minibatch.latents[0].numel() * 2  # of the loss: a mean over dimensions and blocks
        for _ in range(3):
            trainer.policy_learner.optimizer.zero_grad()
            distances.append(float(trainer.policy_learner.add_gradient(minibatch)["value_gradient_kl"]))
            norm = float(gradient(trainer).norm())
            with torch.no_grad():
                for parameter in trainer.policy_learner.parameters.values():
                    if parameter.grad is not None:
                        parameter.sub_(0.2 * distances[-1] / scale / norm**2 * parameter.grad)  # Polyak's step
        assert distances == sorted(distances, reverse=True)
        trainer.value_weights = None
        change = rolled_out(trainer, 0).trajectory.values[:, -1] - block.trajectory.values[:, -1]
        found.append(float(change.mean()))
    assert found[1] < 0 < found[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_actor_learns_a_smooth_reward(name):
    """Six iterations on brightness raise that of the very images, prompts and noise, that it began with, so the
    sign of everything is right."""
    anything_goes = {"divergence": {"max_kl": 1e3, "max_clip_share": 1.0}}
    trainer = make_trainer(
        name,
        policy={"learning_rate": 5e-4, "warmup_updates": 2},
        train={"images_per_iteration": 8, "block_images": 8, **anything_goes},
    )
    before = float(rolled_out(trainer, 0).rewards.mean())
    for _ in range(6):
        trainer.iterate()
    trainer.history.clear()  # so that the first iteration's draws come again
    assert float(rolled_out(trainer, 0).rewards.mean()) > before + 1


def test_a_nan_reward_is_refused_by_name():
    """The message names the reward, what it gave and for which prompt, and nothing was updated."""
    trainer = make_trainer(scorers=[configured(Broken())])
    before = snapshot(trainer)
    with pytest.raises(RewardError, match=r"reward broken, prompt '.+': returned nan \(1 of 2 images\)"):
        trainer.iterate()
    assert same(before, snapshot(trainer))


def test_a_group_shares_its_prompt():
    """G consecutive rollouts have one prompt and different noise, whatever the algorithm; PPO then knows how well the
    critic ranks them."""
    trainer = make_trainer(algorithm={"group_size": 2})
    block = rolled_out(trainer, 0)
    assert torch.equal(block.prompts[0::2], block.prompts[1::2])
    assert not torch.equal(block.trajectory.latents[0, 0], block.trajectory.latents[1, 0])
    assert len(trainer.iterate()["rank_correlation"]) == 3


def test_draws_are_balanced_over_categories():
    """Each category as often as the others, without repeats while it lasts, and reproducible."""
    prompts = [Prompt(f"{category}{i}", category) for category, n in (("a", 3), ("b", 100)) for i in range(n)]
    drawn = balanced(prompts, 12, 0, "x")
    assert [prompts[i].category for i in drawn] == ["a", "b"] * 6
    assert len({i for i in drawn if prompts[i].category == "b"}) == 6
    assert drawn == balanced(prompts, 12, 0, "x")
    assert drawn != balanced(prompts, 12, 1, "x")

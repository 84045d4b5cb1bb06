"""The training loop: what learns, what must not, and what a resumed run must reproduce."""

import copy

import numpy as np
import pytest
import torch

from latentac.algorithms import ALGORITHMS, make_algorithm
from latentac.backbones import load_backbone
from latentac.config import merge, resolve
from latentac.diffusion import KERNELS
from latentac.distributed import Mesh
from latentac.errors import RewardError
from latentac.policy import Policy
from latentac.pretraining import new_critic
from latentac.prompts import Prompt, balanced, load_prompts
from latentac.recipes import RECIPES
from latentac.shapes import builtin_pipeline
from latentac.trainer import Trainer

CPU = torch.device("cpu")


class Brightness:
    """A smooth reward that any model can raise."""

    name, unit = "brightness", "grey levels"

    def known(self):
        return np.zeros((1, 2, 2, 3), np.uint8), [""], np.zeros(1)

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3)).astype(np.float32)


class Broken(Brightness):
    """NaN for the third picture."""

    name = "broken"

    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        scores[2] = np.nan
        return scores


def make_trainer(reward=None, **sections):
    fields = {
        "rewards": [{"name": "brightness"}],
        "gate": {"reward": "brightness"},
        "kernel": {"num_steps": 3},
        "critic": {"width": 32, "num_heads": 2, "num_queries": 1},
        "train": {"images_per_iteration": 8, "block_images": 4, "updates_per_iteration": 2, "num_workers": 1},
        **sections,
    }
    config = resolve(merge(RECIPES["shapes-unet-smoke"], fields))
    backbone = load_backbone("unet", builtin_pipeline("shapes-unet"), CPU)
    policy = Policy(backbone, KERNELS["ddim"](config.kernel.noise))
    torch.manual_seed(config.seed)
    policy.backbone.adapt(config.policy)
    critic, algorithm = new_critic(config, policy), make_algorithm(config)
    prompts = load_prompts("builtin:shapes").train
    return Trainer(config, policy, critic, algorithm, [reward or Brightness()], prompts, Mesh(0, 1, CPU))


def snapshot(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state()[0].items()}


def same(first, second, prefix=""):
    return all(torch.equal(first[name], second[name]) for name in first if name.startswith(prefix))


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_the_first_ratio_of_an_iteration_is_exactly_1(adaptation):
    """Through blocks, shuffling and minibatches the first update of every iteration sees ratio 1 to the last bit."""
    trainer = make_trainer(policy={"adaptation": adaptation})
    for _ in range(2):
        assert trainer.iterate()["first_ratio_deviation"] == 0.0
    assert trainer.history[-1]["kl"] > 0


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_resumed_run_ends_bitwise_as_an_unbroken_one(adaptation):
    """Four iterations equal two, a fresh trainer that loads their state, and two more."""
    whole = make_trainer(policy={"adaptation": adaptation})
    for _ in range(2):
        whole.iterate()
    tensors, progress = snapshot(whole), copy.deepcopy(whole.state()[1])
    for _ in range(2):
        whole.iterate()
    resumed = make_trainer(policy={"adaptation": adaptation})
    resumed.load_state(tensors, progress)
    assert resumed.iteration == 2
    for _ in range(2):
        resumed.iterate()
    assert same(snapshot(whole), snapshot(resumed))


def test_the_result_does_not_depend_on_how_blocks_are_dealt():
    """A worker of two rolls out and splits its block exactly as one worker alone does."""
    one = make_trainer()
    for rank in range(2):
        half = make_trainer()
        half.mesh = Mesh(rank, 2, CPU)
        (index,) = half.mesh.own(2)
        expected, found = one._roll_out(index), half._roll_out(index)
        assert torch.equal(expected.trajectory.latents, found.trajectory.latents)
        assert torch.equal(one._order(expected, "actor", 2), half._order(found, "actor", 2))


def test_actor_and_critic_do_not_shape_each_other():
    """A pass of the critic leaves the actor bitwise as it was, and an update of the actor the critic; with zero
    advantages the actor gets no gradient at all."""
    trainer = make_trainer()
    blocks = [trainer._roll_out(index) for index in range(2)]
    trainer._credit(blocks)
    before = snapshot(trainer)
    trainer._update_critic(blocks, 0)
    assert same(before, snapshot(trainer), "actor")
    assert not same(before, snapshot(trainer), "critic.heads")
    between = snapshot(trainer)
    trainer._update_actor(blocks, 0)
    assert same(between, snapshot(trainer), "critic")
    assert not same(between, snapshot(trainer), "actor.")
    trainer.actor_optimizer.zero_grad()
    blocks[0].advantages = torch.zeros_like(blocks[0].advantages)
    trainer._actor_gradient(trainer._share(blocks[0], 0))
    assert all(float(p.grad.abs().max()) == 0 for p in trainer.actor_parameters.values() if p.grad is not None)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_positive_advantage_raises_that_transitions_log_prob(name):
    """One small step on transitions of advantage 1 makes them more likely."""
    trainer = make_trainer(algorithm={"name": name}, policy={"learning_rate": 1e-5, "warmup_updates": 0})
    block = trainer._roll_out(0)
    block.advantages = torch.ones(4, 2)
    minibatch = trainer._share(block, 0)
    loss = trainer.algorithm.loss(_transition(trainer, minibatch), minibatch).loss
    trainer.actor_optimizer.zero_grad()
    loss.backward()
    trainer.actor_optimizer.step()
    with torch.no_grad():
        after = _transition(trainer, minibatch).log_prob(minibatch.next_latents)
    assert bool((after > minibatch.old_log_probs).all())


def _transition(trainer, minibatch):
    return trainer.policy.transition(minibatch.latents, minibatch.sigma, minibatch.sigma_next, minibatch.conditioning)


def test_the_actor_learns_a_smooth_reward():
    """A few iterations on brightness raise it well beyond its noise, so the sign of everything is right."""
    trainer = make_trainer(
        policy={"learning_rate": 3e-4, "warmup_updates": 4},
        train={"images_per_iteration": 16, "block_images": 16, "updates_per_iteration": 2, "num_workers": 1},
    )
    means = [trainer.iterate()["reward_mean"] for _ in range(8)]
    assert means[-1] > means[0] + 5, means


def test_a_nan_reward_is_refused_by_name():
    """The message names the reward, what it gave and for which prompt, and nothing was updated."""
    trainer = make_trainer(Broken())
    before = snapshot(trainer)
    with pytest.raises(RewardError, match=r"reward broken: returned nan for '.+' \(1 of 4 pictures\)"):
        trainer.iterate()
    assert same(before, snapshot(trainer))


def test_a_group_shares_its_prompt():
    """With a group baseline G consecutive rollouts have one prompt and different noise."""
    trainer = make_trainer(algorithm={"baseline": "group", "group_size": 2})
    block = trainer._roll_out(0)
    prompts = list(block.trajectory.prompts)
    assert prompts[0::2] == prompts[1::2]
    assert not torch.equal(block.trajectory.latents[0, 0], block.trajectory.latents[1, 0])
    trainer.iterate()


def test_draws_are_balanced_over_categories():
    """Each category as often as the others, without repeats while it lasts, and reproducible."""
    prompts = [Prompt(f"{category}{i}", category) for category, n in (("a", 3), ("b", 100)) for i in range(n)]
    drawn = balanced(prompts, 12, 0, "x")
    assert [prompts[i].category for i in drawn] == ["a", "b"] * 6
    assert len({i for i in drawn if prompts[i].category == "b"}) == 6
    assert drawn == balanced(prompts, 12, 0, "x")
    assert drawn != balanced(prompts, 12, 1, "x")

"""How many images go through the denoiser together is `train.block_images`, wherever images are made."""

import threading
from typing import Any

import pytest
import torch

from latentac.backbones.guided import Guided
from latentac.config.fields import merge
from latentac.config.recipes import RECIPES
from latentac.config.validation import resolve
from latentac.evaluation.benchmark import run_benchmark
from latentac.evaluation.held_out import Sampling, compare
from latentac.rewards.configured import load_rewards
from latentac.sampling.devices import map_overlapped
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.system.errors import RewardError
from latentac.training.value_pretraining import new_critic, pretrain
from latentac.worlds.prompts import load_prompts
from tests.latentac.trainers import CPU, shipped


class Watched(Guided):
    """The shipped backbone, unchanged, that notes how many rows are denoised and decoded together."""

    def __init__(self, backbone):
        super().__init__(backbone, 1.0)
        self.denoised, self.decoded = [], []

    def predict(self, latents, sigma, conditioning):
        self.denoised.append(len(latents))
        return self.backbone.predict(latents, sigma, conditioning)

    def decode(self, latents):
        self.decoded.append(len(latents))
        return self.backbone.decode(latents)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_every_step_follows_block_images(size):
    """Evaluation, its gallery, diversity and latency, steering with its particles, and value pretraining."""
    sizes = {
        "kernel": {"num_steps": 2},
        "rewards": [{"use": "jpeg_compressibility"}],
        "gate": {"reward": "jpeg_compressibility"},
        "train": {"block_images": size, "images_per_iteration": size, "num_workers": 1, "updates_per_iteration": 1},
        "evaluation": {"num_images": 16, "num_diversity_prompts": 16, "images_per_prompt": 2, "num_bootstrap": 100},
        "steering": {
            "num_images": 16,
            "methods": [{"use": "best_of_n", "sweep_particles": [3]}, {"use": "value_gradient", "sweep_particles": []}],
        },
        "pretrain": {"num_images": 16, "num_held_out_images": 16, "minibatch_states": 16, "num_passes": 1},
    }
    config = resolve(merge(RECIPES["shapes-unet-smoke"], sizes))
    backbone, prompts = Watched(shipped("unet")), load_prompts("builtin:shapes")
    policy, rewards = Policy(backbone, KERNELS.build("ddim", noise=1.0)), load_rewards(config.rewards)
    critic = new_critic(config, policy)
    torch.nn.init.normal_(critic.heads.weight, std=0.5)
    backbone.denoised.clear()

    whole = min(size, 16)
    sampling, main = Sampling.of(config), config.gate.reward
    policies = {"base": policy, "trained": policy}
    compare(config.evaluation, sampling, policies, critic, rewards, prompts, main_reward=main)
    assert (max(backbone.denoised), max(backbone.decoded)) == (whole, whole)
    backbone.denoised.clear()
    given: dict[str, Any] = {"prompts": prompts.held_out, "main_reward": main}
    run_benchmark(config.evaluation, config.steering, sampling, policy, critic, rewards, **given)
    assert (max(backbone.denoised), max(backbone.decoded)) == (3 * whole, whole)
    backbone.denoised.clear()
    pretrain(config, policy, critic, rewards, prompts)
    assert max(backbone.denoised) == whole


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_blocks_are_finished_in_order(alone: bool, outside: bool, count: int) -> None:
    """Whatever runs at the same time."""
    found = map_overlapped(lambda block: block * 10, lambda made: made + 1, range(count), CPU, alone, outside)
    assert found == [10 * block + 1 for block in range(count)]


def test_waiting_for_other_processes_leaves_the_cores_to_rollouts() -> None:
    """All blocks are made while the first two are still being scored."""
    made = threading.Semaphore(0)

    def make(block: int) -> int:
        made.release()
        return block

    def finish(block: int) -> int:
        if block < 2:
            for _ in range(3):
                assert made.acquire(timeout=30)
        return block

    assert map_overlapped(make, finish, range(6), CPU, True, True) == list(range(6))


@pytest.mark.parametrize("alone", [True, False])
def test_a_block_is_finished_while_the_next_one_is_made(alone: bool) -> None:
    """`finish` of the first block ends only when `make` of the second has begun, and the other way round."""
    begun = [threading.Event() for _ in range(3)]
    finishing = [threading.Event() for _ in range(3)]

    def make(block: int) -> int:
        begun[block].set()
        assert block == 0 or finishing[block - 1].wait(30)
        return block

    def finish(block: int) -> int:
        finishing[block].set()
        assert block == 2 or begun[block + 1].wait(30)
        return block

    assert map_overlapped(make, finish, range(3), CPU, alone, True) == [0, 1, 2]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("part", ["make", "finish"])
def test_an_error_of_a_block_is_raised(alone: bool, part: str) -> None:
    """That of the block, and no later block is finished where work is overlapped."""
    finished = []

    def fail(block: int) -> int:
        if block == 1:
            raise RewardError("reward mine", "failed", "Correct it")
        return block

    def finish(block: int) -> int:
        finished.append(fail(block) if part == "finish" else block)
        return block

    with pytest.raises(RewardError, match="reward mine"):
        map_overlapped(fail if part == "make" else int, finish, range(4), CPU, alone)
    assert alone or finished in ([], [0])

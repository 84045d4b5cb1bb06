"""How many images go through the denoiser together is `train.block_images`, wherever images are made."""

import pytest
import torch

from latentac.backbones.guided import Guided
from latentac.config.fields import merge
from latentac.config.recipes import RECIPES
from latentac.config.validation import resolve
from latentac.evaluation.benchmark import run_benchmark
from latentac.evaluation.held_out import compare
from latentac.rewards.configured import load_rewards
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.training.value_pretraining import new_critic, pretrain
from latentac.worlds.prompts import load_prompts
from tests.latentac.trainers import shipped


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
    compare(config, {"base": policy, "trained": policy}, critic, rewards, prompts)
    assert (max(backbone.denoised), max(backbone.decoded)) == (whole, whole)
    backbone.denoised.clear()
    run_benchmark(config, policy, critic, rewards, prompts.held_out)
    assert (max(backbone.denoised), max(backbone.decoded)) == (3 * whole, whole)
    backbone.denoised.clear()
    pretrain(config, policy, critic, rewards, prompts)
    assert max(backbone.denoised) == whole

"""The contract tests that others may call: every row of each table keeps them, and what breaks them is found."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentac.backbones.unet import UNetBackbone
from latentac.critic import BODIES
from latentac.critic.bodies import FrozenTaps
from latentac.method.diffusion import GaussianTransition
from latentac.method.records import Minibatch
from latentac.rewards import REWARDS
from latentac.runs import testing
from latentac.sampling.kernels import CPS, KERNELS
from latentac.sampling.steering import STEERING
from latentac.sampling.steering.best_of_n import BestOfN
from latentac.training.algorithms import ALGORITHMS
from latentac.training.algorithms.grpo import GRPO
from latentac.training.algorithms.ppo import PPO
from latentac.worlds.shapes.captions import parse_caption
from latentac.worlds.shapes.scenes import sample_images
from tests.latentac import miniatures
from tests.latentac.trainers import SHIPPED

HERE = "tests.latentac.test_testing"
LEARNED = ("clip_score", "pickscore", "aesthetic", "hpsv2", "image_reward", "vqa", "geneval")
"""Rewards whose weights do not come with the package: the tests of these rewards make miniatures."""


ELSEWHERE = ("remote", "judge", "ocr")
"""Rewards that need a server or other prompts: their files in tests/latentac/rewards call `check_reward`."""


@pytest.mark.parametrize("name", [name for name in REWARDS if name not in {*LEARNED, *ELSEWHERE}])
def test_each_reward_keeps_its_contract(name: str) -> None:
    """On images of the embedded world."""
    images = sample_images([parse_caption(prompt) for prompt in testing.PROMPTS], np.random.default_rng(0))
    testing.check_reward(name, images=images)


@pytest.mark.parametrize("name", KERNELS)
def test_each_kernel_keeps_its_contract(name: str) -> None:
    """With its default noise and half of it."""
    testing.check_kernel(name)
    testing.check_kernel(name, noise=0.5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_keeps_its_contract(name: str) -> None:
    """With its default settings and the other ratio."""
    testing.check_algorithm(name)
    testing.check_algorithm(name, ratio="guard", trust_region="divergence")


@pytest.mark.parametrize("name", STEERING)
def test_each_method_keeps_its_contract(name: str) -> None:
    """With its default settings."""
    testing.check_steering(name)


@pytest.mark.parametrize("name", BODIES)
def test_each_critic_body_keeps_its_contract(name: str) -> None:
    """With its default settings."""
    testing.check_critic_body(name, width=32)


@pytest.mark.parametrize("name", [*SHIPPED, "sdxl"])
def test_each_backbone_keeps_its_contract(name: str) -> None:
    """On the pipelines of the embedded world, or a miniature where it has none."""
    testing.check_backbone(name, miniatures.pipeline_of(name))


class Rank:
    """A reward that depends on the rest of the batch."""

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        order: np.ndarray = images.mean((1, 2, 3)).argsort().argsort()
        return order


class Moody:
    """A reward that answers differently each time."""

    calls = 0

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> list[int]:
        Moody.calls += 1
        return [Moody.calls] * len(prompts)


class Upside(PPO):
    """An algorithm that descends on the reward."""

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> Any:
        found = super().loss(transition, minibatch)
        return type(found)(-found.loss, found.metrics)


class Forgetful(GRPO):
    """An algorithm whose credit has lost an axis."""

    def credit(self, rewards: Tensor, values: Tensor, prompts: Tensor) -> Any:
        found = super().credit(rewards, values, prompts)
        return type(found)(found.advantages[:, 0], found.returns)


class Eager(BestOfN):
    """A method that moves the latents whatever the weights are."""

    def begin(self, uniforms: Tensor) -> Any:
        return _Pushing()


class _Pushing:
    def propose(self, state: Any) -> GaussianTransition:
        moved: GaussianTransition = state.transition.shifted(torch.ones_like(state.latents))
        return moved

    def resample(self, state: Any) -> None:
        return None

    def moved(self, *arguments: object) -> None:
        pass


class Still(CPS):
    """A kernel whose std is not that of its transitions."""

    def std(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return super().std(sigma, sigma_next) + (sigma < 1) * 0.1

    def transition(self, *arguments: Any) -> GaussianTransition:
        found = super().transition(*arguments)
        return GaussianTransition(found.mean, found.std * 1.5)


class Wide(FrozenTaps):
    """A critic body that is not as wide as it says."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.width += 1


class Loud(UNetBackbone):
    """A backbone whose prediction does not mix back to its latents."""

    def predict(self, *arguments: Any) -> Any:
        prediction, taps = super().predict(*arguments)
        return type(prediction)(prediction.clean * 1.5, prediction.noise), taps


@pytest.mark.parametrize(
    ("check", "broken", "words"),
    [
        (testing.check_reward, "Rank", "an image alone has the reward"),
        (testing.check_reward, "Moody", "the same images have the same rewards"),
        (testing.check_algorithm, "Upside", "a positive advantage raises"),
        (testing.check_algorithm, "Forgetful", "advantages are"),
        (testing.check_steering, "Eager", "weight 0 is bitwise the plain rollout"),
        (testing.check_kernel, "Still", "the transition's std"),
        (testing.check_backbone, "Loud", "is the noisy latents"),
    ],
)
def test_what_breaks_a_contract_is_found(check: Any, broken: str, words: str) -> None:
    """Each check names what does not hold."""
    with pytest.raises(AssertionError, match=f"does not hold: .*{words}"):
        check(f"{HERE}:{broken}")


def test_a_body_of_another_width_is_found() -> None:
    """Its own layers refuse it, before anything is learned."""
    with pytest.raises((AssertionError, RuntimeError)):
        testing.check_critic_body(f"{HERE}:Wide")

"""Group-relative policy optimisation: the other rollouts of the same prompt are the baseline of each."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from latentac.method.diffusion import GaussianTransition
from latentac.method.records import Minibatch
from latentac.method.returns import group_advantages
from latentac.training.algorithms import Algorithm, Credit, PolicyLoss
from latentac.training.algorithms.surrogate import SurrogateSettings, clip_range, policy_loss


class GRPO(Algorithm):
    """Shao et al. 2024, over denoising steps as in Flow-GRPO (Liu et al. 2025): no critic, one advantage per
    trajectory.

    With `combination` by_head each reward is compared within its group and the results are summed by weight; with sum
    the weighted rewards are summed first. Groups whose rewards are all equal are dropped: the others' advantages are
    divided by their own root mean square, and the share that was dropped is logged.
    """

    uses_critic = False

    class Settings(SurrogateSettings):
        """Those of the surrogate, with groups."""

        group_size: Annotated[int, Field(ge=2)] = 4
        """Rollouts per prompt, which form a group."""

    def __init__(self, settings: Settings, weights: Tensor) -> None:
        self.settings, self.weights = settings, weights
        self.group_size, self.prediction_kl = settings.group_size, settings.prediction_kl
        self.clip = clip_range(settings)
        self.memory: dict[str, Tensor] = {}

    def credit(self, rewards: Tensor, values: Tensor, prompts: Tensor) -> Credit:
        settings, weights = self.settings, self.weights.to(rewards)
        if settings.combination == "sum":
            rewards, weights = (rewards @ weights)[:, None], torch.ones_like(weights[:1])
        relative, mask = group_advantages(rewards, settings.group_size)
        advantages = relative @ weights
        mask = (mask & (weights > 0)).any(1)
        scale = advantages[mask].square().mean().sqrt() if bool(mask.any()) else advantages.new_ones(())
        # A dropped group leaves the mean over transitions, not a zero in it.
        kept = mask.float().mean().clamp(min=1e-8)
        clip = settings.advantage_clip
        advantages = (advantages / scale.clamp(min=1e-8)).clamp(-clip, clip) / kept
        return Credit(
            advantages[:, None].expand(-1, values.shape[1]), values, {"zero_std_share": 1 - float(mask.float().mean())}
        )

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        return policy_loss(self.settings, transition, minibatch)

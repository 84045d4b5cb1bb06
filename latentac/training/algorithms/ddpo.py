"""Denoising diffusion policy optimisation: the mean reward, of all images or of each prompt, is the baseline."""

from typing import Literal

import torch
from torch import Tensor

from latentac.config.sections import Positive
from latentac.method.diffusion import GaussianTransition
from latentac.method.records import Minibatch
from latentac.method.returns import whiten
from latentac.training.algorithms import Algorithm, Credit, PolicyLoss
from latentac.training.algorithms.surrogate import SurrogateSettings, clip_range, policy_loss


class DDPO(Algorithm):
    """Black et al. 2023, DDPO-IS: no critic, one advantage per trajectory.

    baseline `batch`: rewards are whitened over the iteration. `prompt`: each is first compared with the running mean
    of its prompt (all iterations, this one included), once there are `prompt_min_count` rewards of it; until then with
    the mean of the iteration. The paper divides by each prompt's own deviation too, which is 0 for most prompts here.
    """

    uses_critic = False

    class Settings(SurrogateSettings):
        """Those of the surrogate, and the baseline."""

        baseline: Literal["batch", "prompt"] = "batch"
        """The mean of all images of the iteration, or of all images of a prompt so far."""
        prompt_min_count: Positive = 4
        """Number of rewards of a prompt from which its own mean is the baseline."""

    def __init__(self, settings: Settings, weights: Tensor) -> None:
        self.settings, self.weights = settings, weights
        self.group_size, self.prediction_kl = settings.group_size, settings.prediction_kl
        self.clip = clip_range(settings)
        self.memory: dict[str, Tensor] = {}

    def credit(self, rewards: Tensor, values: Tensor, prompts: Tensor) -> Credit:
        centred = rewards - self._baseline(rewards, prompts)
        if self.settings.combination == "by_head":
            centred = torch.stack([whiten(column) for column in centred.unbind(1)], 1)
        clip = self.settings.advantage_clip
        advantages = whiten(centred @ self.weights.to(rewards)).clamp(-clip, clip)
        return Credit(advantages[:, None].expand(-1, values.shape[1]), values)

    def _baseline(self, rewards: Tensor, prompts: Tensor) -> Tensor:
        """[B, M]."""
        mean = rewards.mean(0, keepdim=True).expand_as(rewards)
        if self.settings.baseline == "batch":
            return mean
        known = self.memory.get("count", rewards.new_zeros(0))
        missing = max(0, int(prompts.max()) + 1 - len(known))
        count = torch.cat([known, rewards.new_zeros(missing)]).index_add(0, prompts, torch.ones_like(rewards[:, 0]))
        total = self.memory.get("total", rewards.new_zeros(0, rewards.shape[1]))
        total = torch.cat([total, rewards.new_zeros(missing, rewards.shape[1])]).index_add(0, prompts, rewards)
        self.memory = {"count": count, "total": total}
        enough = (count[prompts] >= self.settings.prompt_min_count)[:, None]
        return torch.where(enough, total[prompts] / count[prompts][:, None], mean)

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        return policy_loss(self.settings, transition, minibatch)

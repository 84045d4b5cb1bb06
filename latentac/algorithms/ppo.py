"""Proximal policy optimisation over denoising steps, with the latent critic as its baseline."""

import torch
from torch import Tensor

from latentac.algorithms import Credit, PolicyLoss
from latentac.algorithms.surrogate import policy_loss
from latentac.config import Config
from latentac.diffusion import GaussianTransition
from latentac.losses import guidance_loss
from latentac.returns import combine, gae
from latentac.types import Minibatch


class PPO:
    """Schulman et al. 2017 on the denoising decision process of Black et al. 2023 (DDPO), with GAE from the critic."""

    uses_critic = True

    def __init__(self, config: Config) -> None:
        self.settings = config.algorithm
        self.weights = torch.tensor([reward.weight for reward in config.rewards])
        self.memory: dict[str, Tensor] = {}

    def credit(self, rewards: Tensor, values: Tensor, prompts: Tensor) -> Credit:
        settings = self.settings
        advantages, _ = gae(rewards, values, settings.discount, settings.gae_lambda)
        # The critic learns from the reward itself unless it is told to learn from its own later values too.
        _, returns = gae(rewards, values, settings.discount, settings.value_lambda)
        combined = combine(
            advantages,
            self.weights.to(rewards),
            settings.advantage_clip,
            per_step=settings.whitening == "per_step",
            by_head=settings.combination == "by_head",
        )
        return Credit(combined, returns)

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        found = policy_loss(self.settings, transition, minibatch)
        if minibatch.guidance is None:
            return found
        guidance = guidance_loss(transition, minibatch.old_means, minibatch.guidance, self.settings.value_guidance)
        dimensions = minibatch.latents[0].numel() if self.settings.log_prob_scale == "mean" else 1
        return PolicyLoss(found.loss + guidance / dimensions, {**found.metrics, "guidance": guidance.detach()})

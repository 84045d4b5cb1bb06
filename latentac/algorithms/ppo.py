"""Proximal policy optimisation over denoising steps, with the latent critic or the group as its baseline."""

import torch
from torch import Tensor

from latentac.algorithms import PolicyLoss
from latentac.config import Config
from latentac.diffusion import GaussianTransition
from latentac.losses import clipped_surrogate, transition_kl
from latentac.returns import combine, gae, group_advantages
from latentac.types import Minibatch


class PPO:
    """Schulman et al. 2017 on the denoising decision process of Black et al. 2023 (DDPO), with GAE from the critic.

    The ratio is exp(scale * (log p - log p_old)): scale 1 for `log_prob_scale` sum, 1/D for mean, and `clip` is in the
    same unit, so mean with clip 0.2/D bounds what sum bounds with 0.2, to first order.
    """

    def __init__(self, config: Config) -> None:
        self.settings = config.algorithm
        self.weights = torch.tensor([reward.weight for reward in config.rewards])

    def advantages(self, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.settings
        advantages, returns = gae(rewards, values, settings.discount, settings.gae_lambda)
        if settings.baseline == "group":
            relative = group_advantages(rewards, settings.group_size)
            advantages = relative[:, None].expand_as(values)
        return combine(advantages, self.weights.to(rewards), settings.advantage_clip), returns

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        dimensions = minibatch.latents[0].numel()
        scale = 1 / dimensions if self.settings.log_prob_scale == "mean" else 1.0
        log_probs = transition.log_prob(minibatch.next_latents)
        surrogate = clipped_surrogate(
            scale * log_probs, scale * minibatch.old_log_probs, minibatch.advantages, self.settings.clip
        )
        old = GaussianTransition(minibatch.old_means, transition.std)
        metrics = {
            "kl": transition_kl(old, transition).mean().detach(),
            "clip_share": surrogate.clip_share,
            "ratio_deviation": (surrogate.ratio - 1).abs().mean(),
        }
        return PolicyLoss(surrogate.loss, metrics)

"""Proximal policy optimisation over denoising steps, with the latent critic as its baseline."""

from typing import Literal

from torch import Tensor

from latentac.config.sections import Fraction, NonNegative
from latentac.method.diffusion import GaussianTransition
from latentac.method.losses import value_gradient_loss
from latentac.method.records import Minibatch
from latentac.method.returns import combine, gae
from latentac.training.algorithms import Algorithm, Credit, PolicyLoss
from latentac.training.algorithms.surrogate import SurrogateSettings, clip_range, policy_loss


class PPO(Algorithm):
    """Schulman et al. 2017 on the denoising decision process of Black et al. 2023 (DDPO), with GAE from the critic."""

    uses_critic = True

    class Settings(SurrogateSettings):
        """Those of the surrogate, and how credit is assigned over the steps."""

        discount: Fraction = 1.0
        """Discount factor per denoising step."""
        gae_lambda: Fraction = 1.0
        """Lambda of GAE for the advantages. Below 1, the critic's value at later steps replaces part of the final
        reward. This reduces the noise from later steps."""
        value_lambda: Fraction = 1.0
        """Lambda for the critic's own targets. With 1 the target is the reward."""
        whitening: Literal["global", "per_step"] = "global"
        """Whiten the advantages over all steps together, or each step separately."""
        value_gradient: NonNegative = 0.0
        """Weight of the value gradient in the policy's loss. It moves the policy's mean by std^2 times the gradient of
        the values, in standard deviations of each reward. With 0 the critic is only a baseline."""

    def __init__(self, settings: Settings, weights: Tensor) -> None:
        self.settings, self.weights = settings, weights
        self.group_size, self.prediction_kl = settings.group_size, settings.prediction_kl
        self.clip = clip_range(settings)
        self.value_gradient = settings.value_gradient
        self.memory: dict[str, Tensor] = {}

    def credit(self, rewards: Tensor, values: Tensor, prompts: Tensor) -> Credit:
        settings = self.settings
        advantages, _ = gae(rewards, values, settings.discount, settings.gae_lambda)
        # The critic learns from the reward itself unless the settings say that it learns from its own later values too.
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
        if minibatch.value_gradients is None:
            return found
        gradient = value_gradient_loss(
            transition, minibatch.old_means, minibatch.value_gradients, self.settings.value_gradient
        )
        dimensions = minibatch.latents[0].numel() if self.settings.log_prob_scale == "mean" else 1
        return PolicyLoss(found.loss + gradient / dimensions, {**found.metrics, "value_gradient_kl": gradient.detach()})

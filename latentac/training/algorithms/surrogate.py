"""The policy's loss that all algorithms share: a surrogate of the expected advantage within a trust region."""

from typing import Literal

import torch

from latentac.config.extensions import Settings
from latentac.config.sections import NonNegative, Positive, Rate
from latentac.method.diffusion import GaussianTransition
from latentac.method.losses import Surrogate, clipped_surrogate, guarded_log_ratio, masked_surrogate, transition_kl
from latentac.method.records import Minibatch
from latentac.training.algorithms import PolicyLoss


class SurrogateSettings(Settings):
    """Settings that all algorithms share."""

    ratio: Literal["likelihood", "guard"] = "likelihood"
    """`likelihood`, or `guard`: the log-ratio of GRPO-Guard, which has mean 0 at every noise level."""
    log_prob_scale: Literal["mean", "sum"] = "mean"
    """`mean` divides the log-probability by the number of latent dimensions, so that `clip` is a bound per
    dimension."""
    trust_region: Literal["clip", "divergence"] = "clip"
    """`clip` of PPO, or `divergence`: the mask of Flow-DPPO beyond `divergence_bound`."""
    clip: Rate = 8e-4
    """Bound on |ratio - 1|, in the unit of `log_prob_scale`."""
    divergence_bound: Rate = 1e-4
    """Bound for the trust region `divergence`, in nats per latent dimension."""
    advantage_clip: Rate = 10.0
    """Advantages are clipped to this bound, in standard deviations."""
    combination: Literal["by_head", "sum"] = "by_head"
    """How several rewards are combined. `by_head` whitens the advantages of each before the weighted sum; `sum` whitens
    after it."""
    group_size: Positive = 1
    """Rollouts per prompt in an iteration."""
    prediction_kl: NonNegative = 0.0
    """Weight of the penalty mean((prediction - prediction of the base)^2); with 0 no copy of the base is kept."""


def clip_range(settings: SurrogateSettings) -> float | None:
    """The bound on |ratio - 1|; None where the trust region bounds a divergence instead."""
    return settings.clip if settings.trust_region == "clip" else None


def policy_loss(settings: SurrogateSettings, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
    """Ratio and trust region as the settings name them, and what is watched: the exact KL of old and new transition in
    nats, the share of terms without gradient, and how far the ratio is from 1.

    The likelihood ratio is exp(scale * (log p - log p_old)): scale 1 for `log_prob_scale` sum, 1/D for mean, and `clip`
    is in the same unit, so mean with clip 0.2/D bounds what sum bounds with 0.2, to first order.
    """
    dimensions = minibatch.latents[0].numel()
    old = GaussianTransition(minibatch.old_means, transition.std)
    with torch.no_grad():
        divergence = transition_kl(old, transition)
    if settings.ratio == "guard":
        log_ratio = guarded_log_ratio(transition, minibatch.old_means, minibatch.next_latents)
    else:
        scale = 1 / dimensions if settings.log_prob_scale == "mean" else 1.0
        log_ratio = scale * (transition.log_prob(minibatch.next_latents) - minibatch.old_log_probs)
    surrogate: Surrogate
    if settings.trust_region == "divergence":
        bound = settings.divergence_bound
        surrogate = masked_surrogate(log_ratio, minibatch.advantages, divergence / dimensions, bound)
    else:
        surrogate = clipped_surrogate(log_ratio, minibatch.advantages, settings.clip)
    metrics = {
        "kl": divergence.mean(),
        "clip_share": surrogate.clip_share,
        "ratio_deviation": (surrogate.ratio - 1).abs().mean(),
    }
    return PolicyLoss(surrogate.loss, metrics)

"""The objectives: clipped surrogate, value regression, KL. Pure functions on float32 tensors."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from latentac.method.diffusion import GaussianTransition, Path, Prediction, broadcast
from latentac.method.records import ValueGradients


@dataclass(frozen=True)
class Surrogate:
    """loss: [] to minimise; ratio: [N] detached; clip_share: [] share of terms that were given no gradient."""

    loss: Float[Tensor, ""]
    ratio: Float[Tensor, "N"]
    clip_share: Float[Tensor, ""]


def clipped_surrogate(log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"], clip: float) -> Surrogate:
    """PPO's pessimistic surrogate (Schulman et al. 2017, eq. 7): mean max(-A r, -A clip(r, 1-e, 1+e)), r = exp.

    log_ratio, advantages: [N]. The caller chooses the ratio's scale; `clip` is in the same unit.
    """
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = plain.maximum(clipped).mean()
    outside = ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))
    return Surrogate(loss, ratio.detach(), outside.float().mean())


def masked_surrogate(
    log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"], divergence: Float[Tensor, "N"], bound: float
) -> Surrogate:
    """The trust region of Flow-DPPO: mean -A r over all terms, without those whose divergence is beyond the bound and
    whose ratio would be driven still further from 1.

    log_ratio, advantages: [N]; divergence: [N], that of the new transition from the old, in the unit of `bound`.
    """
    ratio = log_ratio.exp()
    further = torch.where(advantages > 0, ratio > 1, ratio < 1)
    dropped = ((divergence > bound) & further).detach()
    loss = (-advantages * ratio * ~dropped).mean()
    return Surrogate(loss, ratio.detach(), dropped.float().mean())


def guarded_log_ratio(
    transition: GaussianTransition, old_mean: Float[Tensor, "N *latent"], next_latents: Float[Tensor, "N *latent"]
) -> Float[Tensor, "N"]:
    """[N], GRPO-Guard's log-ratio: mean over the latent dimensions of n (mu - mu_old), with n = (x' - mu_old) / std.

    The likelihood ratio's quadratic part, whose mean is below 0 and grows as std falls, is left out, and so is the
    division by std: comparable over the steps, and of mean 0 under the old policy.
    """
    noise = (next_latents - old_mean) / broadcast(transition.std, old_mean)
    return (noise * (transition.mean - old_mean)).flatten(1).mean(1)


def value_loss(
    values: Float[Tensor, "N M"],
    returns: Float[Tensor, "N M"],
    target_clip: float,
    weights: Float[Tensor, "M"] | None = None,
) -> Float[Tensor, ""]:
    """0.5 mean (V - clamp(G, -c, c))^2, with V and G in units of the reward's running scale.

    values, returns: [N, M]; target_clip: c; weights: [M], how much each reward counts, by default all the same. The
    predictions are not clipped, only the targets. Returns [].
    """
    squares = 0.5 * (values - returns.clamp(-target_clip, target_clip)).square()
    return squares.mean() if weights is None else (squares * weights).sum(1).mean() / weights.sum()


def value_gradient_loss(
    transition: GaussianTransition,
    old_mean: Float[Tensor, "N *latent"],
    value_gradients: ValueGradients,
    strength: float,
) -> Float[Tensor, ""]:
    """[], mean KL in nats per step to the acting policy moved along the value gradient, N(mean_old + w std^2 g, std^2).

    old_mean: [N, *latent]; value_gradients: N rows, g the gradients; rows without one count 0; strength: w.
    Where the policy is still the acting one the loss descends along -w g d mean/d theta. That is the pathwise gradient
    of w E[V(z')] (Heess et al. 2015, eq. 13), by Stein's identity the expectation of the likelihood-ratio gradient with
    V as the advantage, without that one's noise. The optimum lies at the steered policy, so a step is bounded however
    steep the critic is.
    """
    std = broadcast(transition.std, old_mean)
    steered = GaussianTransition(old_mean + strength * std**2 * value_gradients.gradients, transition.std)
    return (transition_kl(steered, transition) * value_gradients.known).mean()


def transition_kl(p: GaussianTransition, q: GaussianTransition) -> Float[Tensor, "B"]:
    """[B], KL(p || q) in nats between two transitions with the same std: ||mean_p - mean_q||^2 / (2 std^2)."""
    difference = (p.mean - q.mean) / broadcast(p.std, p.mean)
    return 0.5 * difference.flatten(1).square().sum(1)


def prediction_kl(prediction: Prediction, reference: Prediction, path: Path) -> Float[Tensor, ""]:
    """[], mean over images and dimensions of (prediction - reference)^2, of the noise for variance-preserving models
    and of the velocity n - x0 for flows: the KL of two transitions but for a factor of each noise level."""
    difference = prediction.noise - reference.noise
    if path == "flow":
        difference = difference - (prediction.clean - reference.clean)
    return difference.square().mean()

"""The objectives: clipped surrogate, value regression, KL. Pure functions on float32 tensors."""

from dataclasses import dataclass

from torch import Tensor

from latentac.diffusion import GaussianTransition, broadcast


@dataclass(frozen=True)
class Surrogate:
    """loss: [] to minimise; ratio: [N] detached; clip_share: [] share of terms whose gradient the clip removed."""

    loss: Tensor
    ratio: Tensor
    clip_share: Tensor


def clipped_surrogate(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Surrogate:
    """PPO's pessimistic surrogate (Schulman et al. 2017, eq. 7): mean max(-A r, -A clip(r, 1-e, 1+e)).

    log_probs, old_log_probs, advantages: [N]; r = exp(log_probs - old_log_probs). The caller chooses whether the
    log-probs are sums over latent dimensions or means (`algorithm.log_prob_scale`); `clip` is in the same unit.
    """
    ratio = (log_probs - old_log_probs).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = plain.maximum(clipped).mean()
    outside = ((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))
    return Surrogate(loss, ratio.detach(), outside.float().mean())


def value_loss(values: Tensor, returns: Tensor, target_clip: float) -> Tensor:
    """0.5 mean (V - clamp(G, -c, c))^2, with V and G in units of the reward's running scale.

    values, returns: [N, M]; target_clip: c. The predictions are not clipped, only the targets. Returns [].
    """
    return 0.5 * (values - returns.clamp(-target_clip, target_clip)).square().mean()


def transition_kl(p: GaussianTransition, q: GaussianTransition) -> Tensor:
    """[B], KL(p || q) in nats between two transitions with the same std: ||mean_p - mean_q||^2 / (2 std^2)."""
    difference = (p.mean - q.mean) / broadcast(p.std, p.mean)
    return 0.5 * difference.flatten(1).square().sum(1)

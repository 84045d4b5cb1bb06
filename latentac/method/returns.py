"""Credit: generalised advantage estimation, group baselines, whitening. Pure functions on float32 tensors."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def gae(
    reward: Float[Tensor, "B M"], values: Float[Tensor, "B S M"], discount: float, gae_lambda: float
) -> tuple[Float[Tensor, "B S M"], Float[Tensor, "B S M"]]:
    """Generalised advantage estimation with a reward at the last step only (Schulman et al. 2016, eq. 16).

    d_k = 1[k = S-1] R + discount V_{k+1} - V_k,  A_k = d_k + discount lambda A_{k+1},  V_S = 0,  G_k = A_k + V_k.

    reward: [B, M]; values: [B, S, M]. Returns (advantages [B, S, M], returns [B, S, M]), in the reward's own unit.
    With discount = lambda = 1: G_k = R and A_k = R - V_k.
    """
    num_steps = values.shape[1]
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(reward)
    for step in reversed(range(num_steps)):
        last = step == num_steps - 1
        target = reward if last else discount * values[:, step + 1]
        following = target - values[:, step] + discount * gae_lambda * following
        advantages[:, step] = following
    return advantages, advantages + values


def group_advantages(
    reward: Float[Tensor, "B M"], group_size: int, epsilon: float = 1e-6
) -> tuple[Float[Tensor, "B M"], Bool[Tensor, "B M"]]:
    """Group-relative advantages (GRPO, Shao et al. 2024): (R - mean of the group) / (std of the group + epsilon).

    reward: [B, M] with the G = `group_size` rollouts of a prompt in consecutive rows. Returns ([B, M], bool [B, M]): a
    group whose rewards are all equal teaches nothing, gets zeros, and has False in the second. Raises ValueError
    for a group of one: its advantage is 0.
    """
    if group_size < 2:
        raise ValueError(f"a group baseline needs at least 2 rollouts a prompt, got {group_size}")
    groups = reward.unflatten(0, (-1, group_size))
    std = groups.std(1, keepdim=True, correction=0)
    advantages = (groups - groups.mean(1, keepdim=True)) / (std + epsilon)
    mask = (std > epsilon).expand_as(groups)
    return (advantages * mask).flatten(0, 1), mask.flatten(0, 1)


def whiten(x: Float[Tensor, "*axes"], epsilon: float = 1e-8, dim: int | None = None) -> Float[Tensor, "*axes"]:
    """(x - mean) / std over all entries, or along `dim`; what is constant becomes zeros."""
    if dim is None:
        return (x - x.mean()) / (x.std(correction=0) + epsilon)
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, correction=0, keepdim=True) + epsilon)


def combine(
    advantages: Float[Tensor, "B S M"],
    weights: Float[Tensor, "M"],
    clip: float,
    *,
    per_step: bool = False,
    by_head: bool = True,
) -> Float[Tensor, "B S"]:
    """One advantage a step out of one a reward: A = clip(whiten(sum_m w_m whiten(A_m))).

    advantages: [B, S, M]; weights: [M]; clip: bound on |A| in standard deviations. Returns [B, S].
    Whitening each reward first keeps a reward on scale 0.3 and one on scale 30 from starving or drowning each other;
    without `by_head` that is left out. per_step: the images of each step are whitened among themselves.
    """
    dim = 0 if per_step else None
    if by_head:
        advantages = torch.stack([whiten(column, dim=dim) for column in advantages.unbind(-1)], -1)
    return whiten(advantages @ weights, dim=dim).clamp(-clip, clip)


def explained_variance(values: Float[Tensor, "B K"], reward: Float[Tensor, "B"]) -> Float[Tensor, "K"]:
    """1 - Var(R - V) / Var(R) at each step: 1 is perfect, 0 is no better than a constant, below 0 is worse.

    values: [B, K]; reward: [B]. Returns [K]; zeros where every reward is equal, for then there is nothing to explain.
    """
    total = reward.var(correction=0)
    residual = (reward[:, None] - values).var(0, correction=0)
    return torch.where(total > 0, 1 - residual / total.clamp(min=1e-12), torch.zeros_like(residual))


def rank_correlation(
    values: Float[Tensor, "B K"], reward: Float[Tensor, "B"], groups: Int64[Tensor, "B"]
) -> Float[Tensor, "K"]:
    """Kendall's tau-b of values and rewards over the pairs within a group, at each step: does the critic know which of
    two images of one prompt is better, and not only which prompt is easy?

    values: [B, K]; reward: [B]; groups: int64 [B]. Returns [K]; zeros where no two rewards of a group differ.
    """
    same = groups[:, None] == groups[None]
    first, second = torch.nonzero(same.triu(1), as_tuple=True)
    order = (reward[first] - reward[second]).sign()
    first, second, order = first[order != 0], second[order != 0], order[order != 0]
    if not len(order):
        return values.new_zeros(values.shape[1])
    signs = (values[first] - values[second]).sign()
    concordance = (signs * order[:, None]).mean(0)
    return concordance / signs.abs().mean(0).sqrt().clamp(min=1e-12)

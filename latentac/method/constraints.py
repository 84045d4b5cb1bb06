"""Several rewards: bounds on what each counts, and floors as constraints. Pure functions.

A floor f_i asks for E[R_i] >= f_i. The Lagrangian of "maximise sum_i w_i E[R_i] / s_i under the floors" is

    L = sum_i w_i E[R_i] / s_i + sum_i lambda_i (E[R_i] - f_i) / s_i,    lambda_i >= 0,

with s_i the standard deviation of reward i. Its gradient for the policy is that of sum_i (w_i + lambda_i) E[R_i] / s_i,
so every head keeps its own advantage A_i, and the weights of the sum are w_i + lambda_i. The gradient for lambda_i is
(E[R_i] - f_i) / s_i, along which lambda_i descends (Boyd and Vandenberghe 2004, 5.6; Tessler et al. 2019).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Bounds = Sequence[float]


def clip_rewards(rewards: Float[Tensor, "B M"], bounds: Sequence[Bounds | None]) -> Float[Tensor, "B M"]:
    """Each column within its bounds (low, high); None leaves it as it is, and None everywhere all of them."""
    if not any(bounds):
        return rewards
    columns = zip(rewards.unbind(1), bounds, strict=True)
    return torch.stack([column.clamp(*bound) if bound else column for column, bound in columns], 1)


def weights_under_floors(weights: Float[Tensor, "M"], multipliers: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
    """v_i = (w_i + lambda_i) sum_j w_j / sum_j (w_j + lambda_j): their sum is that of the weights, so multipliers shift
    the policy's attention and do not lengthen its steps."""
    raised = weights + multipliers
    return raised * (weights.sum() / raised.sum())


def updated_multiplier(
    multiplier: float, rewards: Float[Tensor, "B"], floor: float, *, rate: float, most: float
) -> float:
    """lambda <- min(most, max(0, lambda + rate (f - mean R) / s)), one step of projected dual ascent.

    rewards: [B], in their own unit. The miss in standard deviations is bounded by 1, so that rewards which hardly
    differ do not send lambda to its bound at once; where all are equal it is 1 in the miss's direction.
    """
    exact = rewards.double()
    miss, std = floor - float(exact.mean()), float(exact.std(correction=0))
    step = max(-1.0, min(1.0, miss / std)) if std > 0 else float((miss > 0) - (miss < 0))
    return min(most, max(0.0, multiplier + rate * step))

"""Algorithms: how rewards become advantages and advantages become a loss. One file per algorithm, one row here."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from latentac.config.extensions import Table
from latentac.method.diffusion import GaussianTransition
from latentac.method.records import Minibatch


@dataclass(frozen=True)
class Credit:
    """advantages: [B, S]; returns: [B, S, M], the critic's targets in each reward's unit; metrics: of the iteration."""

    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyLoss:
    """loss: [] to minimise, a mean over the minibatch; metrics: detached [] tensors, means over the minibatch."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Algorithm(Protocol):
    """Built as `Class(settings, weights)`, or `Class(weights)` without `Settings`. weights: float32 [M], the rewards'.

    The trainer calls `credit` once per iteration on *all* images of all workers, and `loss` on minibatches. A class
    that derives from this one inherits the defaults below.

    weights: of the rewards. Where a reward has a floor, the trainer replaces them before each call of `credit`.
    uses_critic: without, no critic is called or trained, and `values` has no columns.
    memory: tensors that are kept from iteration to iteration; part of every checkpoint.
    group_size: rollouts per prompt in an iteration.
    value_gradient: above 0, each minibatch has the gradient of the critic's values (`Minibatch.value_gradients`).
    prediction_kl: weight of mean (prediction - prediction of the base)^2 in the loss; 0 keeps no reference.
    clip: the range of |ratio - 1| before the first update is bounded by a share of this; None where there is no ratio.
    """

    weights: Tensor
    uses_critic: bool
    memory: dict[str, Tensor]
    group_size: int = 1
    value_gradient: float = 0.0
    prediction_kl: float = 0.0
    clip: float | None = None

    def credit(self, rewards: Tensor, values: Tensor, prompts: Tensor) -> Credit:
        """rewards: [B, M]; values: [B, S, M] in each reward's unit; prompts: int64 [B], the prompts' indices."""
        ...

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        """The policy's loss on N transitions; `transition` is the present policy's, with gradient."""
        ...


ALGORITHMS = Table(
    "algorithm",
    {
        "ppo": "latentac.training.algorithms.ppo:PPO",
        "grpo": "latentac.training.algorithms.grpo:GRPO",
        "ddpo": "latentac.training.algorithms.ddpo:DDPO",
    },
)

"""Algorithms: how rewards become advantages and advantages become a loss. One file an algorithm, one row here."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Protocol

from torch import Tensor

from latentac.config import Config
from latentac.diffusion import GaussianTransition
from latentac.types import Minibatch


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
    """Built as `Algorithm(config)`; the trainer calls `credit` once an iteration on *all* images of all workers.

    uses_critic: without, no critic is asked or trained, and `values` has no columns.
    memory: what is remembered from iteration to iteration; part of every checkpoint.
    """

    uses_critic: bool
    memory: dict[str, Tensor]

    def credit(self, rewards: Tensor, values: Tensor, prompts: Tensor) -> Credit:
        """rewards: [B, M]; values: [B, S, M] in each reward's unit; prompts: int64 [B], which prompt an image has."""
        ...

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        """The policy's loss on N transitions; `transition` is the present policy's, with gradient."""
        ...


ALGORITHMS = {
    "ppo": "latentac.algorithms.ppo:PPO",
    "grpo": "latentac.algorithms.grpo:GRPO",
    "ddpo": "latentac.algorithms.ddpo:DDPO",
}


def make_algorithm(config: Config) -> Algorithm:
    """The algorithm that `config.algorithm.name` names: a row of the table, or `module:Class`."""
    name = config.algorithm.name
    module, _, attribute = ALGORITHMS.get(name, name).partition(":")
    algorithm: Algorithm = getattr(import_module(module), attribute)(config)
    return algorithm

"""Algorithms: how rewards become advantages and advantages become a loss. One file an algorithm, one row here."""

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from torch import Tensor

from latentac.config import Config
from latentac.diffusion import GaussianTransition
from latentac.types import Minibatch


@dataclass(frozen=True)
class PolicyLoss:
    """loss: [] to minimise, a mean over the minibatch; metrics: detached [] tensors, means over the minibatch."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Algorithm(Protocol):
    """Built as `Algorithm(config)`; the trainer calls `advantages` once an iteration on *all* images of all workers."""

    def advantages(self, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """rewards: [B, M]; values: [B, S, M]. Returns advantages [B, S] and value targets [B, S, M]."""
        ...

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        """The policy's loss on N transitions; `transition` is the present policy's, with gradient."""
        ...


ALGORITHMS = {"ppo": "latentac.algorithms.ppo:PPO"}


def make_algorithm(config: Config) -> Algorithm:
    """The algorithm that `config.algorithm.name` names: a row of the table, or `module:Class`."""
    name = config.algorithm.name
    module, _, attribute = ALGORITHMS.get(name, name).partition(":")
    algorithm: Algorithm = getattr(import_module(module), attribute)(config)
    return algorithm

"""How several rewards become one objective: their weights, their bounds, and the multipliers of their floors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentac.config.schema import Reward
from latentac.method.constraints import clip_rewards, updated_multiplier, weights_under_floors

_STATE = "multipliers"


class Combination:
    """Of the configured rewards. The same on every worker.

    constrained: whether any reward has a floor
    """

    def __init__(self, rewards: Sequence[Reward], device: torch.device) -> None:
        self._rewards = rewards
        self._given = torch.tensor([reward.weight for reward in rewards], device=device)
        self._multipliers = [0.0] * len(rewards)
        self.constrained = any(reward.floor is not None for reward in rewards)

    @property
    def weights(self) -> Tensor:
        """float32 [M], of the present multipliers."""
        if not self.constrained:
            return self._given
        return weights_under_floors(self._given, self._given.new_tensor(self._multipliers))

    def clipped(self, rewards: Tensor) -> Tensor:
        """[B, M], what advantages and critic are made of."""
        return clip_rewards(rewards, [reward.bounds for reward in self._rewards])

    def learn(self, rewards: Tensor) -> None:
        """Move the multipliers by the rewards of an iteration, [images, M], as they were measured."""
        for index, reward in enumerate(self._rewards):
            if reward.floor is not None:
                self._multipliers[index] = updated_multiplier(
                    self._multipliers[index],
                    rewards[:, index],
                    reward.floor,
                    rate=reward.multiplier_rate,
                    most=reward.multiplier_max,
                )

    def metrics(self) -> dict[str, Any]:
        """The multipliers, of the rewards that have a floor."""
        pairs = zip(self._rewards, self._multipliers, strict=True)
        found = {reward.name: multiplier for reward, multiplier in pairs if reward.floor is not None}
        return {"multipliers": found} if found else {}

    def state(self) -> dict[str, Tensor]:
        """All that `learn` has changed."""
        return {_STATE: torch.tensor(self._multipliers, dtype=torch.float64)} if self.constrained else {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        if self.constrained:
            self._multipliers = tensors[_STATE].tolist()

"""Steering by the reward itself: for a reward that can be asked while an image is made, and to measure a critic by."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from latentac.backbones import Denoiser
from latentac.critic import ValueFunction
from latentac.method.diffusion import Prediction
from latentac.method.records import Conditioning, Trajectory
from latentac.rewards.configured import ConfiguredReward
from latentac.sampling.rollout import score
from latentac.worlds.prompts import Prompt


class TrueReward:
    """Stands where a critic stands, in rollouts whose rows have these `prompts`: the value of a state is the reward of
    the image that the denoiser guesses from it (Singhal et al. 2025). It has no gradient.

    Each value decodes an image and asks every reward, which a critic does not. scale: the critic whose standard
    deviations the steering weights are in.
    """

    def __init__(
        self, backbone: Denoiser, rewards: Sequence[ConfiguredReward], prompts: Sequence[Prompt], scale: ValueFunction
    ) -> None:
        self.backbone, self.rewards, self.prompts, self.scale = backbone, rewards, prompts, scale

    def features(self, latents: Tensor, prediction: Prediction, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"clean": prediction.clean}

    def standardised(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self._scored(features["clean"])

    def standardise(self, returns: Tensor) -> Tensor:
        return self.scale.standardise(returns)

    def unstandardise(self, values: Tensor) -> Tensor:
        return self.scale.unstandardise(values)

    def judge(self, trajectory: Trajectory) -> Tensor:
        """[B N, M], standardised: of the images at the end, for `steered_rollout` to choose by."""
        return self._scored(trajectory.clean)

    def _scored(self, clean: Tensor) -> Tensor:
        """Rows that a rollout asks about at once are of one step, or of all steps of each image in turn."""
        times = len(clean) // len(self.prompts)
        texts = [prompt for prompt in self.prompts for _ in range(times)]
        rewards = score(self.rewards, self.backbone.decode(clean), texts).rewards
        return self.scale.standardise(rewards.to(clean.device))

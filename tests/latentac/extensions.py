"""What somebody adds from outside the package, each named as `tests.latentac.extensions:Class` in a configuration."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from latentac.backbones import Denoiser
from latentac.backbones.pipeline import PipelineSettings
from latentac.backbones.unet import UNetBackbone
from latentac.critic.reader import ReaderSettings
from latentac.method.diffusion import GaussianTransition, Prediction
from latentac.method.records import Conditioning, Minibatch
from latentac.training.algorithms import Algorithm, Credit, PolicyLoss
from latentac.training.algorithms.ppo import PPO


class Warmth:
    """A reward."""

    unit = "grey levels of red above blue"

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        images = np.zeros((2, 4, 4, 3), np.uint8)
        images[1, ..., 0] = 200
        return images, ["", ""], np.array([0.0, 200.0], np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        means: np.ndarray = (images[..., 0].astype(np.float32) - images[..., 2]).mean((1, 2))
        return means


class Reinforce(Algorithm):
    """An algorithm: the score function times the centred reward."""

    uses_critic = False

    def __init__(self, weights: Tensor) -> None:
        self.memory: dict[str, Tensor] = {"seen": torch.zeros(())}

    def credit(self, rewards: Tensor, values: Tensor, prompts: Tensor) -> Credit:
        self.memory = {"seen": self.memory["seen"] + len(rewards)}
        centred = rewards[:, 0] - rewards[:, 0].mean()
        return Credit(centred[:, None].expand(-1, values.shape[1]), values, {"zero_std_share": 0.0})

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        log_prob = transition.log_prob(minibatch.next_latents)
        loss = -(minibatch.advantages * log_prob).mean() / minibatch.latents[0].numel()
        change = (log_prob - minibatch.old_log_probs).detach()
        metrics = {"kl": -change.mean(), "clip_share": torch.zeros(()), "ratio_deviation": change.abs().mean()}
        return PolicyLoss(loss, metrics)


class Backwards(UNetBackbone):
    """A backbone: the UNet, with its taps under other names and images upside down."""

    def __init__(self, settings: PipelineSettings, folder: Path, device: torch.device) -> None:
        super().__init__(settings, folder, device)
        self.tap_shapes = {f"the_{name}": shape for name, shape in self.tap_shapes.items()}

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Prediction, dict[str, Tensor]]:
        prediction, taps = super().predict(latents, sigma, conditioning)
        return prediction, {f"the_{name}": tap for name, tap in taps.items()}

    def images(self, latents: Tensor) -> Tensor:
        return super().images(latents).flip(2)


class Mean(nn.Module):
    """A critic's body: the mean of each latent channel, and the noise level."""

    Settings = ReaderSettings

    def __init__(self, settings: ReaderSettings, backbone: Denoiser) -> None:
        super().__init__()
        self.width = backbone.latent_shape[0] + 1

    def features(self, latents: Tensor, prediction: Prediction, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": latents.flatten(2).mean(2)}

    def forward(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.cat([features["mean"], sigma[:, None]], 1)


class Eventful(PPO):
    """PPO during which something happens: `events` are called before these calls of its loss, and `always` before each.
    There are as many calls as blocks and updates in an iteration. A loss whose event returns `DIVERGE` is no number."""

    DIVERGE = "diverge"

    events: ClassVar[dict[int, Callable[[], object]]] = {}
    always: Callable[[], object] = staticmethod(lambda: None)
    calls = 0

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        type(self).calls += 1
        self.always()
        happened = self.events.get(type(self).calls, lambda: None)()
        found = super().loss(transition, minibatch)
        return PolicyLoss(found.loss * float("nan"), found.metrics) if happened == self.DIVERGE else found


class Stumbling(PPO):
    """PPO whose loss is not a number in the calls that `stumbles` counts."""

    stumbles: Sequence[int] = ()
    calls = 0

    def loss(self, transition: GaussianTransition, minibatch: Minibatch) -> PolicyLoss:
        found = super().loss(transition, minibatch)
        type(self).calls += 1
        if type(self).calls in self.stumbles:
            return PolicyLoss(found.loss * float("nan"), found.metrics)
        return found

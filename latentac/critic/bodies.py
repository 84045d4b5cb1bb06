"""Critic bodies: the denoiser's own features, or, for comparison, networks that share nothing with it."""

from collections.abc import Callable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from latentac.backbones import Denoiser
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Positive, Rate
from latentac.critic.reader import Reader, ReaderSettings
from latentac.method.diffusion import Prediction
from latentac.method.records import Conditioning

_MOST_CELLS = 16  # a side: larger feature maps are averaged down, for thousands of states are kept at once


class FrozenTaps(nn.Module):
    """Feature maps of the policy's own forward pass. Values need no other forward pass."""

    Settings = ReaderSettings

    def __init__(self, settings: ReaderSettings, backbone: Denoiser) -> None:
        super().__init__()
        self.reader = Reader({n: _bounded(s) for n, s in backbone.tap_shapes.items()}, backbone.text_width, settings)
        self.width = self.reader.width

    def features(self, latents: Tensor, prediction: Prediction, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.reader.inputs({name: _averaged(tap).float() for name, tap in taps.items()})

    def forward(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        summary: Tensor = self.reader(features, sigma, conditioning)
        return summary


class _OwnBackbone(nn.Module):
    """A second backbone that starts with the pretrained weights and learns values."""

    def __init__(self, settings: "BackboneSettings", backbone: Denoiser, adaptation: PolicySettings) -> None:
        super().__init__()
        self.backbone_learning_rate = settings.backbone_learning_rate
        self._denoiser = backbone.clone()
        self._denoiser.module.float().requires_grad_(False)
        self._denoiser.adapt(adaptation)
        self.backbone: nn.Module = self._denoiser.module
        self.reader = Reader({n: _bounded(s) for n, s in backbone.tap_shapes.items()}, backbone.text_width, settings)
        self.width = self.reader.width

    def shard(self, shard: Callable[[Denoiser], Denoiser]) -> None:
        """Replace the denoiser by `shard` of it, which has the same weights."""
        self._denoiser = shard(self._denoiser)

    def features(self, latents: Tensor, prediction: Prediction, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": latents}

    def forward(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        _, taps = self._denoiser.predict(features["latents"], sigma, conditioning)
        inputs = self.reader.inputs({name: _averaged(tap).float() for name, tap in taps.items()})
        summary: Tensor = self.reader(inputs, sigma, conditioning)
        return summary


class BackboneSettings(ReaderSettings):
    """Those of the reader, and of the second backbone."""

    backbone_learning_rate: Rate = 1e-4
    """Learning rate of the pretrained weights, or of the adapters on them."""


class BackboneCopy(_OwnBackbone):
    """A copy of the backbone, all of whose weights learn the values."""

    Settings = BackboneSettings

    def __init__(self, settings: BackboneSettings, backbone: Denoiser) -> None:
        super().__init__(settings, backbone, PolicySettings(adaptation="full"))


class LoraBackbone(_OwnBackbone):
    """A frozen copy of the backbone with low-rank adapters that learn the values."""

    class Settings(BackboneSettings):
        """Those of a second backbone, and of its adapters."""

        rank: Annotated[int, Field(gt=0, le=1024)] = 32
        """Rank of the adapters."""
        alpha: Positive = 64
        """LoRA's alpha: the adapters' output is multiplied by alpha / rank."""

    def __init__(self, settings: Settings, backbone: Denoiser) -> None:
        adaptation = PolicySettings(adaptation="lora", lora_rank=settings.rank, lora_alpha=settings.alpha)
        super().__init__(settings, backbone, adaptation)


class Pixel(nn.Module):
    """A small network on the decoded prediction of the clean image, as in earlier actor-critics."""

    Settings = ReaderSettings

    def __init__(self, settings: ReaderSettings, backbone: Denoiser) -> None:
        super().__init__()
        self._images = backbone.images
        with torch.no_grad():
            shape = self._images(torch.zeros(1, *backbone.latent_shape, device=backbone.device)).shape
        self.stem = _stem(shape[1], settings.width, shape[-1] // 8)
        shape = self.stem(torch.zeros(shape)).shape[1:]
        self.reader = Reader({"image": tuple(shape)}, backbone.text_width, settings)
        self.width = self.reader.width

    def features(self, latents: Tensor, prediction: Prediction, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"image": self._images(prediction.clean)}

    def forward(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = self.reader.inputs({"image": self.stem(features["image"])})
        summary: Tensor = self.reader(inputs, sigma, conditioning)
        return summary


class LatentCnn(nn.Module):
    """A small network on the noisy latents. It reads the same state as the denoiser, but shares nothing with it."""

    Settings = ReaderSettings

    def __init__(self, settings: ReaderSettings, backbone: Denoiser) -> None:
        super().__init__()
        channels, height, width = backbone.latent_shape
        self.stem = _stem(channels, settings.width, max(1, height // 8))
        shape = self.stem(torch.zeros(1, channels, height, width)).shape[1:]
        self.reader = Reader({"latents": tuple(shape)}, backbone.text_width, settings)
        self.width = self.reader.width

    def features(self, latents: Tensor, prediction: Prediction, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": latents}

    def forward(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = self.reader.inputs({"latents": self.stem(features["latents"])})
        summary: Tensor = self.reader(inputs, sigma, conditioning)
        return summary


def _stem(channels: int, width: int, reduction: int) -> nn.Sequential:
    """Convolutions down to about 8 cells per side, halving as often as `reduction` allows."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
    while reduction > 1:
        layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        reduction //= 2
    return nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU())


def _bounded(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    return shape[0], min(shape[1], _MOST_CELLS), min(shape[2], _MOST_CELLS)


def _averaged(tap: Tensor) -> Tensor:
    _, height, width = _bounded((tap.shape[1], tap.shape[2], tap.shape[3]))
    return tap if tap.shape[2:] == (height, width) else nn.functional.adaptive_avg_pool2d(tap, (height, width))

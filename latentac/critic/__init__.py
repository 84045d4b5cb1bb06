"""The critic V(z_t, t, y): a body that reads noisy latents, and a value head for each reward.

After "Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736): the state is the policy's own noisy
latent and the body is the diffusion backbone. One class a body, one row in BODIES.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentac.backbones import Denoiser
from latentac.backbones.weights import header
from latentac.config.extensions import Table
from latentac.config.learning import Critic as CriticSettings
from latentac.method.diffusion import Prediction
from latentac.method.records import Conditioning
from latentac.system.modelfiles import Damaged, check, read_json

BODIES = Table(
    "critic body",
    {
        "frozen_taps": "latentac.critic.bodies:FrozenTaps",
        "lora": "latentac.critic.bodies:LoraBackbone",
        "copy": "latentac.critic.bodies:BackboneCopy",
        "pixel": "latentac.critic.bodies:Pixel",
        "latent_cnn": "latentac.critic.bodies:LatentCnn",
    },
)

_BACKBONE = "body.backbone."


class ValueFunction(Protocol):
    """What a rollout asks of a critic: the values of states, and the scale that they are in."""

    def features(self, latents: Tensor, prediction: Prediction, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> [B, ...]: what of latents [B, *latent] and a denoiser's forward on them the values depend on."""
        ...

    def standardised(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, M] values in standard deviations of each reward. sigma: [B]."""
        ...

    def standardise(self, returns: Tensor) -> Tensor:
        """Returns [..., M] in the reward's own unit to that of `standardised`."""
        ...

    def unstandardise(self, values: Tensor) -> Tensor:
        """Undo `standardise`."""
        ...


class Critic(nn.Module):
    """V(z_t, t, y), one value a reward.

    A body is built as `Body(settings, backbone)`, has the `width` of its summary, and two methods: `features` says what
    of a denoiser's forward it reads, `forward` summarises that to [B, width]. Features are kept with a rollout's
    states, so whatever needs the denoiser is done once and learning from a state again costs `forward` alone. A body
    that trains a pretrained network of its own as `self.backbone` says at which rate in `backbone_learning_rate`.

    The heads learn standardised targets; `mean` and `std` are the running scale of each reward's targets. Calling the
    critic speaks the reward's own unit.
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(self, backbone: Denoiser, reward_names: tuple[str, ...], settings: CriticSettings) -> None:
        super().__init__()
        self.settings, self.reward_names = settings, reward_names
        self.body: Any = BODIES.make(settings.body, backbone, path="critic.body")
        self._frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        hidden = settings.hidden
        self.trunk = nn.Sequential(nn.LayerNorm(self.body.width), nn.Linear(self.body.width, hidden), nn.GELU())
        self.heads = nn.Linear(hidden, 1 if settings.shared_head else len(reward_names))
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        self.register_buffer("mean", torch.zeros(len(reward_names)))
        self.register_buffer("std", torch.ones(len(reward_names)))
        self.register_buffer("count", torch.zeros(()))

    def features(self, latents: Tensor, prediction: Prediction, taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> [B, ...]: what the body reads of latents [B, *latent] and a denoiser's forward on them."""
        return cast(dict[str, Tensor], self.body.features(latents, prediction, taps))

    def standardised(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, M] values in standard deviations of each reward. sigma: [B]."""
        values: Tensor = self.heads(self.trunk(self.body(features, sigma, conditioning)))
        return values.expand(-1, len(self.reward_names))

    def forward(self, features: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, M] values, each in its reward's own unit."""
        return self.unstandardise(self.standardised(features, sigma, conditioning))

    def standardise(self, returns: Tensor) -> Tensor:
        """Returns [..., M] in the reward's own unit to the heads' unit."""
        return (returns - self.mean) / self.std

    def unstandardise(self, values: Tensor) -> Tensor:
        """Undo `standardise`."""
        return self.mean + self.std * values

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What an optimizer learns: a pretrained backbone inside the critic at a rate of its own."""
        learns = {name: parameter for name, parameter in self.named_parameters() if name not in self._frozen}
        body = [parameter for name, parameter in learns.items() if name.startswith(_BACKBONE)]
        rest = [parameter for name, parameter in learns.items() if not name.startswith(_BACKBONE)]
        groups = [{"params": rest, "lr": self.settings.learning_rate}]
        return [*groups, {"params": body, "lr": self.body.backbone_learning_rate}] if body else groups

    def train_heads(self) -> None:
        """Let everything learn but what the body keeps frozen; the modules stay in eval mode."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self._frozen)
        self.eval()

    @torch.no_grad()
    def update_scale(self, rewards: Tensor) -> None:
        """Fold rewards [B, M] into the running scale, keeping every prediction as it was (PopArt, van Hasselt 2016).

        The first rewards only set the scale: before them no prediction meant anything. A shared head cannot keep the
        predictions of several rewards at once and relearns them.
        """
        count = self.count + len(rewards)
        delta = rewards.mean(0) - self.mean
        mean = self.mean + delta * len(rewards) / count
        spread = self.std**2 * self.count + rewards.var(0, correction=0) * len(rewards)
        variance = (spread + delta**2 * self.count * len(rewards) / count) / count
        std = variance.sqrt().clamp(min=1e-3)
        if self.count > 0 and not self.settings.shared_head:
            self.heads.weight.mul_((self.std / std)[:, None])
            self.heads.bias.copy_((self.std * self.heads.bias + self.mean - mean) / std)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.count.copy_(count)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """model.safetensors and config.json. weights: instead of `state_dict()`, where this worker has only a share of
        them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in (weights or self.state_dict()).items()},
            folder / "model.safetensors",
        )
        described = {"reward_names": list(self.reward_names), "settings": self.settings.model_dump()}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, backbone: Denoiser, *, own: bool = False) -> "Critic":
        """The critic that `save` wrote, for a denoiser of that architecture, on its device, frozen, in eval mode.

        own: the folder comes from this run, whose configuration may name a body outside the table. Otherwise the folder
        may name rows only, or what the operator allows. Raises ConfigError, and Damaged where the settings ask for
        more than the weights have, before it is allocated.
        """
        check(folder, "config.json", "model.safetensors")
        described = read_json(folder / "config.json")
        if not {"settings", "reward_names"} <= described.keys() or not isinstance(described["reward_names"], list):
            raise Damaged("critic/config.json has no settings, or no reward_names")
        settings = CriticSettings.model_validate(described["settings"])
        if not own:
            BODIES.check_row(settings.body.use, str(folder / "config.json"))
        names = tuple(described["reward_names"])
        _check_size(backbone, names, settings, header(folder / "model.safetensors"))
        critic = cls(backbone, names, settings)
        critic.load_state_dict(load_file(folder / "model.safetensors"))
        return critic.to(backbone.device).eval().requires_grad_(False)


class _Shapes:
    """A denoiser's shapes, and nothing of its network: enough to count what a body on top of it has."""

    def __init__(self, backbone: Denoiser) -> None:
        self.latent_shape, self.tap_shapes = backbone.latent_shape, backbone.tap_shapes
        self.text_width, self.device, self.images = backbone.text_width, backbone.device, backbone.images
        self.module = nn.Module()

    def clone(self) -> "_Shapes":
        return self

    def adapt(self, settings: object) -> None:
        """Adapters are of the network."""


def _check_size(
    backbone: Denoiser, names: tuple[str, ...], settings: CriticSettings, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises Damaged where the settings ask for more numbers than the weights, name -> shape, hold: before these are
    allocated. A body of somebody's own is not counted."""
    if settings.body.use not in BODIES:
        return
    with torch.device("meta"):  # shapes without memory
        empty = Critic(cast(Denoiser, _Shapes(backbone)), names, settings)
    asked = sum(tensor.numel() for tensor in empty.state_dict().values())
    held = sum(prod(shape) for name, shape in shapes.items() if not name.startswith(_BACKBONE))
    if asked > held:
        raise Damaged(f"critic/config.json asks for {asked:,} numbers, and model.safetensors has {held:,}")
    rank = getattr(BODIES.settings(settings.body), "rank", None)
    other = {shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape} - {rank}
    if rank is not None and other:
        raise Damaged(f"critic/config.json has rank {rank}, and model.safetensors {other.pop()}")

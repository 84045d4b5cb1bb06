"""The critic V(z_t, t, y): attention branches on the denoiser's own feature maps, one value head a reward.

After "Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736): the state is the policy's own noisy
latent, the body is the diffusion backbone, learned queries gather each tap, and the time modulates the head (AdaLN).
Ours where the paper is silent: the taps, several queries a tap, and reading the text tokens before the picture's.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentac.types import Conditioning


class _TimeModulation(nn.Module):
    """AdaLN (Peebles and Xie 2023): LayerNorm whose shift, scale and gate come from the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.modulation(time)[:, None].chunk(3, -1)
        return self.norm(x) * (1 + scale) + shift, 1 + gate


class _Attention(nn.Module):
    """Queries [B, Q, W] gather from tokens [B, N, W]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        query = self.query(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = self.key_value(tokens).unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2).chunk(2, 1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    """Queries read the text, then the tap, then think; each residual is modulated by the noise level."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.text, self.tap = _Attention(width, num_heads), _Attention(width, num_heads)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulations = nn.ModuleList(_TimeModulation(width) for _ in range(3))

    def forward(self, queries: Tensor, text: Tensor, tap: Tensor, time: Tensor) -> Tensor:
        to_text, to_tap, to_think = self.modulations
        modulated, gate = to_text(queries, time)
        queries = queries + gate * self.text(modulated, text)
        modulated, gate = to_tap(queries, time)
        queries = queries + gate * self.tap(modulated, tap)
        modulated, gate = to_think(queries, time)
        return queries + gate * self.think(modulated)


class _Branch(nn.Module):
    """One tap: patches of its feature map as tokens, learned queries that summarise them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        text_width: int,
        width: int,
        num_heads: int,
        num_queries: int,
        depth: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, spread = shape
        # A patch that leaves a 4 x 4 grid keeps the layout and bounds the number of tokens, whatever the resolution.
        self.patch = max(1, height // 4)
        tokens = (height // self.patch) * (spread // self.patch)
        self.embed = nn.Conv2d(channels, width, self.patch, self.patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.text = nn.Linear(text_width, width)
        self.queries = nn.Parameter(0.02 * torch.randn(1, num_queries, width))
        self.norm_tap, self.norm_text = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, num_heads) for _ in range(depth))
        # A few thousand scored images are soon learned by heart: without dropout the held-out explained variance falls.
        self.dropout = nn.Dropout(dropout)

    def forward(self, tap: Tensor, text: Tensor, time: Tensor) -> Tensor:
        patches = self.norm_tap(self.embed(self.dropout(tap)).flatten(2).transpose(1, 2) + self.position)
        words = self.norm_text(self.text(text))
        queries = self.queries.expand(len(tap), -1, -1)
        for layer in self.layers:
            queries = layer(queries, words, patches, time)
        summary: Tensor = self.dropout(queries.flatten(1))
        return summary


class Critic(nn.Module):
    """V(z_t, t, y) from the taps of the denoiser's forward, one head a reward.

    The heads learn standardised targets; `mean` and `std` are the running scale of each reward's targets. `forward`
    speaks the reward's own unit.
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(
        self,
        tap_shapes: Mapping[str, tuple[int, int, int]],
        text_width: int,
        reward_names: tuple[str, ...],
        width: int = 128,
        num_heads: int = 4,
        num_queries: int = 4,
        depth: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings = {
            "tap_shapes": {name: list(shape) for name, shape in tap_shapes.items()},
            "text_width": text_width,
            "reward_names": list(reward_names),
            "width": width,
            "num_heads": num_heads,
            "num_queries": num_queries,
            "depth": depth,
            "dropout": dropout,
        }
        self.reward_names = reward_names
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.branches = nn.ModuleDict(
            {
                name: _Branch(shape, text_width, width, num_heads, num_queries, depth, dropout)
                for name, shape in tap_shapes.items()
            }
        )
        gathered = len(tap_shapes) * num_queries * width
        self.trunk = nn.Sequential(nn.LayerNorm(gathered), nn.Linear(gathered, 2 * width), nn.GELU())
        self.heads = nn.Linear(2 * width, len(reward_names))
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        self.register_buffer("mean", torch.zeros(len(reward_names)))
        self.register_buffer("std", torch.ones(len(reward_names)))
        self.register_buffer("count", torch.zeros(()))

    def standardised(self, taps: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, M] values in standard deviations of each reward. taps: name -> [B, c, h, w]; sigma: [B]."""
        time = self.time(_fourier(sigma, self.width))
        gathered = [branch(taps[name], conditioning.tokens, time) for name, branch in self.branches.items()]
        values: Tensor = self.heads(self.trunk(torch.cat(gathered, -1)))
        return values

    def forward(self, taps: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, M] values, each in its reward's own unit."""
        return self.mean + self.std * self.standardised(taps, sigma, conditioning)

    def standardise(self, returns: Tensor) -> Tensor:
        """Returns [..., M] in the reward's own unit to the heads' unit."""
        return (returns - self.mean) / self.std

    @torch.no_grad()
    def update_scale(self, rewards: Tensor) -> None:
        """Fold rewards [B, M] into the running scale, keeping every prediction as it was (PopArt, van Hasselt 2016).

        The first rewards only set the scale: before them no prediction meant anything.
        """
        count = self.count + len(rewards)
        delta = rewards.mean(0) - self.mean
        mean = self.mean + delta * len(rewards) / count
        spread = self.std**2 * self.count + rewards.var(0, correction=0) * len(rewards)
        variance = (spread + delta**2 * self.count * len(rewards) / count) / count
        std = variance.sqrt().clamp(min=1e-3)
        if self.count > 0:
            self.heads.weight.mul_((self.std / std)[:, None])
            self.heads.bias.copy_((self.std * self.heads.bias + self.mean - mean) / std)
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.count.copy_(count)

    def save(self, folder: Path) -> None:
        """model.safetensors and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Critic":
        """The critic that `save` wrote, without gradients, in eval mode."""
        settings = json.loads((folder / "config.json").read_text())
        settings["reward_names"] = tuple(settings["reward_names"])
        settings["tap_shapes"] = {name: tuple(shape) for name, shape in settings["tap_shapes"].items()}
        critic = cls(**settings)
        critic.load_state_dict(load_file(folder / "model.safetensors"))
        return critic.to(device).eval().requires_grad_(False)


def _fourier(sigma: Tensor, width: int) -> Tensor:
    """[B] noise levels to [B, width] sines and cosines at frequencies 1 to 1000 (Vaswani et al. 2017, sec. 3.5)."""
    frequencies = torch.logspace(0, 3, width // 2, device=sigma.device)
    angles = sigma[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)

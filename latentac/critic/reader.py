"""How a critic summarises feature maps, text and noise level: channel statistics, and optional attention to places.

As in "Explicit Critic Guidance for Aligning Diffusion Models" (arXiv 2605.27736), learned queries summarise each tap,
and the noise level modulates the head (AdaLN). Where the paper is silent, we chose several queries per tap, and queries
that depend on the text. Keys and values come from a map's own channels: with thousands of states per iteration, the
critic must cost a fraction of the denoiser. The channel statistics (`pooling`) are ours. They serve a critic that
learns from only a few thousand images.
"""

from collections.abc import Mapping
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from latentac.config.extensions import Settings
from latentac.config.sections import Positive
from latentac.method.records import Conditioning


class ReaderSettings(Settings):
    """How a critic reads feature maps, text and noise level."""

    width: Annotated[int, Field(gt=0, le=4096)] = 64
    """Width of a branch."""
    num_heads: Positive = 4
    """Attention heads of a branch; must divide `width`."""
    num_queries: Annotated[int, Field(ge=0, le=256)] = 4
    """Learned queries per feature map. With 0 the critic does not attend to places in a map. It reads only the mean and
    spread of each channel. That is cheaper, and better from a few thousand images on."""
    grid: Annotated[int, Field(gt=0, le=64)] = 4
    """Size of the grid, in cells per side, to which an attention branch reduces a map."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Dropout of feature maps and of branch outputs in training."""
    text_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.6
    """Dropout of the text's features in training."""
    time_conditioning: bool = True
    """Whether the critic reads the noise level."""
    text_conditioning: bool = True
    """Whether the critic reads the prompt."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width = {self.width} is not a multiple of num_heads = {self.num_heads}")
        return self


class _TimeModulation(nn.Module):
    """AdaLN-Zero (Peebles and Xie 2023): LayerNorm whose shift, scale and gate come from the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.modulation(time)[:, None].chunk(3, -1)
        return self.norm(x) * (1 + scale) + shift, 1 + gate


class _Gather(nn.Module):
    """Queries [B, Q, W] attend to tokens [B, N, C], each of which has a learned position."""

    def __init__(self, channels: int, num_tokens: int, settings: ReaderSettings) -> None:
        super().__init__()
        width = settings.width
        self.num_heads = settings.num_heads
        self.norm = nn.LayerNorm(channels)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(channels, 2 * width)
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, 2 * width))
        self.output = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        query = self.query(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        both = self.key_value(self.norm(tokens)) + self.position[: tokens.shape[1]]
        key, value = both.unflatten(-1, (2 * self.num_heads, -1)).transpose(1, 2).chunk(2, 1)
        # Written out: for a handful of queries the fused kernel takes twice as long, backward included.
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        return self.output((weights @ value).transpose(1, 2).flatten(2))


class _Branch(nn.Module):
    """The attention branch of one feature map: its patches are tokens, learned queries attend to them, and an MLP
    follows."""

    def __init__(self, shape: tuple[int, int, int], settings: ReaderSettings) -> None:
        super().__init__()
        channels, height, spread = shape
        width = settings.width
        # A patch that leaves a grid of this side keeps the layout and bounds the number of tokens at any resolution.
        self.patch = max(1, height // settings.grid)
        num_tokens = (height // self.patch) * (spread // self.patch)
        self.queries = nn.Parameter(0.02 * torch.randn(1, settings.num_queries, width))
        self.gather = _Gather(channels * self.patch**2, num_tokens, settings)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.modulations = nn.ModuleList(_TimeModulation(width) for _ in range(2))
        # A few thousand scored images are soon learned by heart: without dropout the held-out explained variance falls.
        self.drop_channels = nn.Dropout2d(settings.dropout)  # whole ones: neighbours show a cell
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, feature_map: Tensor, context: Tensor, time: Tensor) -> Tensor:
        """[B, Q, W]; feature_map: [B, c, h, w]; context: [B, Q, W], added to the queries; time: [B, W]."""
        tokens = F.unfold(self.drop_channels(feature_map), self.patch, stride=self.patch).transpose(1, 2)
        to_gather, to_mlp = self.modulations
        queries = self.queries + context
        modulated, gate = to_gather(queries, time)
        queries = queries + gate * self.gather(modulated, tokens)
        modulated, gate = to_mlp(queries, time)
        summary: Tensor = self.dropout(queries + gate * self.mlp(modulated))
        return summary


class _Pooling(nn.Module):
    """The summary without attention: mean and spread over the image of each channel, and the words in their order.

    It has few parameters, and none for a position in the image. From a few thousand scored images it learns more than
    the attention branches do.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], text_width: int, settings: ReaderSettings) -> None:
        super().__init__()
        width = settings.width
        channels = 2 * sum(shape[0] for shape in shapes.values())
        self.channels = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.word = nn.Linear(text_width, _WORD_WIDTH) if settings.text_conditioning else None
        # A prompt is met a few times and its rewards are soon learned by heart. With part of what is read of each word
        # left out, what remains is what many prompts share, and whether the image fits.
        self.drop_words = nn.Dropout(settings.text_dropout)
        self.places = nn.Parameter(torch.randn(_MOST_WORDS, _WORD_WIDTH, width) / (4 * _WORD_WIDTH**0.5))
        self.modulation = _TimeModulation(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, channels: Tensor, tokens: Tensor, time: Tensor) -> Tensor:
        """[B, 1, W]; channels: [B, C], mean and spread of each; tokens: [B, L, C'], those of the text; time: [B, W]."""
        hidden = self.channels(channels)
        if self.word is not None:
            words = self.drop_words(self.word(tokens))
            hidden = hidden + words.flatten(1) @ self.places[: words.shape[1]].flatten(0, 1)
        modulated, gate = self.modulation(hidden[:, None], time)
        first = F.gelu(modulated)
        summary: Tensor = first + gate * self.mlp(first)
        return summary


class Reader(nn.Module):
    """Channel statistics, the summary of the text, and one branch per feature map, concatenated.

    shapes: name -> (channels, height, width) of each map. `width` is that of the whole summary.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], text_width: int, settings: ReaderSettings) -> None:
        super().__init__()
        self.settings, self.names = settings, tuple(shapes)
        inner = settings.width
        attends = settings.num_queries > 0
        parts = len(shapes) + settings.text_conditioning
        self.width = (1 + parts * settings.num_queries) * inner
        self.time = nn.Sequential(nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU())
        self.pooling = _Pooling(shapes, text_width, settings)
        branches = {name: _Branch(shape, settings) for name, shape in shapes.items()} if attends else {}
        self.branches = nn.ModuleDict(branches)
        self.text = _Gather(text_width, _MOST_WORDS, settings) if attends and settings.text_conditioning else None
        self.queries = nn.Parameter(0.02 * torch.randn(1, settings.num_queries, inner))
        self.dropout = nn.Dropout(settings.dropout)

    def inputs(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `forward` needs of maps, name -> [B, c, h, w]. Without attention, this is a few numbers per state."""
        channels = torch.cat([_mean_and_spread(maps[name]) for name in self.names], 1)
        return {_CHANNELS: channels, **{name: maps[name] for name in self.branches}}

    def forward(self, inputs: Mapping[str, Tensor], sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, width]. inputs: of `inputs`; sigma: [B]."""
        known = sigma if self.settings.time_conditioning else torch.zeros_like(sigma)
        time = self.time(_fourier(known, self.settings.width))
        context = self.queries.repeat(len(sigma), 1, 1)  # a view would be multiplied in another order once it is frozen
        tokens = conditioning.tokens[:, :_MOST_WORDS].float()
        summaries = [self.pooling(inputs[_CHANNELS], tokens, time)]
        if self.text is not None:
            context = self.dropout(self.text(context, tokens))
            summaries.append(context)
        summaries += [branch(inputs[name], context, time) for name, branch in self.branches.items()]
        return torch.cat(summaries, 1).flatten(1)


_MOST_WORDS = 77  # text tokens that the head reads: those of CLIP; what a backbone appends to them says no more
_CHANNELS = "channels"  # among the names of maps
_WORD_WIDTH = 16  # numbers that the pooling takes of each of them


def _mean_and_spread(feature_map: Tensor) -> Tensor:
    """[B, 2 c]: mean and standard deviation of each channel over the image."""
    cells = feature_map.flatten(2)
    mean = cells.mean(2)
    spread = ((cells - mean[..., None]).square().mean(2) + 1e-6).sqrt()
    return torch.cat([mean, spread], 1)


def _fourier(sigma: Tensor, width: int) -> Tensor:
    """[B] noise levels to [B, width] sines and cosines at frequencies 1 to 1000 (Vaswani et al. 2017, sec. 3.5)."""
    frequencies = torch.logspace(0, 3, width // 2, device=sigma.device)
    angles = sigma[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)

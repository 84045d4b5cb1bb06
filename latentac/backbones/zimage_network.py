"""A forward pass of Z-Image's transformer whose shapes do not depend on the prompts.

That of diffusers takes a list of prompts, each padded to its own multiple of 32 tokens, and all of them to the longest
of the batch. There, a row's rounding depends on the other rows, so that in half precision the ratio of a row in another
batch is not 1. Here, all prompts have the same number of tokens, and those that diffusers would not have are masked.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from latentac.backbones.zimage_layout import PATCH

MULTIPLE = 32
"""Image and text each have a multiple of so many tokens; learned ones are put at the end."""
_KEY = f"{PATCH}-1"  # of the layers for patches of one frame


@dataclass(frozen=True)
class Places:
    """The rotations by the tokens' places, complex64. A place has three coordinates, with d, e, and e numbers.

    text: [L, d + 2 e], of a prompt's tokens, whose first coordinates are 1 to L
    first: [L + 2, d], of the first coordinate: that of the image tokens is one more than the number of text tokens
    image: [N, 2 e], of the image tokens' row and column     missing: tokens that make N a multiple; they are at 0, 0, 0
    """

    text: Tensor
    first: Tensor
    image: Tensor
    missing: int

    @classmethod
    def of(cls, embedder: Any, length: int, grid: tuple[int, int], device: torch.device) -> Self:
        """embedder: of the transformer; length: of the text; grid: rows and columns of image tokens."""
        tables = embedder.precompute_freqs_cis(embedder.axes_dims, embedder.axes_lens, theta=embedder.theta)
        first, rows, columns = (table.to(device) for table in tables)
        height, width = grid
        row, column = rows[:height, None].expand(-1, width, -1), columns[None, :width].expand(height, -1, -1)
        image = torch.cat([row, column], -1).flatten(0, 1)
        text = torch.cat([first[1 : length + 1], torch.ones_like(image[:1]).expand(length, -1)], -1)
        return cls(text, first[: length + 2], image, -len(image) % MULTIPLE)

    def of_image(self, counts: Tensor) -> Tensor:
        """[B, N + missing, d + 2 e]. counts: int64 [B], text tokens of each row."""
        size = len(counts)
        first = self.first[counts + 1][:, None].expand(-1, len(self.image), -1)
        given = torch.cat([first, self.image.expand(size, -1, -1)], -1)
        return torch.cat([given, torch.ones_like(given[:, :1]).expand(-1, self.missing, -1)], 1)


def velocity(network: Any, latents: Tensor, time: Tensor, tokens: Tensor, places: Places) -> Tensor:
    """x0 - n, [B, C, H, W]. network: a ZImageTransformer2DModel; latents: [B, C, H, W]; time: [B], 1 - sigma;
    tokens: [B, L, width], where zeros follow a prompt's tokens and L is a multiple of 32."""

    def through(layers: Any, states: Tensor, *given: Any) -> Tensor:
        for layer in layers:
            if torch.is_grad_enabled() and network.gradient_checkpointing:
                states = network._gradient_checkpointing_func(layer, states, *given)
            else:
                states = layer(states, *given)
        return states

    size, cells = len(latents), len(places.image)
    given = tokens.any(-1)
    counts = (given.sum(1) + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    read = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
    embedded_time = network.t_embedder(time * network.t_scale).type_as(latents)

    # Numbers of a token: row, column, channel.
    patches = F.pixel_unshuffle(latents, PATCH).unflatten(1, (-1, PATCH**2)).permute(0, 3, 4, 2, 1).flatten(3)
    image = network.all_x_embedder[_KEY](patches.flatten(1, 2))
    image = torch.cat([image, network.x_pad_token.expand(size, places.missing, -1)], 1)
    of_image, of_text = places.of_image(counts), places.text.expand(size, -1, -1)
    image = through(network.noise_refiner, image, None, of_image, embedded_time)
    text = torch.where(given[..., None], network.cap_embedder(tokens), network.cap_pad_token)
    text = through(network.context_refiner, text, read, of_text)

    joined, rotations = torch.cat([image, text], 1), torch.cat([of_image, of_text], 1)
    mask = F.pad(read, (image.shape[1], 0), value=True)
    joined = through(network.layers, joined, mask, rotations, embedded_time)
    output = network.all_final_layer[_KEY](joined[:, :cells], c=embedded_time)
    height, width = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
    output = output.unflatten(1, (height, width)).unflatten(3, (PATCH**2, -1))
    return F.pixel_shuffle(output.permute(0, 4, 3, 1, 2).flatten(1, 2), PATCH)

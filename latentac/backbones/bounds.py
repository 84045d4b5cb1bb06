"""What numbers a part's configuration may have, by field: checked before anything is built by it.

The bounds are several times those of the models that are supported. They bound time and memory; whether a configuration
belongs to its weights is checked where these are loaded.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from latentac.system.modelfiles import walk

_LAYERS = (1, 128)
_BLOCKS = (1, 16)
_WIDTH = (1, 2**16)
_MOST_ENTRIES = 128  # of a list of settings, such as one per block or per layer
_MOST_TEXT = 4096
_LARGEST = 2**20  # of a number that is not below
_MOST_TIMESTEPS = 10_000  # and betas

WHOLE: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("num_layers", "num_hidden_layers", "num_single_layers", "n_layers"), _LAYERS),
    **dict.fromkeys(("layers_per_block", "mid_block_layers", "n_refiner_layers"), _BLOCKS),
    **dict.fromkeys(("transformer_layers_per_block", "reverse_transformer_layers_per_block"), _BLOCKS),
    **dict.fromkeys(("block_out_channels", "in_channels", "out_channels", "latent_channels"), _WIDTH),
    **dict.fromkeys(("attention_head_dim", "num_attention_heads", "norm_num_groups", "num_key_value_heads"), _WIDTH),
    **dict.fromkeys(("cross_attention_dim", "joint_attention_dim", "caption_projection_dim"), _WIDTH),
    **dict.fromkeys(("pooled_projection_dim", "hidden_size", "intermediate_size", "projection_dim"), _WIDTH),
    **dict.fromkeys(("d_model", "d_ff", "d_kv", "num_heads", "axes_dims_rope"), _WIDTH),
    **dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), _WIDTH),
    **dict.fromkeys(("addition_time_embed_dim", "projection_class_embeddings_input_dim"), _WIDTH),
    "vocab_size": (1, 2**20),
    "num_labels": (0, 4096),
    **dict.fromkeys(("dim", "n_heads", "n_kv_heads", "cap_feat_dim", "head_dim", "axes_dims", "axes_lens"), _WIDTH),
    "max_position_embeddings": (3, 2**18),  # those of CLIP are held by a tensor
    "sample_size": (1, 4096),
    "pos_embed_max_size": (1, 1024),
    **dict.fromkeys(("patch_size", "all_patch_size", "all_f_patch_size"), (1, 64)),
    "num_train_timesteps": (1, _MOST_TIMESTEPS),
}
"""Field -> the least and the largest whole number that it may have, alone or in a list."""

_HELD = frozenset(
    {
        *("block_out_channels", "in_channels", "out_channels", "latent_channels", "cross_attention_dim"),
        *("joint_attention_dim", "caption_projection_dim", "hidden_size", "intermediate_size", "vocab_size"),
        *("max_position_embeddings", "pos_embed_max_size", "d_model", "d_ff", "dim", "cap_feat_dim"),
        "projection_class_embeddings_input_dim",
    }
)
_LARGEST_LATENT = 256
"""Cells a side of the network's own `sample_size`: 2,048 pixels. The autoencoder's is in pixels."""


def beyond(configuration: Mapping[str, Any], *, network: bool = False) -> Iterator[str]:
    """Each number, list or text of a configuration that is out of bounds, with the bound. network: whether it is the
    denoiser's."""
    for field, _, value in walk(configuration):
        if isinstance(value, list):
            most = _MOST_TIMESTEPS if field == "trained_betas" else _MOST_ENTRIES
            if len(value) > most:
                yield f"{field} has {len(value):,} entries, and may have at most {most:,}"
        elif isinstance(value, str) and len(value) > _MOST_TEXT:
            yield f"{field} is a text of {len(value):,} characters, and may have at most {_MOST_TEXT:,}"
        elif field in WHOLE:
            low, high = WHOLE[field]
            high = _LARGEST_LATENT if network and field == "sample_size" else high
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not isinstance(value, dict) and not (whole and low <= value <= high):
                yield f"{field} is {_short(value)}, and must be a whole number from {low:,} to {high:,}"
        elif isinstance(value, int | float) and _LARGEST < abs(value) < math.inf:  # the one that may be infinite is
            yield f"{field} is {_short(value)}, and may be at most {_LARGEST:,}"


def unheld(configuration: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Each width of a configuration that no tensor of its weights has, name -> shape. What is missed here is counted
    before the weights are loaded."""
    longest = max((size for shape in shapes.values() for size in shape), default=0)
    for field, _, value in walk(configuration):
        if field in _HELD and isinstance(value, int) and value > longest:
            yield f"{field} is {value:,}, and no tensor of its weights is longer than {longest:,}"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}..."

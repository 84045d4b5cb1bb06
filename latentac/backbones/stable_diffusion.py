"""What a folder must be for the UNet of Stable Diffusion 1 and 2, and for the transformer of Stable Diffusion 3.

Tables of what the parts' configurations may say. What is refused here would else fail much later, or would be drawn
from in another way than it was trained, without a word.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from latentac.backbones.layout import Layout, Part, Sizes, decoded

Configurations = Mapping[str, Mapping[str, Any]]
Finding = tuple[str, str, str]
"""Where (a part's name), what is wrong, the remedy."""

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

_BLOCK_SHARE = 20 / 28
"""Tensors that a transformer block keeps for the gradient, as a share of those of a UNet's layer with its block."""
_UNUSED_INPUTS = {
    "class_embed_type": "classes or a noise level beside the text, as upscalers and unCLIP do",
    "num_class_embeds": "classes beside the text",
    "projection_class_embeddings_input_dim": "an embedding beside the text",
    "addition_embed_type": "sizes or pooled text beside the text, as Stable Diffusion XL does",
    "addition_time_embed_dim": "sizes beside the text, as Stable Diffusion XL does",
    "encoder_hid_dim": "the states of another encoder, projected",
    "encoder_hid_dim_type": "the states of another encoder, projected, as IP-Adapter and Kandinsky do",
    "time_cond_proj_dim": "the guidance scale as an input: it is guidance-distilled, as latent consistency models are",
}
_CHANNELS = {
    5: "depth-to-image models have 5",
    7: "upscalers have 7",
    8: "instruct-pix2pix has 8",
    9: "inpainting models have 9",
}
TEXT_TO_IMAGE = "Use a text-to-image model of this architecture"
_OTHER_LATENTS = "Use an AutoencoderKL with scaling_factor alone, as Stable Diffusion has it"


def _unet(found: Configurations) -> Iterator[Finding]:
    return unet_inputs(found["unet"])


def unet_inputs(unet: Mapping[str, Any], used: Collection[str] = ()) -> Iterator[Finding]:
    """A UNet must take latents, a timestep and text, and of `_UNUSED_INPUTS` only what is `used`."""
    for name, what in _UNUSED_INPUTS.items():
        if name not in used and unet.get(name) is not None:
            yield "unet", f"{name} is {unet[name]!r}: it takes {what}", TEXT_TO_IMAGE
    if unet.get("attention_type", "default") != "default":
        yield "unet", f"attention_type is {unet['attention_type']!r}: it takes boxes, as GLIGEN does", TEXT_TO_IMAGE
    if unet.get("dual_cross_attention"):
        yield "unet", "dual_cross_attention is true: it takes text and an image", TEXT_TO_IMAGE
    if unet.get("time_embedding_type", "positional") != "positional":
        yield "unet", f"time_embedding_type is {unet['time_embedding_type']!r}, and must be positional", TEXT_TO_IMAGE
    if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") is None:
        yield "unet", "mid_block_type is null, and the critic reads the middle block", TEXT_TO_IMAGE
    sizes = unet.get("sample_size")
    for size in sizes if isinstance(sizes, list) and len(sizes) == 2 else [sizes]:
        if not _is_count(size):
            problem = f"sample_size is {sizes!r}, so the images' size is not known"
            yield "unet", problem, "Set it to the images' side divided by 8 (64 for 512 pixels)"


def unet_latents(found: Configurations) -> Iterator[Finding]:
    unet = found["unet"]
    return _channels("unet", unet.get("in_channels", 4), unet.get("out_channels", 4), found["vae"])


def _unet_text(found: Configurations) -> Iterator[Finding]:
    text = text_settings(found["text_encoder"])
    if text.get("use_attention_mask"):
        yield "text_encoder", "use_attention_mask is true, and latentac reads all tokens alike", TEXT_TO_IMAGE
    width = text.get("hidden_size", 512)
    reads = found["unet"].get("cross_attention_dim", 1280)
    if reads != width:
        problem = f"cross_attention_dim is {reads!r}, and text_encoder has a hidden_size of {width}"
        yield "unet", problem, "Use the text encoder that the UNet was trained with"


def unet_autoencoder(found: Configurations) -> Iterator[Finding]:
    yield from _autoencoder(found["vae"])
    if found["vae"].get("shift_factor"):
        problem = f"shift_factor is {found['vae']['shift_factor']}, which the pipelines of UNets do not apply"
        yield "vae", problem, _OTHER_LATENTS


def _transformer(found: Configurations) -> Iterator[Finding]:
    own = found["transformer"]
    size, patch = own.get("sample_size", 128), own.get("patch_size", 2)
    if not _is_count(size) or size % patch:
        problem = f"sample_size is {size!r}, and must be a multiple of patch_size = {patch}"
        yield "transformer", problem, "Set it to the images' side divided by 8 (128 for 1024 pixels)"
    elif size // patch > own.get("pos_embed_max_size", 96):
        problem = f"sample_size {size} has more patches a side than pos_embed_max_size = {own['pos_embed_max_size']}"
        yield "transformer", problem, "Use a smaller sample_size"


def _transformer_latents(found: Configurations) -> Iterator[Finding]:
    own = found["transformer"]
    return _channels("transformer", own.get("in_channels", 16), own.get("out_channels", 16), found["vae"])


def _transformer_text(found: Configurations) -> Iterator[Finding]:
    own, texts = found["transformer"], [text_settings(found["text_encoder"]), text_settings(found["text_encoder_2"])]
    width, reads = sum(text.get("hidden_size", 512) for text in texts), own.get("joint_attention_dim", 4096)
    if width > reads:
        problem = f"joint_attention_dim is {reads}, and the two text encoders together have {width}"
        yield "transformer", problem, "Use the text encoders that it was trained with"
    width, reads = sum(text.get("projection_dim", 512) for text in texts), own.get("pooled_projection_dim", 2048)
    if width != reads:
        problem = f"pooled_projection_dim is {reads}, and the two text encoders project to {width}"
        yield "transformer", problem, "Use the text encoders that it was trained with"


def flow_autoencoder(pipeline: str) -> Callable[[Configurations], Iterator[Finding]]:
    """An autoencoder with a shift, which the pipeline of a flow model applies."""

    def rule(found: Configurations) -> Iterator[Finding]:
        yield from _autoencoder(found["vae"])
        shift = found["vae"].get("shift_factor")
        if shift is None:
            problem = f"shift_factor is null, and {pipeline} adds it"
            yield "vae", problem, "Write the number that the model was trained with, 0.0 for none"
        elif not _is_number(shift):
            yield "vae", f"shift_factor is {shift!r}", "Write the number that it was trained with"

    return rule


def two_tokenizers(found: Configurations) -> Iterator[Finding]:
    lengths = {str(found[name].get("model_max_length")) for name in ("tokenizer", "tokenizer_2")}
    if len(lengths) > 1:
        problem = f"model_max_length differs from that of tokenizer ({', '.join(sorted(lengths))})"
        yield "tokenizer_2", problem, "Use the tokenizers that the model was trained with"


def _channels(part: str, inputs: object, outputs: object, vae: Mapping[str, Any]) -> Iterator[Finding]:
    latent = vae.get("latent_channels", 4)
    if inputs != latent:
        hint = f" ({_CHANNELS[inputs]})" if isinstance(inputs, int) and inputs in _CHANNELS and part == "unet" else ""
        yield part, f"in_channels is {inputs!r}{hint}, and vae has latent_channels {latent}", TEXT_TO_IMAGE
    if outputs is not None and outputs != inputs:
        hint = ": it predicts a variance too" if outputs == 2 * latent else ""
        yield part, f"out_channels is {outputs!r} and in_channels {inputs!r}{hint}", TEXT_TO_IMAGE


def _autoencoder(vae: Mapping[str, Any]) -> Iterator[Finding]:
    for name in ("latents_mean", "latents_std"):
        if vae.get(name) is not None:
            yield "vae", f"{name} is set, and latentac does not apply it", _OTHER_LATENTS
    scale = vae.get("scaling_factor", 0.18215)
    if not _is_number(scale) or not 1e-3 < scale < 1e3:
        yield "vae", f"scaling_factor is {scale!r}", "Write the number that the model was trained with"
    if vae.get("out_channels", 3) != 3:
        yield (
            "vae",
            f"out_channels is {vae['out_channels']!r}, and images have 3",
            "Use an autoencoder of RGB images",
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def tokens(encoder: str, name: str) -> Callable[[Configurations], Iterator[Finding]]:
    """A tokenizer's ids and lengths must be such that its text encoder knows them."""

    def rule(found: Configurations) -> Iterator[Finding]:
        text, tokenizer = text_settings(found[encoder]), found[name]
        longest, known = text.get("max_position_embeddings", 77), text.get("vocab_size", 49408)
        length = tokenizer.get("model_max_length")
        if not isinstance(length, int) or not 2 < length <= longest:
            problem = f"model_max_length is {length!r}, and {encoder} reads at most {longest} tokens"
            yield name, problem, f"Set it to {longest} in {name}/tokenizer_config.json"
        highest = tokenizer.get("highest_id", 0)
        if highest >= known:
            problem = f"has the token {highest}, and {encoder} knows {known} tokens"
            yield name, problem, "Use the tokenizer that the text encoder was trained with"

    return rule


def text_settings(configuration: Mapping[str, Any]) -> Mapping[str, Any]:
    """A text encoder's own part of a CLIP configuration."""
    nested = configuration.get("text_config")
    return nested if isinstance(nested, dict) else configuration


def unet_sizes(found: Configurations, size: tuple[int, int] | None) -> Sizes:
    own = found["unet"]
    cells = _cells(own, size)
    channels, layers = own.get("block_out_channels", [320, 640, 1280, 1280]), own.get("layers_per_block", 2)
    depth = layers if isinstance(layers, int) else max(layers)
    length = text_settings(found["text_encoder"]).get("max_position_embeddings", 77)
    levels = enumerate(zip(channels, _blocks(own, len(channels)), strict=True))
    kept = [(cells >> (2 * level)) * round(width * blocks) for level, (width, blocks) in levels]
    return Sizes(
        latent=own.get("in_channels", 4) * cells,
        text=length * own.get("cross_attention_dim", 1280),
        units=(2 * depth + 1) * sum(kept),
        taps=min(cells >> (2 * (len(channels) - 1)), 256) * channels[-1] + min(cells, 256) * channels[0],
        channels=channels[-1] + channels[0],
        **decoded(found["vae"], cells),
    )


def _blocks(unet: Mapping[str, Any], num_levels: int) -> list[float]:
    """Of each level of a UNet: what a layer keeps for the gradient, in units of a layer with one transformer block."""
    found = unet.get("transformer_layers_per_block", 1)  # or one per level, or per layer of each level
    levels = found if isinstance(found, list) else [found] * num_levels
    return [1 + (max(each if isinstance(each, list) else [each]) - 1) * _BLOCK_SHARE for each in levels]


def _transformer_sizes(found: Configurations, size: tuple[int, int] | None) -> Sizes:
    own = found["transformer"]
    cells = _cells(own, size)
    inner = own.get("num_attention_heads", 18) * own.get("attention_head_dim", 64)
    tokens = cells // own.get("patch_size", 2) ** 2
    length = text_settings(found["text_encoder"]).get("max_position_embeddings", 77)
    length += 256 if length >= 77 else 0  # the zero tokens in place of T5's
    return Sizes(
        latent=own.get("in_channels", 16) * cells,
        text=length * own.get("joint_attention_dim", 4096),
        units=(tokens + length) * inner * own.get("num_layers", 18),
        saved=20,
        taps=3 * min(tokens, 256) * inner,
        channels=3 * inner,
        **decoded(found["vae"], cells),
    )


def _cells(own: Mapping[str, Any], size: tuple[int, int] | None) -> int:
    """Cells of the latents: of `size`, or of the network's own configuration."""
    sample = own.get("sample_size", 64)
    height, width = size or (sample if isinstance(sample, list) else (sample, sample))
    return int(height * width)


UNET = Layout(
    pipeline="StableDiffusionPipeline",
    network="unet",
    adapted=("to_q", "to_k", "to_v", "to_out.0"),
    parts=(
        Part("unet", "network", ("UNet2DConditionModel",)),
        Part("vae", "autoencoder", ("AutoencoderKL",)),
        Part("text_encoder", "text_encoder", ("CLIPTextModel",)),
        Part("tokenizer", "tokenizer", CLIP_TOKENIZERS),
        Part("scheduler", "scheduler", ()),
    ),
    rules=(
        (("unet",), _unet),
        (("unet", "vae"), unet_latents),
        (("unet", "text_encoder"), _unet_text),
        (("vae",), unet_autoencoder),
        (("text_encoder", "tokenizer"), tokens("text_encoder", "tokenizer")),
    ),
    absent=("feature_extractor", "image_encoder", "safety_checker"),
    flags={"requires_safety_checker": False},
    sizes=unet_sizes,
)

DIT = Layout(
    pipeline="StableDiffusion3Pipeline",
    network="transformer",
    adapted=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    parts=(
        Part("transformer", "network", ("SD3Transformer2DModel",)),
        Part("vae", "autoencoder", ("AutoencoderKL",)),
        Part("text_encoder", "text_encoder", ("CLIPTextModelWithProjection",)),
        Part("text_encoder_2", "text_encoder", ("CLIPTextModelWithProjection",)),
        Part("tokenizer", "tokenizer", CLIP_TOKENIZERS),
        Part("tokenizer_2", "tokenizer", CLIP_TOKENIZERS),
        Part("scheduler", "scheduler", ()),
    ),
    rules=(
        (("transformer",), _transformer),
        (("transformer", "vae"), _transformer_latents),
        (("transformer", "text_encoder", "text_encoder_2"), _transformer_text),
        (("vae",), flow_autoencoder("StableDiffusion3Pipeline")),
        (("text_encoder", "tokenizer"), tokens("text_encoder", "tokenizer")),
        (("text_encoder_2", "tokenizer_2"), tokens("text_encoder_2", "tokenizer_2")),
        (("tokenizer", "tokenizer_2"), two_tokenizers),
    ),
    absent=("feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3"),
    sizes=_transformer_sizes,
)

"""What a folder must be for FLUX.1: the layout of diffusers' FluxPipeline."""

from collections.abc import Iterator

from latentac.backbones.layout import Layout, Part, Sizes, decoded
from latentac.backbones.stable_diffusion import (
    CLIP_TOKENIZERS,
    Configurations,
    Finding,
    flow_autoencoder,
    text_settings,
    tokens,
)
from latentac.backbones.t5_layout import LONGEST, t5_parts, t5_rules

PATCH = 2
"""Cells of the latents per token and side: the pipeline packs them, and the transformer does not know of it."""
CELLS = 128
"""Cells of the latents per side where no image size is given: the pipeline's own default, 1,024 pixels."""
_OTHER_TASKS = {
    96: "FLUX.1 Redux and others that add an image have more",
    128: "FLUX.1 Canny and Depth have 128",
    384: "FLUX.1 Fill has 384",
}
_TEXT_TO_IMAGE = "Use FLUX.1 dev, schnell, or a model that was trained from them for text to image"


def _transformer(found: Configurations) -> Iterator[Finding]:
    own = found["transformer"]
    if own.get("patch_size", 1) != 1:
        yield "transformer", f"patch_size is {own['patch_size']!r}, and FLUX.1 has 1", _TEXT_TO_IMAGE
    axes, width = own.get("axes_dims_rope", [16, 56, 56]), own.get("attention_head_dim", 128)
    if len(axes) != 3 or sum(axes) != width or any(axis % 2 for axis in axes):
        problem = (
            f"axes_dims_rope is {axes!r}, and must be three even numbers whose sum is attention_head_dim = {width}"
        )
        yield "transformer", problem, "Write the numbers that the model was trained with"


def _latents(found: Configurations) -> Iterator[Finding]:
    own, latent = found["transformer"], found["vae"].get("latent_channels", 4)
    inputs, outputs, expected = own.get("in_channels", 64), own.get("out_channels"), PATCH**2 * latent
    if inputs != expected:
        hint = f" ({_OTHER_TASKS[inputs]})" if inputs in _OTHER_TASKS else ""
        problem = f"in_channels is {inputs!r}{hint}, and {PATCH} x {PATCH} cells of vae have {expected}"
        yield "transformer", problem, _TEXT_TO_IMAGE
    elif outputs not in (None, inputs):
        yield "transformer", f"out_channels is {outputs!r} and in_channels {inputs!r}", _TEXT_TO_IMAGE


def _clip(found: Configurations) -> Iterator[Finding]:
    width = text_settings(found["text_encoder"]).get("hidden_size", 512)
    reads = found["transformer"].get("pooled_projection_dim", 768)
    if width != reads:
        problem = f"pooled_projection_dim is {reads!r}, and text_encoder has a hidden_size of {width!r}"
        yield "transformer", problem, "Use the text encoders that it was trained with"


def _sizes(found: Configurations, size: tuple[int, int] | None) -> Sizes:
    own = found["transformer"]
    height, width = size or (CELLS, CELLS)
    cells, inner = height * width, own.get("num_attention_heads", 24) * own.get("attention_head_dim", 128)
    patches = cells // PATCH**2
    return Sizes(
        latent=own.get("in_channels", 64) // PATCH**2 * cells,
        text=LONGEST * own.get("joint_attention_dim", 4096),
        units=(patches + LONGEST) * inner * (own.get("num_layers", 19) + own.get("num_single_layers", 38)),
        saved=20,
        taps=3 * min(patches, 256) * inner,
        channels=3 * inner,
        **decoded(found["vae"], cells),
    )


FLUX = Layout(
    pipeline="FluxPipeline",
    network="transformer",
    adapted=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    parts=(
        Part("transformer", "network", ("FluxTransformer2DModel",)),
        Part("vae", "autoencoder", ("AutoencoderKL",)),
        Part("text_encoder", "text_encoder", ("CLIPTextModel",)),
        Part("tokenizer", "tokenizer", CLIP_TOKENIZERS),
        *t5_parts("text_encoder_2", "tokenizer_2"),
        Part("scheduler", "scheduler", ()),
    ),
    rules=(
        (("transformer",), _transformer),
        (("transformer", "vae"), _latents),
        (("transformer", "text_encoder"), _clip),
        (("vae",), flow_autoencoder("FluxPipeline")),
        (("text_encoder", "tokenizer"), tokens("text_encoder", "tokenizer")),
        *t5_rules("text_encoder_2", "tokenizer_2"),
    ),
    absent=("feature_extractor", "image_encoder"),
    sizes=_sizes,
)

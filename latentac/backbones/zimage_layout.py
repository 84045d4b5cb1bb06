"""What a folder must be for Z-Image: the layout of diffusers' ZImagePipeline."""

from collections.abc import Iterator

from latentac.backbones.layout import Layout, Part, Sizes, decoded
from latentac.backbones.stable_diffusion import Configurations, Finding, flow_autoencoder

PATCH = 2
"""Cells of the latents per token and side."""
CELLS = 128
"""Cells of the latents per side where no image size is given: the pipeline's own default, 1,024 pixels."""
LONGEST = 512
"""Tokens per prompt, at most, as in diffusers."""
_TRAINED = "Write the numbers that the model was trained with"
_TEXT_TO_IMAGE = "Use Z-Image, Z-Image-Turbo, or a model that was trained from them for text to image"


def _transformer(found: Configurations) -> Iterator[Finding]:
    own = found["transformer"]
    if own.get("siglip_feat_dim") is not None:
        problem = (
            f"siglip_feat_dim is {own['siglip_feat_dim']!r}: it takes images beside the text, as Z-Image-Omni does"
        )
        yield "transformer", problem, _TEXT_TO_IMAGE
    patches = list(zip(own.get("all_patch_size", [PATCH]), own.get("all_f_patch_size", [1]), strict=True))
    if (PATCH, 1) not in patches:
        yield "transformer", f"all_patch_size has no {PATCH} with all_f_patch_size 1", _TEXT_TO_IMAGE
    width, heads = own.get("dim", 3840), own.get("n_heads", 30)
    axes, lengths = own.get("axes_dims", [32, 48, 48]), own.get("axes_lens", [1024, 512, 512])
    if len(axes) != 3 or sum(axes) * heads != width or any(axis % 2 for axis in axes):
        problem = (
            f"axes_dims is {axes!r}, and must be three even numbers whose sum is dim / n_heads = {width / heads:g}"
        )
        yield "transformer", problem, _TRAINED
    if len(lengths) != 3 or lengths[0] < LONGEST + 2:
        problem = f"axes_lens is {lengths!r}, and must be three numbers, the first at least {LONGEST + 2}"
        yield "transformer", problem, _TRAINED


def _latents(found: Configurations) -> Iterator[Finding]:
    inputs, latent = found["transformer"].get("in_channels", 16), found["vae"].get("latent_channels", 4)
    if inputs != latent:
        yield "transformer", f"in_channels is {inputs!r}, and vae has latent_channels {latent}", _TEXT_TO_IMAGE


def _text(found: Configurations) -> Iterator[Finding]:
    width, reads = found["text_encoder"].get("hidden_size", 4096), found["transformer"].get("cap_feat_dim", 2560)
    if width != reads:
        problem = f"cap_feat_dim is {reads!r}, and text_encoder has a hidden_size of {width!r}"
        yield "transformer", problem, "Use the text encoder that it was trained with"
    layers = found["text_encoder"].get("num_hidden_layers", 32)
    if layers < 2:
        problem = f"num_hidden_layers is {layers}, and the text is read before the last of two or more"
        yield "text_encoder", problem, "Use the text encoder that the model was trained with"


def _tokens(found: Configurations) -> Iterator[Finding]:
    highest, known = found["tokenizer"]["highest_id"], found["text_encoder"].get("vocab_size", 151936)
    if highest >= known:
        problem = f"has the token {highest}, and text_encoder knows {known} tokens"
        yield "tokenizer", problem, "Use the tokenizer that the text encoder was trained with"


def _sizes(found: Configurations, size: tuple[int, int] | None) -> Sizes:
    own = found["transformer"]
    height, width = size or (CELLS, CELLS)
    cells, inner = height * width, own.get("dim", 3840)
    patches = cells // PATCH**2
    # The refiners are layers over the text and over the image.
    layers = own.get("n_layers", 30) + own.get("n_refiner_layers", 2)
    return Sizes(
        latent=own.get("in_channels", 16) * cells,
        text=LONGEST * own.get("cap_feat_dim", 2560),
        units=(patches + LONGEST) * inner * layers,
        saved=45,  # measured: with all weights, in half precision, whose rotations are in float32
        taps=3 * min(patches, 256) * inner,
        channels=3 * inner,
        **decoded(found["vae"], cells),
    )


ZIMAGE = Layout(
    pipeline="ZImagePipeline",
    network="transformer",
    adapted=("to_q", "to_k", "to_v", "to_out.0"),
    parts=(
        Part("transformer", "network", ("ZImageTransformer2DModel",)),
        Part("vae", "autoencoder", ("AutoencoderKL",)),
        Part("text_encoder", "text_encoder", ("Qwen3Model", "Qwen3ForCausalLM")),
        Part("tokenizer", "tokenizer", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
        Part("scheduler", "scheduler", ()),
    ),
    rules=(
        (("transformer",), _transformer),
        (("transformer", "vae"), _latents),
        (("transformer", "text_encoder"), _text),
        (("vae",), flow_autoencoder("ZImagePipeline")),
        (("text_encoder", "tokenizer"), _tokens),
    ),
    sizes=_sizes,
)

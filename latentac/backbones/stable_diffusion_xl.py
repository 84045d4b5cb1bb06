"""What a folder must be for the UNet of Stable Diffusion XL."""

from collections.abc import Iterator

from latentac.backbones.layout import Layout, Part
from latentac.backbones.stable_diffusion import (
    CLIP_TOKENIZERS,
    TEXT_TO_IMAGE,
    Configurations,
    Finding,
    text_settings,
    tokens,
    two_tokenizers,
    unet_autoencoder,
    unet_inputs,
    unet_latents,
    unet_sizes,
)

NUM_SIZES = 6
"""Numbers that the network gets about an image: its original size, its crop, and its size, two each."""

_ADDED = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
_ENCODERS = "Use the text encoders that the UNet was trained with"


def _unet(found: Configurations) -> Iterator[Finding]:
    unet = found["unet"]
    yield from unet_inputs(unet, _ADDED)
    if unet.get("addition_embed_type") != "text_time":
        problem = f"addition_embed_type is {unet.get('addition_embed_type')!r}, and must be text_time"
        yield "unet", f"{problem}: Stable Diffusion XL takes sizes and pooled text", TEXT_TO_IMAGE


def _unet_text(found: Configurations) -> Iterator[Finding]:
    width = sum(text_settings(found[name]).get("hidden_size", 512) for name in ("text_encoder", "text_encoder_2"))
    reads = found["unet"].get("cross_attention_dim", 1280)
    if reads != width:
        problem = f"cross_attention_dim is {reads!r}, and the two text encoders together have {width}"
        yield "unet", problem, _ENCODERS


def _unet_pooled(found: Configurations) -> Iterator[Finding]:
    unet, pooled = found["unet"], text_settings(found["text_encoder_2"]).get("projection_dim", 512)
    each, reads = unet.get("addition_time_embed_dim"), unet.get("projection_class_embeddings_input_dim")
    if each is None or reads != NUM_SIZES * each + pooled:
        problem = (
            f"projection_class_embeddings_input_dim is {reads!r}, and must be {NUM_SIZES} times addition_time_embed_dim"
            f" = {each!r} and the {pooled} to which text_encoder_2 projects (the refiner has fewer sizes)"
        )
        yield "unet", problem, _ENCODERS


SDXL = Layout(
    pipeline="StableDiffusionXLPipeline",
    network="unet",
    adapted=("to_q", "to_k", "to_v", "to_out.0"),
    parts=(
        Part("unet", "network", ("UNet2DConditionModel",)),
        Part("vae", "autoencoder", ("AutoencoderKL",)),
        Part("text_encoder", "text_encoder", ("CLIPTextModel",)),
        Part("text_encoder_2", "text_encoder", ("CLIPTextModelWithProjection",)),
        Part("tokenizer", "tokenizer", CLIP_TOKENIZERS),
        Part("tokenizer_2", "tokenizer", CLIP_TOKENIZERS),
        Part("scheduler", "scheduler", ()),
    ),
    rules=(
        (("unet",), _unet),
        (("unet", "vae"), unet_latents),
        (("unet", "text_encoder", "text_encoder_2"), _unet_text),
        (("unet", "text_encoder_2"), _unet_pooled),
        (("vae",), unet_autoencoder),
        (("text_encoder", "tokenizer"), tokens("text_encoder", "tokenizer")),
        (("text_encoder_2", "tokenizer_2"), tokens("text_encoder_2", "tokenizer_2")),
        (("tokenizer", "tokenizer_2"), two_tokenizers),
    ),
    absent=("feature_extractor", "image_encoder"),
    sizes=unet_sizes,
)

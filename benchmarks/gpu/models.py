"""Pipelines with random weights in the true folder layouts: of real size, and miniatures of them for a dry run."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_LENGTH = 77
"""Tokens of a prompt, as CLIP's text encoders have them."""
ZERO_LENGTH = 256
"""Zero tokens that Stable Diffusion 3 puts after them where its T5 encoder is absent."""
PROMPTS = "prompts.txt"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LONGEST_MERGED = 8  # letters of a token that is merged further
_SUBJECTS = "fox, owl, harbour, castle, bicycle, teapot, garden, lighthouse, violin, mountain, train, kitchen".split(
    ", "
)
_MANNERS = "at dawn, in the rain, made of glass, in watercolour, under snow, seen from above".split(", ")

Fields = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A pipeline and the settings that it is trained with.

    family: `sd` (a UNet, StableDiffusionPipeline) or `sd3` (a transformer, StableDiffusion3Pipeline)
    network, autoencoder, texts: configurations of the denoiser, of the autoencoder and of each text encoder
    vocabulary: tokens          size: side of an image in pixels          steps: K
    rows: images that go through the network together          blocks: of so many images, in an iteration
    updates: optimizer updates per iteration, which divide a block's transitions into whole batches
    kernel, algorithm, rate: the sampler, and the published clip and learning rate (LoRA's is three times that)
    """

    label: str
    family: str
    network: Fields
    autoencoder: Fields
    texts: tuple[Fields, ...]
    vocabulary: int
    size: int
    steps: int
    rows: int
    blocks: int
    updates: int
    kernel: str
    noise: float
    clip: float
    rate: float = 1e-4

    @property
    def recipe(self) -> str:
        """The recipe whose other settings are used."""
        return {"sd": "shapes-unet", "sd3": "shapes-dit"}[self.family]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.size // 2 ** (len(self.autoencoder["block_out_channels"]) - 1)
        return self.autoencoder["latent_channels"], side, side

    @property
    def adapted(self) -> tuple[str, ...]:
        """The linear layers that have adapters."""
        own = ("to_q", "to_k", "to_v", "to_out.0")
        return own if self.family == "sd" else (*own, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def build_network(self) -> Any:
        kind: Any = UNet2DConditionModel if self.family == "sd" else SD3Transformer2DModel
        return kind(**self.network)

    def build_autoencoder(self) -> Any:
        return AutoencoderKL(**self.autoencoder)

    @property
    def text_shapes(self) -> tuple[tuple[int, int], int | None]:
        """Length and width of a prompt's tokens, and the width of its pooled vector, if there is one."""
        if self.family == "sd":
            return (TEXT_LENGTH, self.network["cross_attention_dim"]), None
        joint, pooled = self.network["joint_attention_dim"], self.network["pooled_projection_dim"]
        return (TEXT_LENGTH + ZERO_LENGTH, joint), pooled


def _autoencoder(channels: int, widths: Sequence[int], layers: int, groups: int, **own: Any) -> Fields:
    blocks = len(widths)
    return {
        "latent_channels": channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        **own,
    }


def _text(width: int, layers: int, heads: int, activation: str = "quick_gelu") -> Fields:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
    }


_SD3_LATENTS = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
_CLIP_L, _CLIP_G = _text(768, 12, 12), _text(1280, 32, 20, "gelu")

REAL: dict[str, Model] = {
    "sd15": Model(
        label="SD1.5 size",
        family="sd",
        network={"sample_size": 64, "cross_attention_dim": 768},  # the rest of Stable Diffusion 1.5 is the default
        autoencoder=_autoencoder(4, (128, 256, 512, 512), 2, 32, sample_size=512, scaling_factor=0.18215),
        texts=(_CLIP_L,),
        vocabulary=49408,
        size=512,
        steps=10,
        rows=16,
        blocks=2,
        updates=3,
        kernel="ddim",
        noise=1.0,
        clip=1e-5,
    ),
    "sd35m": Model(
        label="SD3.5-M size",
        family="sd3",
        network={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        autoencoder=_autoencoder(16, (128, 256, 512, 512), 2, 32, sample_size=1024, **_SD3_LATENTS),
        texts=(_CLIP_L, _CLIP_G),
        vocabulary=49408,
        size=512,
        steps=10,
        rows=8,
        blocks=2,
        updates=5,
        kernel="flow_sde",
        noise=0.7,
        clip=1e-4,
    ),
}

MINIATURE: dict[str, Model] = {
    "sd15": Model(
        label="SD1.5 miniature",
        family="sd",
        network={
            "sample_size": 8,
            "cross_attention_dim": 32,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        autoencoder=_autoencoder(4, (8, 8, 16, 16), 1, 4, sample_size=64, scaling_factor=0.18215),
        texts=(_text(32, 2, 4),),
        vocabulary=800,
        size=64,
        steps=2,
        rows=4,
        blocks=2,
        updates=2,
        kernel="ddim",
        noise=1.0,
        clip=1e-5,
    ),
    "sd35m": Model(
        label="SD3.5-M miniature",
        family="sd3",
        network={
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 96,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        autoencoder=_autoencoder(16, (8, 8, 16, 16), 1, 4, sample_size=128, **_SD3_LATENTS),
        texts=(_text(32, 2, 4), _text(32, 2, 4, "gelu")),
        vocabulary=800,
        size=64,
        steps=2,
        rows=4,
        blocks=2,
        updates=2,
        kernel="flow_sde",
        noise=0.7,
        clip=1e-4,
    ),
}


def write(model: Model, folder: Path, device: torch.device) -> Path:
    """The pipeline with random weights in bfloat16, and PROMPTS beside it. Returns its folder."""
    torch.manual_seed(0)
    pipeline = folder / "pipeline"
    tokenizer = _tokenizer(model.vocabulary)

    def part(build: Callable[[], Any]) -> Any:
        with torch.device(device):
            return build().to(torch.bfloat16)

    kind = CLIPTextModel if model.family == "sd" else CLIPTextModelWithProjection
    configs = [CLIPTextConfig(**text, **_tokens(tokenizer, model.vocabulary)) for text in model.texts]
    texts = [part(partial(kind, config)) for config in configs]
    network, autoencoder = part(model.build_network), part(model.build_autoencoder)
    made: Any
    if model.family == "sd":
        made = StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=texts[0],
            tokenizer=tokenizer,
            unet=network,
            scheduler=PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        made = StableDiffusion3Pipeline(
            transformer=network,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder,
            text_encoder=texts[0],
            tokenizer=tokenizer,
            text_encoder_2=texts[1],
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    made.save_pretrained(pipeline)
    (folder / PROMPTS).write_text("\n".join(f"a {one} {how}" for one in _SUBJECTS for how in _MANNERS) + "\n")
    return pipeline


def _tokenizer(size: int) -> Any:
    """A tokenizer in CLIP's format whose merges are random: any text has tokens, no more than it has letters."""
    vocabulary, merges = _vocabulary(size)
    return CLIPTokenizer(vocabulary, merges, model_max_length=TEXT_LENGTH)


def _vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in their order, as vocab.json and merges.txt have them."""
    draw = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet + [f"{letter}</w>" for letter in alphabet])
    letters = [letter for letter in alphabet if letter.isascii() and letter.islower()]
    starts, ends = list(letters), [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    while len(tokens) < size - 2:
        first, last = draw.choice(starts), draw.choice(ends)
        joined = first + last
        if joined in tokens:
            continue
        tokens[joined] = None
        merges.append((first, last))
        if len(joined) <= _LONGEST_MERGED:
            ends.append(joined)
            if not joined.endswith("</w>"):
                starts.append(joined)
    return {token: index for index, token in enumerate([*tokens, _START, _END])}, merges


def _tokens(tokenizer: Any, vocabulary: int) -> Mapping[str, int]:
    """A text encoder's settings that follow from its tokenizer."""
    return {
        "vocab_size": vocabulary,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def described(model: Model) -> Fields:
    """What the results say of a model."""
    kept = ("label", "size", "steps", "rows", "blocks", "updates", "kernel", "noise", "clip", "rate")
    return {name: getattr(model, name) for name in kept} | {"latents": list(model.latent_shape)}

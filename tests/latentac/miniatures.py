"""Tiny models with random weights in the true folder layouts of diffusers, written at test time.

    sd15(folder, sharded=True)                            Stable Diffusion 1.5: five parts, a safety checker's nulls
    sd15(folder, variant="fp16")                          the same weights, as *.fp16.safetensors beside what is there
    sd15(folder, prediction_type="v_prediction")          Stable Diffusion 2
    sdxl(folder)                                          Stable Diffusion XL 1.0, its scheduler too
    sd3(folder), sd3(folder, medium=True)                 Stable Diffusion 3, and 3.5 Medium (dual attention, qk norm)
    clip(folder)                                          a whole CLIP with the settings of its images, for rewards
    mask2former(folder)                                   Mask2Former for instances, for the reward `geneval`
    llava(folder)                                         LLaVA 1.5 with its processor, for the reward `vqa`

    pipeline_of("sdxl")                                   for tests of every backbone, whose weights do not matter

Each returns its folder. The weights depend on `seed` alone, so two calls into one folder give two forms of one model.
The tokenizer is CLIP's true format (vocab.json, merges.txt) with the small vocabulary of the embedded world. `size` is
the image's side, `max_length` that of a prompt in tokens.
"""

import functools
import json
import shutil
import string
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentac.worlds.builtin import PIPELINES, builtin_pipeline

SHARD = "60KB"
"""Of sharded weights: small enough that each part but the tiniest has several files."""

_VOCABULARY = builtin_pipeline("shapes-unet") / "tokenizer"
_VP = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def sd15(
    folder: Path,
    *,
    size: int = 64,
    sharded: bool = False,
    variant: str = "",
    prediction_type: str = "epsilon",
    scheduler: str = "PNDMScheduler",
    seed: int = 0,
    max_length: int = 16,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    **schedule: Any,
) -> Path:
    """A UNet in StableDiffusionPipeline's layout. unet, vae: settings over those parts' own; schedule: over the
    scheduler's."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": size // 8,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 32,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder(size, 4, vae or {}),
        text_encoder=CLIPTextModel(_text_config(32, max_length)),
        tokenizer=_tokenizer(max_length),
        unet=UNet2DConditionModel(**(settings | (unet or {}))),
        scheduler=_scheduler(scheduler, prediction_type, schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _saved(pipeline, folder, variant, sharded)


def sdxl(
    folder: Path,
    *,
    size: int = 64,
    sharded: bool = False,
    variant: str = "",
    prediction_type: str = "epsilon",
    scheduler: str = "EulerDiscreteScheduler",
    seed: int = 0,
    max_length: int = 16,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    zeros: bool = True,
    **schedule: Any,
) -> Path:
    """A UNet in StableDiffusionXLPipeline's layout. zeros: force_zeros_for_empty_prompt. The two encoders differ in
    width, and the two tokenizers in what they pad with."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": size // 8,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 32 + 48,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 48,
    }
    spacing = {"timestep_spacing": "leading", "steps_offset": 1} if scheduler == "EulerDiscreteScheduler" else {}
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder(size, 4, {"scaling_factor": 0.13025, "force_upcast": True} | (vae or {})),
        text_encoder=CLIPTextModel(_text_config(32, max_length)),
        tokenizer=_tokenizer(max_length),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(48, max_length)),
        tokenizer_2=_tokenizer(max_length, pad_token="!"),
        unet=UNet2DConditionModel(**(settings | (unet or {}))),
        scheduler=_scheduler(scheduler, prediction_type, spacing | schedule),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    return _saved(pipeline, folder, variant, sharded)


def sd3(
    folder: Path,
    *,
    size: int = 64,
    sharded: bool = False,
    variant: str = "",
    medium: bool = False,
    scheduler: str = "FlowMatchEulerDiscreteScheduler",
    seed: int = 0,
    max_length: int = 16,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    t5: tuple[Any, Any] = (None, None),
    **schedule: Any,
) -> Path:
    """A transformer in StableDiffusion3Pipeline's layout. medium: as in 3.5 Medium; t5: its encoder and tokenizer."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": size // 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": size // 8,
        "dual_attention_layers": (0, 1) if medium else (),
        "qk_norm": "rms_norm" if medium else None,
    }
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(settings | (transformer or {}))),
        scheduler=getattr(diffusers, scheduler)(**({"shift": 3.0} | schedule)),
        vae=_autoencoder(size, 16, {"scaling_factor": 1.5305, "shift_factor": 0.0609} | (vae or {})),
        text_encoder=CLIPTextModelWithProjection(_text_config(32, max_length)),
        tokenizer=_tokenizer(max_length),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(32, max_length)),
        tokenizer_2=_tokenizer(max_length),
        text_encoder_3=t5[0],
        tokenizer_3=t5[1],
    )
    return _saved(pipeline, folder, variant, sharded)


def clip(folder: Path, *, width: int = 24, size: int = 32, seed: int = 0, max_length: int = 16, **vision: Any) -> Path:
    """CLIPModel in its published layout: one folder, weights in safetensors, preprocessor_config.json as OpenAI wrote
    it. width: of the shared vectors; size: of the images; vision: settings over that half's own."""
    torch.manual_seed(seed)
    half = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = _text_config(32, max_length).to_dict()
    seen = {**half, "image_size": size, "patch_size": 8, **vision}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=seen, projection_dim=width))
    for weight in model.parameters():
        if weight.ndim > 1:  # with CLIP's own small ones all images look the same
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    _tokenizer(max_length).save_pretrained(folder)
    _older_form(folder)
    images = {
        **dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), True),
        **dict.fromkeys(("size", "crop_size"), size),
        "resample": 3,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    return folder


@functools.cache
def pipeline_of(name: str) -> Path:
    """A pipeline for the backbone `name`: the embedded world's, or a miniature that lives as long as the process."""
    if f"shapes-{name}" in PIPELINES:
        return builtin_pipeline(f"shapes-{name}")
    folder = tempfile.TemporaryDirectory(prefix=f"latentac-{name}-")
    _KEPT.append(folder)
    return _MINIATURES[name](Path(folder.name))


_MINIATURES: dict[str, Callable[[Path], Path]] = {"sdxl": sdxl}
_KEPT: list["tempfile.TemporaryDirectory[str]"] = []


def _saved(pipeline: Any, folder: Path, variant: str, sharded: bool) -> Path:
    """The pipeline in `folder`, over what is there; a variant of half precision holds half-precision weights."""
    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(variant)
    if precision is not None:
        pipeline.to(dtype=precision)
    with tempfile.TemporaryDirectory() as fresh:  # saving into a folder removes the shards that it holds
        pipeline.save_pretrained(fresh, variant=variant or None, max_shard_size=SHARD if sharded else None)
        for tokenizer in Path(fresh).glob("tokenizer*"):
            if "CLIP" in (tokenizer / "tokenizer_config.json").read_text():
                _older_form(tokenizer)
        shutil.copytree(fresh, folder, dirs_exist_ok=True)
    return folder


def _older_form(tokenizer: Path) -> None:
    """As the published folders have it: vocabulary and merges in files of their own, no tokenizer.json."""
    (tokenizer / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(_VOCABULARY / name, tokenizer / name)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    special = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def _autoencoder(size: int, channels: int, settings: dict[str, Any]) -> Any:
    own = {
        "sample_size": size,
        "latent_channels": channels,
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 0.18215,
    }
    return AutoencoderKL(**(own | settings))


def _scheduler(name: str, prediction_type: str, settings: dict[str, Any]) -> Any:
    own = {**_VP, "prediction_type": prediction_type}
    if name in {"PNDMScheduler", "DDIMScheduler"}:  # as in Stable Diffusion's own folders
        own |= {"steps_offset": 1, "set_alpha_to_one": False}
    own |= {"PNDMScheduler": {"skip_prk_steps": True}, "DDIMScheduler": {"clip_sample": False}}.get(name, {})
    return getattr(diffusers, name)(**(own | settings))


def _text_config(width: int, max_length: int) -> Any:
    tokenizer = _tokenizer(max_length)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer(max_length: int, **marks: str) -> Any:
    return CLIPTokenizer.from_pretrained(_VOCABULARY, model_max_length=max_length, **marks)


def variant_only(folder: Path, source: Path, part: str) -> Path:
    """A copy of `source` in which `part` has no weights but its variants'."""
    shutil.copytree(source, folder)
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        (folder / part / name).unlink(missing_ok=True)
    return folder


def llava(folder: Path, *, seed: int = 0) -> Path:
    """LLaVA 1.5 in its published layout: CLIP's image half, a projector, Llama with its byte-pair encoding, and the
    settings of images in the older file of their own."""
    tokenizer = _llama_tokenizer()
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    marks = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor=images, tokenizer=tokenizer, **marks).save_pretrained(folder)
    joined = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(joined.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(joined))
    torch.manual_seed(seed)
    half = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        **half,
    )
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **half)
    mark = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=mark))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def _llama_tokenizer() -> Any:
    """Llama's format: byte-pair encoding with bytes for what it does not know, and a first token before every text."""
    characters = "▁" + string.ascii_letters + string.digits + "\".,?:!-'\n"
    vocabulary = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>"])}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *characters):
        vocabulary[token] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in ("▁Yes", "▁No", "▁yes", "▁red", "▁circle", "▁figure", "▁show"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<unk>", model_max_length=2048)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False), AddedToken("<pad>", special=True)])
    tokenizer.pad_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def mask2former(folder: Path, *, classes: Sequence[str] = ("dog", "tv", "person"), seed: int = 0) -> Path:
    """Mask2Former for instances with a Swin backbone in its published layout, ten queries."""
    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
        **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 64),
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=10,
        id2label=dict(enumerate(classes)),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    torch.nn.init.normal_(model.class_predictor.weight, std=2.0)
    model.save_pretrained(folder)
    settings = {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": True,
        "size_divisor": 32,
        "size": {"shortest_edge": 64, "longest_edge": 128},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.23, 0.22, 0.23],
        "num_labels": 3,
        "ignore_index": 255,
        "reduce_labels": False,
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder

"""FLUX.1 with random weights in the true folder layout of diffusers, written at test time; see `miniatures`.

    flux(folder)                     dev: dynamic shifting, distilled guidance
    flux(folder, schnell=True)       neither

T5's tokenizer is in the form of the published folders: tokenizer.json with all marks, spiece.model beside it, and the
settings that transformers 4 wrote.
"""

import base64
import json
import struct
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from tests.latentac import miniatures

EXTRA_IDS = 4
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "shift": 3.0,
}
"""As FLUX.1 dev has it."""
_WORDS = "a an two three red blue green cyan magenta yellow circle square triangle above below left right of and the"


def flux(
    folder: Path,
    *,
    schnell: bool = False,
    sharded: bool = False,
    variant: str = "",
    seed: int = 0,
    max_length: int = 16,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    **schedule: Any,
) -> Path:
    """A transformer in FluxPipeline's layout. transformer, vae: settings over those parts' own; schedule: over the
    scheduler's."""
    torch.manual_seed(seed)
    settings = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": not schnell,
    }
    shift = {"shift": 1.0} if schnell else DYNAMIC
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(**(settings | (transformer or {}))),
        scheduler=FlowMatchEulerDiscreteScheduler(**(shift | schedule)),
        vae=miniatures._autoencoder(64, 4, {"scaling_factor": 0.3611, "shift_factor": 0.1159} | (vae or {})),
        text_encoder=CLIPTextModel(miniatures._text_config(32, max_length)),
        tokenizer=miniatures._tokenizer(max_length),
        text_encoder_2=t5(24),
        tokenizer_2=t5_tokenizer(max_length),
    )
    miniatures._saved(pipeline, folder, variant, sharded)
    as_published(folder / "tokenizer_2")
    return folder


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer(16)) + 20,  # the published one has 28 more rows than its tokenizer has tokens
            d_model=width,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def t5_tokenizer(max_length: int) -> Any:
    words = _WORDS.split()
    letters = sorted({letter for word in words for letter in word})
    pieces = ["▁", *(f"▁{word}" for word in words), *letters, "s"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -2.0 - number / 10) for number, piece in enumerate(dict.fromkeys(pieces))]
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(EXTRA_IDS))]
    return T5TokenizerFast(
        vocab=vocabulary, extra_ids=EXTRA_IDS, model_max_length=max_length, _spm_precompiled_charsmap=TABLE
    )


def as_published(tokenizer: Path) -> None:
    """T5's tokenizer as transformers 4 wrote it."""
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    extra = settings.pop("extra_special_tokens")
    described = json.loads((tokenizer / "tokenizer.json").read_text())
    settings["added_tokens_decoder"] = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in described["added_tokens"]
    }
    settings |= {"additional_special_tokens": extra, "legacy": True, "sp_model_kwargs": {}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {name: settings[name] for name in ("eos_token", "pad_token", "unk_token")}
    special["additional_special_tokens"] = extra
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    described["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    described["normalizer"] = {"type": "Sequence", "normalizers": [table(TABLE)]}
    (tokenizer / "tokenizer.json").write_text(json.dumps(described))
    (tokenizer / "spiece.model").write_bytes(b"\x0a\x0e\x0a\x05<pad>")


def table(content: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def charsmap() -> bytes:
    """A table of characters in the form of SentencePiece, which makes r of R: a trie of two blocks of 256 units."""
    units = [0] * 512
    letter = ord("R")
    units[0] = 256 << 10 >> 0
    units[256 ^ letter] = letter | 1 << 8 | ((256 ^ letter) ^ 256) << 10
    units[256] = 1 << 31
    texts = b"r\0"
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + texts


TABLE = charsmap()

"""Z-Image with random weights in the true folder layout of diffusers, written at test time; see `miniatures`.

    zimage(folder)                   the shift of Z-Image-Turbo

As in the published folder, the text encoder's weights are those of a whole language model, and the tokenizer has
vocab.json and merges.txt, marks and chat template in tokenizer_config.json, and tokenizer.json beside them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.latentac import miniatures

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")
_WORDS = "a an two three red blue green cyan yellow circle square triangle above below left right of and the user"
TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
"""What Qwen3's own makes of one message."""


def zimage(
    folder: Path,
    *,
    sharded: bool = False,
    variant: str = "",
    whole: bool = True,
    seed: int = 0,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    **schedule: Any,
) -> Path:
    """A transformer in ZImagePipeline's layout. whole: whether the encoder's file is the language model's; transformer,
    vae: settings over those parts' own; schedule: over the scheduler's."""
    torch.manual_seed(seed)
    settings = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 6,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [4, 4, 8],
        "axes_lens": [1024, 64, 64],
    }
    network = ZImageTransformer2DModel(**(settings | (transformer or {})))
    for token in (network.x_pad_token, network.cap_pad_token):  # zeros before training
        torch.nn.init.normal_(token)
    pipeline = ZImagePipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | schedule)),
        vae=miniatures._autoencoder(64, 4, {"scaling_factor": 0.3611, "shift_factor": 0.1159} | (vae or {})),
        text_encoder=qwen3(24) if whole else qwen3(24).model,
        tokenizer=qwen2_tokenizer(),
    )
    miniatures._saved(pipeline, folder, variant, sharded)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "Qwen3Model"]}))
    as_published(folder / "tokenizer")
    return folder


def qwen3(width: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(qwen2_tokenizer()) + 20,  # the published one has more rows than its tokenizer has tokens
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes, and the words above with the space before them, each merged letter by letter."""
    tokens, merges = sorted(ByteLevel.alphabet()), []
    for word in _WORDS.split():
        made = "Ġ"
        for letter in word:
            merges.append((made, letter))
            made += letter
            tokens.append(made)
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, list(dict.fromkeys(merges))


def qwen2_tokenizer() -> Any:
    tokens, merges = vocabulary()
    tokenizer = Qwen2Tokenizer(
        vocab=tokens,
        merges=merges,
        eos_token="<|im_end|>",
        model_max_length=1024,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def as_published(folder: Path) -> None:
    """The tokenizer as transformers 4 wrote it."""
    tokens, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
    described = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    (folder / "chat_template.jinja").unlink()
    settings |= {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "additional_special_tokens": list(MARKS[1:3]),
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in described["added_tokens"]
        },
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

"""The tokenizers of the embedded worlds: CLIP's, with the merges of a small language."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTokenizer

_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path, merges: str, length: int) -> CLIPTokenizer:
    """A CLIPTokenizer that any text has tokens in, at most `length` with the two marks.

    merges: byte-pair merges, the first ones first, separated by commas; `/` stands for the end of a word. The
    tokenizer's `vocab.json` and `merges.txt` are written to `folder`.
    """
    pairs = [tuple(pair.replace("/", "</w>").split()) for pair in merges.split(",")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in pairs] + [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(vocabulary, pairs, model_max_length=length)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids int64 [B, L], padded and cut to the tokenizer's longest text as diffusers' pipelines do."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids

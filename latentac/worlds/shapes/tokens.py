"""The tokenizer of the shapes language, for both pipelines."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTokenizer

TEXT_LENGTH = 16  # the longest caption has 10 tokens, its two marks included
# The byte-pair merges, most frequent first, "/" for the end of a word. They were learned once, by the trainer of the
# tokenizers library, from the words of the language; its order among equally frequent pairs changes from run to run.
_MERGES = """
r e, a n, l e, r i, c i, e l, l e/, o w/, q u, r c, s qu, t ri, an g, le s/, ci rc, squ a, tri ang, a b, a g,
a n/, b l, b el, c y, e n, e n/, f o, f t/, g h, g re, h re, l ow/, m ag, o v, o f/, r e/, t w, t a/, t hre, u
e/, u r/, y el, re s/, re d/, an d/, le ft/, ri gh, circ le/, circ les/, squa re/, squa res/, triang le/,
triang les/, ab ov, bl ue/, bel ow/, cy an/, en ta/, fo ur/, gre en/, mag enta/, tw o/, thre e/, yel low/,
righ t/, abov e/
"""
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(folder: Path, length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """A CLIPTokenizer in which every word of the shapes language is one token and any other text still has tokens, at
    most `length` with the two marks. Its `vocab.json` and `merges.txt` are written to `folder`.
    """
    merges = [tuple(pair.replace("/", "</w>").split()) for pair in _MERGES.split(",")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(pair) for pair in merges] + [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(vocabulary, merges, model_max_length=length)
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

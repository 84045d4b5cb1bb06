"""A tokenizer's files, checked before a library reads them, and reduced to what its class does not know by itself."""

import base64
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentac.system.modelfiles import CHAT_MARKS, CHAT_TOKENIZERS, Damaged, read_bytes, read_json

ModelType = Literal["clip", "t5", "qwen3"]
"""Of a text encoder, and of its tokenizer."""
TOKENIZER = "tokenizer.json"
SENTENCEPIECE = "spiece.model"

_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_MOST_ADDED = 1000  # tokens beside a vocabulary; each is looked for in every prompt
_LONGEST_TOKEN = 256
_MOST_TOKENS = 2**20
_EXTRA_IDS = 100  # of T5 where its settings do not say
_PADDING: Mapping[ModelType, str] = {"clip": "<|endoftext|>", "t5": "<pad>", "qwen3": "<|endoftext|>"}
_FIELDS = (
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"),
    *("decoder", "model"),
)
_READ = ("version", "added_tokens", "model")


def read_tokenizer(folder: Path, kind: ModelType) -> dict[str, Any]:
    """tokenizer_config.json, and the highest token as `highest_id`. Raises Damaged."""
    names = {path.name for path in folder.iterdir()}
    vocabulary, more = _READERS[kind](folder, names)
    if "tokenizer_config.json" not in names:
        raise Damaged("has no tokenizer_config.json, which says how many tokens a prompt may have")
    more |= read_json(folder / _ADDED) if _ADDED in names else {}
    found = read_json(folder / "tokenizer_config.json")
    decoder = found.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict):
            more[str(token.get("content"))] = int(number) if re.fullmatch("[0-9]{1,9}", number) else number
    special = [found, read_json(folder / _MAP) if _MAP in names else {}]
    listed = [one.get(field) for one in special for field in ("additional_special_tokens", "extra_special_tokens")]
    extra = _extra_ids(found) if kind == "t5" else []
    lists = [extra, *(one for one in listed if isinstance(one, list | dict))]
    _bounded(vocabulary, more, len(more) + sum(map(len, lists)))
    tokens = vocabulary | more
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        given = [one[name] for one in special if one.get(name) is not None]
        if name == "pad_token" and not given:  # `plain` leaves out null, so the class pads with its own
            given = [_PADDING[kind]]
        for token in [one.get("content") if isinstance(one, dict) else one for one in given]:
            if not (isinstance(token, str) and token in tokens):
                raise Damaged(f"has no token {token!r}, its {name}, in its vocabulary")
    if kind == "qwen3":
        _check_chat(found, tokens)
    # The library gives tokens that it does not know the next numbers.
    unknown = {str(token) for one in lists for token in one}.difference(tokens)
    return found | {"highest_id": max(tokens.values()) + len(() if kind == "clip" else unknown)}


def reduced(described: Mapping[str, Any], kind: ModelType) -> dict[str, Any]:
    """tokenizer.json without patterns and marks: the classes of transformers have their own. Of T5's normaliser the
    table of characters is kept, which only the file has. Raises Damaged."""
    kept = {name: described.get(name) if name in _READ else None for name in _FIELDS}
    table = _table(described) if kind == "t5" else None
    return kept if table is None else kept | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}


def _clip(folder: Path, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Token -> number, and those of the tokens beside them, of a byte-pair encoding. Raises Damaged."""
    more: dict[str, Any] = {}
    if TOKENIZER in names:
        described = read_json(folder / TOKENIZER)
        model = described.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        more = _added(described)
    elif "vocab.json" in names and "merges.txt" in names:
        vocabulary = read_json(folder / "vocab.json")
        if not read_bytes(folder / "merges.txt").strip():
            raise Damaged("merges.txt is empty")
    else:
        raise Damaged("has neither tokenizer.json nor vocab.json with merges.txt")
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise Damaged("has an empty vocabulary")
    return vocabulary, more


def _t5(folder: Path, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a unigram model, whose tokens are numbered by their order. Raises Damaged."""
    if TOKENIZER not in names:
        other = f", but {SENTENCEPIECE}, which is not read" if SENTENCEPIECE in names else ""
        raise Damaged(f"has no {TOKENIZER}{other}")
    described = read_json(folder / TOKENIZER)
    model = described.get("model")
    pairs = model.get("vocab") if isinstance(model, dict) and model.get("type") == "Unigram" else None
    if not isinstance(pairs, list) or not pairs or not all(map(_is_scored, pairs)):
        raise Damaged(f"{TOKENIZER} holds no Unigram model with a score for each token, as T5 has it")
    vocabulary = {token: number for number, (token, _) in enumerate(pairs)}
    if len(vocabulary) < len(pairs):
        raise Damaged(f"{TOKENIZER} has a token twice")
    _table(described)
    return vocabulary, _added(described)


def _qwen(folder: Path, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a byte-pair encoding in the two files of its own. Raises Damaged."""
    if not {"vocab.json", "merges.txt"} <= set(names):
        other = f", but {TOKENIZER}, which is not read" if TOKENIZER in names else ""
        raise Damaged(f"has no vocab.json with merges.txt{other}")
    return _clip(folder, set(names) - {TOKENIZER})


def _check_chat(settings: Mapping[str, Any], tokens: Collection[str]) -> None:
    """Raises Damaged where a prompt cannot be put into a chat."""
    kind = settings.get("tokenizer_class")
    if kind not in CHAT_TOKENIZERS:
        raise Damaged(f"tokenizer_config.json says tokenizer_class {kind!r}, and only Qwen2Tokenizer is supported")
    if missing := [mark for mark in CHAT_MARKS if mark not in tokens]:
        raise Damaged(f"has no token {missing[0]!r}, which every prompt begins or ends with")


def _is_scored(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    token, score = pair
    return isinstance(token, str) and bool(token) and type(score) in (int, float)


def _added(described: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens beside the vocabulary of tokenizer.json -> number. Raises Damaged."""
    added = described.get("added_tokens") or []
    listed = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    found = {str(token.get("content")): token.get("id") for token in listed}
    if not isinstance(added, list) or len(found) < len(added):
        raise Damaged(f"{TOKENIZER}: added_tokens is not a list of different tokens")
    return found


def _extra_ids(settings: Mapping[str, Any]) -> list[str]:
    """T5's own tokens for gaps in a text. Raises Damaged."""
    count = settings.get("extra_ids", _EXTRA_IDS)
    if type(count) is not int or not 0 <= count <= _MOST_ADDED:
        raise Damaged(f"tokenizer_config.json: extra_ids is {str(count)[:40]}, and must be from 0 to {_MOST_ADDED:,}")
    return [f"<extra_id_{number}>" for number in range(count)]


def _bounded(vocabulary: Mapping[str, Any], more: Mapping[str, Any], added: int) -> None:
    """Raises Damaged for tokens that cost more than those of CLIP and T5 do. added: how many stand beside the
    vocabulary."""
    if added > _MOST_ADDED:
        raise Damaged(f"adds {added:,} tokens to its vocabulary, and at most {_MOST_ADDED:,} are read")
    for token, number in (*vocabulary.items(), *more.items()):
        if len(token) > _LONGEST_TOKEN:
            raise Damaged(f"has a token of {len(token):,} characters, and at most {_LONGEST_TOKEN} are read")
        if type(number) is not int or not 0 <= number < _MOST_TOKENS:
            bounds = f"and must be a whole one from 0 to {_MOST_TOKENS - 1:,}"
            raise Damaged(f"has a token {token!r} whose number is {str(number)[:40]}, {bounds}")


def _table(described: Mapping[str, Any]) -> str | None:
    """The table of characters in the normaliser of tokenizer.json, in base64; None without one. Raises Damaged."""
    given = described.get("normalizer")
    steps = given.get("normalizers", [given]) if isinstance(given, dict) else []
    for step in steps if isinstance(steps, list) else []:
        if isinstance(step, dict) and step.get("type") == "Precompiled":
            table = step.get("precompiled_charsmap")
            try:
                content = base64.b64decode(str(table), validate=True)
            except ValueError:
                content = b""
            if not _is_sound(content):
                raise Damaged(f"{TOKENIZER}: the normaliser's table of characters is damaged")
            return str(table)
    return None


def _is_sound(table: bytes) -> bool:
    """Whether each step in a table of SentencePiece leads into it, so that no prompt leads out of it.

    It consists of a length, a double-array trie of so many bytes, and texts that end in a zero. A unit of the trie is
    a leaf, bit 31, with the place of a text, or has a label in its lowest byte and an offset to the units that follow.
    """
    length = int.from_bytes(table[:4], "little")
    if len(table) < 4 + length or length == 0 or length % 4:
        return False
    units, texts = np.frombuffer(table, np.uint32, length // 4, 4), table[4 + length :]
    if not _is_text(texts):
        return False
    count, inner = len(units), units >> 31 == 0
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    follows = (np.arange(count) ^ offsets)[inner]
    if int(follows.max(initial=0)) | 0xFF >= count:
        return False
    places = units[follows[units[inner] >> 8 & 1 == 1]] & 0x7FFFFFFF
    starts = [0, *(place + 1 for place, byte in enumerate(texts) if byte == 0)]
    return bool(np.isin(places, starts).all()) and int(places.max(initial=0)) < max(len(texts), 1)


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


_READERS: Mapping[ModelType, Callable[[Path, Collection[str]], tuple[dict[str, Any], dict[str, Any]]]] = {
    "clip": _clip,
    "t5": _t5,
    "qwen3": _qwen,
}

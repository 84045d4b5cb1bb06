"""Files of a model folder that somebody else wrote: which may be read, and how much of them.

A folder is data. A file of it is read only if it is a regular file inside, JSON only up to a size and a depth, and what
names code or other places in it is dropped before a library sees it.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latentac.system.reading import has_more_values

MOST_BYTES = 2**20
"""Of a description in JSON."""
MOST_VOCABULARY_BYTES = 8 * 2**20
"""Of a tokenizer's files and of an index of shards: those of CLIP have 3 MB."""
MOST_DEPTH = 32
MOST_VALUES = 500_000
"""Of a file in JSON: each costs some microseconds whenever it is looked at. CLIP's tokenizer has 200,000."""
LFS = b"version https://git-lfs"
"""What a git-lfs pointer begins with: the text file that stands where a large file was not fetched."""
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Of peft: transformers follows the first of them to a base model elsewhere."""

CHAT_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
"""Those whose text encoder was trained on chats."""
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")

_MOST_SHOWN = 400
_LARGE = ("tokenizer.json", "vocab.json", "merges.txt", ".index.json")
_NAMES_PLACES = ("_name_or_path", "name_or_path")  # where the libraries note what they loaded: a path of that machine
_NAMES_CODE = (
    *("auto_map", "custom_pipelines", "trust_remote_code", "quantization_config"),
    # transformers takes a hub id in these, and runs the kernel that lies there where `kernels` is installed.
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
)
_CHANGES_CALLS = ("return_dict",)  # where false, an encoder returns a tuple, which no caller reads
_TOKENIZER_FIELDS = frozenset(
    {
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "model_max_length"),
        *("tokenizer_class", "do_lower_case", "add_prefix_space", "errors", "padding_side"),
        *("truncation_side", "clean_up_tokenization_spaces", "split_special_tokens", "backend", "extra_ids"),
    }
)
_CHAT_BEGINS, _CHAT_ENDS = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_CHAT = "{{ %r + messages[0].content + %r }}" % (_CHAT_BEGINS, _CHAT_ENDS)  # noqa: UP031 - the braces are Jinja's
_MAY_BE_INFINITE = "lambda_min_clipped"  # -Infinity in diffusers' own scheduler configurations


class Damaged(ValueError):
    """A file is not what its name says, or more than is read."""


def pointer(name: str) -> str:
    """What is wrong with a git-lfs pointer."""
    return f"{name} is a git-lfs pointer, a text file where the real one was not fetched"


def faults(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Those of the relative `names` that must not be read: name, what is wrong, the remedy. Nothing is opened.

    Links that lead out of the folder are refused, but for those of a hub cache's snapshot to its blobs.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":  # not resolved: `blobs` may itself lead elsewhere
        roots.append(root.parent.parent / "blobs")
    for name in names:
        try:
            place = (folder / name).resolve()
            mode = place.stat().st_mode
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            if isinstance(error, FileNotFoundError) and not (folder / name).is_symlink():
                continue  # whoever needs it says so
            yield name, f"cannot be read ({_reason(error)})", "Put the file itself there"
            continue
        if not any(place.is_relative_to(root) for root in roots):
            remedy = "Put the file itself there: what is outside the folder is not followed"
            yield name, "is a link that leads out of the folder", remedy
        elif not stat.S_ISREG(mode):
            yield name, "is not a regular file", "Put the file itself there"


def check(folder: Path, *names: str) -> None:
    """Raises Damaged for the first of the relative `names` that must not be read."""
    for name, problem, _ in faults(folder, names):
        raise Damaged(f"{name} {problem}")


def read_bytes(file: Path) -> bytes:
    """A regular file of bounded size. Raises Damaged, OSError."""
    most = MOST_VOCABULARY_BYTES if file.name.endswith(_LARGE) else MOST_BYTES
    # Without O_NONBLOCK a pipe would be waited for.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{file.name} is not a regular file")
        content = stream.read(most + 1)
    if len(content) > most:
        raise Damaged(f"{file.name} has {max(found.st_size, most + 1):,} bytes, and at most {most:,} are read")
    if content.startswith(LFS):
        raise Damaged(pointer(file.name))
    return content


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises Damaged, OSError."""
    return parse_json(read_bytes(file), file.name)


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    """The object that is written in `content`. Raises Damaged, with the field where one is at fault."""
    if has_more_values(content.decode(errors="replace"), MOST_VALUES):
        raise Damaged(f"{name} has more than {MOST_VALUES:,} values")
    try:
        found = json.loads(content, object_pairs_hook=_unique)
    except _Twice as error:
        raise Damaged(f"{name} has the key {str(error)[:80]!r} twice") from None
    except RecursionError:
        raise Damaged(f"{name} is nested too deep: more than {MOST_DEPTH} levels") from None
    except ValueError:
        raise Damaged(f"{name} is not JSON") from None
    if not isinstance(found, dict):
        raise Damaged(f"{name} is not a JSON object")
    for field, depth, value in walk(found):
        if depth > MOST_DEPTH:
            raise Damaged(f"{name} is nested too deep: more than {MOST_DEPTH} levels")
        if isinstance(value, float) and not math.isfinite(value) and field != _MAY_BE_INFINITE:
            raise Damaged(f"{name}: {field} is {value}, and must be a finite number")
    return found


def walk(content: Mapping[str, Any]) -> Iterator[tuple[str, int, Any]]:
    """Each value below an object, at any depth: its field, or its nearest one's, its depth, the value."""
    pending: list[tuple[str, int, Any]] = [("", 0, content)]
    while pending:
        field, depth, value = pending.pop()
        yield field, depth, value
        if isinstance(value, Mapping):
            pending += [(name, depth + 1, below) for name, below in value.items()]
        elif isinstance(value, list):
            pending += [(field, depth + 1, below) for below in value]


def plain(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """A description without what names code, files or another machine's places, or changes what a call returns. name:
    of its file.

    Of `tokenizer_config.json` only known fields stay: the library takes any of them as an argument. A chat template is
    a program, so no folder's own is kept: that of Qwen is written anew.
    """
    if name == "tokenizer_config.json":
        # A token that is null would not be the class's own but none, and padding would fail.
        kept = {field: value for field, value in content.items() if field in _TOKENIZER_FIELDS and value is not None}
        if kept.get("tokenizer_class") in CHAT_TOKENIZERS:
            kept["chat_template"] = _CHAT
        return {field: _stripped(value) for field, value in kept.items()}
    return dict(content) if name in {"tokenizer.json", "vocab.json", "added_tokens.json"} else _stripped(dict(content))


def chat(prompt: str) -> str:
    """A prompt as the first message of a chat whose answer begins, as Qwen3 writes it, and `plain`'s template too."""
    return f"{_CHAT_BEGINS}{prompt}{_CHAT_ENDS}"


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            field: _stripped(below)
            for field, below in value.items()
            if field not in (*_NAMES_PLACES, *_NAMES_CODE, *_CHANGES_CALLS)
        }
    return [_stripped(below) for below in value] if isinstance(value, list) else value


def shorten(text: str) -> str:
    """What a file says, in a message: at most 400 characters."""
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


class _Twice(ValueError):
    """A key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(name)
        found[name] = value
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, RuntimeError) or getattr(error, "errno", None) == errno.ELOOP:
        return "links in a circle"
    return str(getattr(error, "strerror", None) or error)

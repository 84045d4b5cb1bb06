"""Diffusers folders: which files of a part are read, and how a whole pipeline is written, part by part and by name.

Nothing is taken along because it lies there: a folder may hold its weights twice (shards, variants, pickles) and parts
that this pipeline does not use. What is written holds each part once, under the names that load without an argument.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from latentac.system.errors import IntegrityError, ResourceError
from latentac.system.modelfiles import Damaged, check, plain, read_json

INDEX = "model_index.json"
ADAPTER = "lora/pytorch_lora_weights.safetensors"
"""Low-rank adapters alone, in the folder of the pipeline that they are merged into. `load_lora_weights` of diffusers
takes the folder `lora`. Where they are exported without a pipeline, the file is in the folder itself."""
SHARD = "10GB"
"""The longest file of weights; more are sharded, with an index."""

_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(\.(?P<variant>\w+))?\.safetensors(?P<index>\.index(\.(?P<other>\w+))?\.json)?"
)
_DESCRIPTIONS = (
    *("config.json", "generation_config.json", "scheduler_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "spiece.model"),
)
_AGAIN = "Fetch the model again"
_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "LICENCE.txt", "NOTICE", "NOTICE.md")


def begin(folder: Path) -> None:
    """Make `folder`. Raises ResourceError if it holds something: what is left of another pipeline would be loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ResourceError(str(folder), "is not empty, and a pipeline is written whole", "Name an empty folder")


def write_index(folder: Path, kind: str, parts: Mapping[str, tuple[str | None, str | None]], **others: object) -> None:
    """model_index.json of a pipeline of class `kind`. parts: name -> (library, class); others: what else it says."""
    content: dict[str, object] = {"_class_name": kind, "_diffusers_version": metadata.version("diffusers")}
    content |= {name: list(part) for name, part in parts.items()} | others
    (folder / INDEX).write_text(json.dumps(dict(sorted(content.items())), indent=2) + "\n")


def write_part(part: Any, folder: Path) -> None:
    """A module or scheduler of diffusers, safetensors only, without the place that it was loaded from."""
    if hasattr(part, "state_dict"):
        part.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD)
    else:
        part.save_pretrained(folder)
    for name in _DESCRIPTIONS:
        if (folder / name).is_file():
            _copy_description(folder / name, folder / name)


def copy_pipeline(source: Path, folder: Path) -> None:
    """The parts that the model_index.json of `source` names, and its adapters, if it has some, into the empty `folder`.

    Raises ResourceError where that holds something, IntegrityError where a shard is missing.
    """
    begin(folder)
    _check(source, INDEX)
    index = read_json(source / INDEX)
    named = [name for name, part in index.items() if isinstance(part, list) and part[0] is not None]
    copy_parts(source, folder, named)
    (folder / INDEX).write_text(json.dumps(plain(INDEX, index), indent=2) + "\n", encoding="utf-8")
    if (source / ADAPTER).is_file():
        (folder / ADAPTER).parent.mkdir()
        shutil.copyfile(source / ADAPTER, folder / ADAPTER)


def copy_adapter(source: Path, folder: Path) -> None:
    """The adapters of the pipeline `source`, its scheduler and its licence, into the empty `folder`.

    Raises ResourceError where that holds something, IntegrityError where `source` has no adapters.
    """
    begin(folder)
    if not (source / ADAPTER).is_file():
        raise IntegrityError(str(source), f"has no {ADAPTER}", "Train the run again with policy.adaptation=lora")
    _check(source, ADAPTER)
    copy_parts(source, folder, ["scheduler"])
    shutil.copyfile(source / ADAPTER, folder / Path(ADAPTER).name)


def copy_parts(source: Path, folder: Path, parts: Sequence[str]) -> None:
    """Some parts of the pipeline `source`, and its licence, which goes where the weights go.

    Raises IntegrityError for what is not a regular file of `source`.
    """
    for name in parts:
        if not re.fullmatch(r"\w+", name):
            raise IntegrityError(
                str(source / INDEX), f"names a part {name!r}, which is not a valid folder name", _AGAIN
            )
        copy_part(source / name, folder / name)
    for name in _LICENCES:
        if (source / name).is_file():
            _check(source, name)
            shutil.copyfile(source / name, folder / name)


def copy_part(source: Path, folder: Path) -> None:
    """A part's descriptions and the weights that are loaded from it, under the names without a variant.

    Raises IntegrityError for a file that is not a regular one of the pipeline that the part is of.
    """
    folder.mkdir(parents=True)
    inside = [path.name for path in source.iterdir() if path.name in _DESCRIPTIONS or _WEIGHTS.fullmatch(path.name)]
    _check(source.parent, *(f"{source.name}/{name}" for name in inside))
    for name in _DESCRIPTIONS:
        if (source / name).is_file():
            _copy_description(source / name, folder / name)
    found = weights(source)
    if found is None:
        return
    stem, file, sharded = found
    if not sharded:
        shutil.copyfile(file, folder / f"{stem}.safetensors")
        return
    index = read_json(file)
    old = sorted(set(index["weight_map"].values()))
    new = {name: f"{stem}-{place:05}-of-{len(old):05}.safetensors" for place, name in enumerate(old, 1)}
    there = {path.name for path in source.iterdir() if path.is_file()}
    for name in old:
        if name not in there:
            raise IntegrityError(str(file), f"names {name}, which is not there", _AGAIN)
        _check(source.parent, f"{source.name}/{name}")
        shutil.copyfile(source / name, folder / new[name])
    index["weight_map"] = {tensor: new[name] for tensor, name in index["weight_map"].items()}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _check(folder: Path, *names: str) -> None:
    try:
        check(folder, *names)
    except Damaged as error:
        raise IntegrityError(str(folder), str(error), _AGAIN) from None


def weights(part: Path) -> tuple[str, Path, bool] | None:
    """(stem, file, whether it is an index of shards) of what is loaded from a part's folder, if it has weights.

    Those without a variant come first, then `fp16`, then the others by name. Of shards and a single file diffusers
    loads the shards, transformers the file.
    """
    found = [(match, path) for path in part.iterdir() if (match := _WEIGHTS.fullmatch(path.name))]

    def order(item: tuple[re.Match[str], Path]) -> tuple[bool, bool, str, bool]:
        match, _ = item
        variant = match["variant"] or match["other"] or ""
        return variant != "", variant != "fp16", variant, (match["stem"] == "model") == (match["index"] is not None)

    if not found:
        return None
    match, path = min(found, key=order)
    return match["stem"], path, match["index"] is not None


def _copy_description(source: Path, target: Path) -> None:
    """As it is; without the path of the machine that wrote it, if it has one, and with the precision of the run.

    transformers would load a text encoder in the precision of its file, which diffusers' networks, in float32, refuse.
    """
    if source.suffix == ".json":
        content = read_json(source)
        wanted = plain(source.name, content)
        if source.name == "config.json" and "model_type" in content:
            wanted["dtype" if "dtype" in content else "torch_dtype"] = "float32"
        if wanted != content:
            target.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
    if source != target:
        shutil.copyfile(source, target)

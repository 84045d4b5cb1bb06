"""Weight files by their names and headers: which of them a part is loaded from, and whether they are whole.

Nothing here reads a tensor: a safetensors file begins with a description of all that it holds.
"""

import math
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentac.system.modelfiles import LFS, Damaged, parse_json, pointer, read_json

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_QUANTISED = {"I8", "U8", "I16"}
_PREFERRED = ("", "fp32", "fp16", "bf16", "ema")
_LONGEST_HEADER = 8 * 2**20  # those of large models have 300 KB; the format itself allows 100 MB
_MOST_TENSORS = 20_000


@dataclass(frozen=True)
class Weights:
    """The files that one part is loaded from, by name within its folder.

    variant: "" or for example "fp16"; files: the weights; index: of sharded ones, which file holds which tensor.
    """

    stem: str
    variant: str
    files: tuple[str, ...]
    index: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.files if self.index is None else (self.index, *self.files)

    def plain(self, name: str) -> str:
        """The name of one of `names` without the variant."""
        if not self.variant:
            return name
        if name == self.index:
            return f"{self.stem}.safetensors.index.json"
        return re.sub(rf"\.{re.escape(self.variant)}(?=[.-])", "", name, count=1)


def choose(names: Collection[str], stem: str) -> Weights | None:
    """The weights to load out of a part's file `names`: without a variant if there are such.

    `stem` is `diffusion_pytorch_model` or `model`. None where there are no safetensors. Where there are both, a whole
    file and an index of shards, diffusers loads the shards and transformers the file, and so does latentac.
    """
    whole, indices, shards = _sorted_out(names, stem)
    variants = {*whole, *indices, *shards}
    order = [*(name for name in _PREFERRED if name in variants), *sorted(variants.difference(_PREFERRED))]
    for variant in order:
        if variant in whole and (variant not in indices or stem == "model"):
            return Weights(stem, variant, (whole[variant],))
        if variant in indices or variant in shards:
            files = tuple(sorted(shards.get(variant, [])))
            return Weights(stem, variant, files, indices.get(variant, _index_name(stem, variant)))
    return None


def _sorted_out(names: Collection[str], stem: str) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    """By variant: the whole file, the index, the shards."""
    whole: dict[str, str] = {}
    indices: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    stem = re.escape(stem)
    for name in names:
        if match := re.fullmatch(rf"{stem}(?:\.([\w-]+?))?-\d{{5}}-of-\d{{5}}(?:\.([\w-]+))?\.safetensors", name):
            shards.setdefault(match[1] or match[2] or "", []).append(name)
        elif match := re.fullmatch(rf"{stem}(?:\.([\w-]+))?\.safetensors", name):
            whole[match[1] or ""] = name
        elif match := re.fullmatch(rf"{stem}\.safetensors\.index(?:\.([\w-]+))?\.json", name):
            indices[match[1] or ""] = name
    return whole, indices, shards


def _index_name(stem: str, variant: str) -> str:
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def shapes(folder: Path, weights: Weights) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, of all files. Raises Damaged."""
    found: dict[str, tuple[int, ...]] = {}
    for name in weights.files:
        found |= header(folder / name)
    if weights.index is not None:
        listed = shard_map(folder, weights)
        lost = sorted(set(listed) - set(found))
        if lost:
            raise Damaged(f"{weights.index} names the tensor {lost[0]}, which {listed[lost[0]]} does not hold")
    return found


def shard_map(folder: Path, weights: Weights) -> dict[str, str]:
    """Tensor name -> file name, of an index whose files are all there. Raises Damaged."""
    index = folder / str(weights.index)
    listed = read_json(index).get("weight_map") if index.is_file() else None
    if not isinstance(listed, Mapping) or not all(isinstance(file, str) for file in listed.values()):
        problem = "is missing beside its shards" if not index.is_file() else "names no weights"
        raise Damaged(f"{index.name} {problem}")
    missing = sorted(set(listed.values()) - set(weights.files))
    if missing:
        raise Damaged(f"{index.name} names {', '.join(missing[:3])}, which {_are(missing)} not there")
    return dict(listed)


def _are(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, of a safetensors file that has the length that its header asks for. Raises Damaged."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{file.name} is not a regular file")
    size = status.st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == LFS[:8]:
            raise Damaged(pointer(file.name))
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise Damaged(f"{file.name} is not a safetensors file, or was cut off ({size:,} bytes)")
        described = stream.read(length)
    try:
        read = parse_json(described, "the description")
    except Damaged as error:
        raise Damaged(f"{file.name} has a damaged header ({error})") from None
    try:
        entries = {name: entry for name, entry in read.items() if name != "__metadata__"}
        if len(entries) > _MOST_TENSORS:
            raise Damaged(f"{file.name} describes {len(entries):,} tensors, and at most {_MOST_TENSORS:,} are read")
        found = {name: _shape(name, entry, file.name) for name, entry in entries.items()}
        places = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{file.name} has a damaged header") from None
    end = 0
    for start, stop in places:  # one after another: tensors that share bytes would take more memory than the file has
        if start != end:
            raise Damaged(f"{file.name} has a damaged header: its tensors do not lie one after another")
        end = stop
    if 8 + length + end != size:
        raise Damaged(f"{file.name} has {size:,} bytes, and its header asks for {8 + length + end:,}: it was cut off")
    return found


def _shape(name: str, entry: Mapping[str, Any], file: str) -> tuple[int, ...]:
    kind, sizes = str(entry["dtype"]), tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*sizes, start, end)):
        raise Damaged(f"{file} has a damaged header ({name})")
    if kind not in _SIZES or (kind in _QUANTISED and name.endswith("weight")):
        raise Damaged(f"{file} holds quantised weights ({name} is {kind}), which cannot be trained")
    if math.prod(sizes) * _SIZES[kind] != end - start:
        raise Damaged(f"{file} has a damaged header ({name})")
    return sizes

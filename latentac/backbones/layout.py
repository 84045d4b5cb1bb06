"""The folder layout of a diffusers pipeline as data: its parts, the classes that each may have, and its files.

A backbone's class names its layout in an attribute `layout`; `prepare` reads, fetches and copies by it. One without is
copied whole and only rehearsed.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentac.backbones.vocabulary import ModelType
from latentac.backbones.weights import Weights, choose, shard_map
from latentac.system.modelfiles import ADAPTERS, faults, plain, read_json

INDEX = "model_index.json"
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
_TOKENIZERS = {
    "clip": _TOKENIZER_FILES | {"vocab.json", "merges.txt"},
    "t5": _TOKENIZER_FILES,
    "qwen3": _TOKENIZER_FILES - {"tokenizer.json"} | {"vocab.json", "merges.txt"},
}
"""tokenizer.json of Qwen holds the other two again, in 11 MB, with patterns beside them."""
_MODEL_TYPES: tuple[tuple[str, ModelType], ...] = (("T5", "t5"), ("Qwen", "qwen3"))
_ANYTHING_SAFE = (".safetensors", ".json", ".txt", ".model")
_TEXTS = ("_class_name", "_diffusers_version")  # of model_index.json
ADAPTER = (
    "is an adapter of peft, whose base model lies elsewhere",
    "Use the model with its adapter merged (merge_and_unload of peft), without this file",
)
"""What is wrong with one of ADAPTERS, and the remedy."""


Rule = Callable[[Mapping[str, Mapping[str, Any]]], Iterable[tuple[str, str, str]]]


@dataclass(frozen=True)
class Part:
    """name: of its folder and in model_index.json, "." for a model that is no part of a pipeline; classes: that can be
    loaded; kind: what is in the folder, `model` for any other one of transformers."""

    name: str
    kind: Literal["network", "text_encoder", "autoencoder", "tokenizer", "scheduler", "model"]
    classes: tuple[str, ...]

    @property
    def label(self) -> str:
        """For messages."""
        return self.classes[0] if self.name == "." else self.name

    @property
    def stem(self) -> str | None:
        """What the names of its weight files begin with."""
        if self.kind in {"network", "autoencoder"}:
            return "diffusion_pytorch_model"
        return "model" if self.kind in {"text_encoder", "model"} else None

    @property
    def model_type(self) -> ModelType:
        """The text encoder that it is, or is the tokenizer of."""
        return next((kind for begin, kind in _MODEL_TYPES if self.classes[0].startswith(begin)), "clip")

    @property
    def library(self) -> str:
        """The one that model_index.json must name: any other is code of the folder's own."""
        return "transformers" if self.kind in {"text_encoder", "tokenizer", "model"} else "diffusers"

    @property
    def configuration(self) -> str | None:
        """The JSON file that says how it is built."""
        return {"scheduler": "scheduler_config.json", "tokenizer": None}.get(self.kind, "config.json")

    def weights(self, names: Collection[str]) -> Weights | None:
        """Which of its files, by name, it is loaded from."""
        return None if self.stem is None else choose(names, self.stem)

    def files(self, names: Collection[str]) -> list[str]:
        """Those of the folder's file `names` that are used."""
        wanted = {str(self.configuration)}
        if self.kind == "tokenizer":
            wanted = _TOKENIZERS[self.model_type]
        weights = self.weights(names)
        return [*sorted(wanted.intersection(names)), *(weights.names if weights else ())]


@dataclass(frozen=True)
class Sizes:
    """What a network computes for one image, counted from the configurations of its pipeline.

    latent: numbers of the latents     image: numbers of the image     text: numbers of a prompt's conditioning
    units: tokens times width, summed over the network's layers; saved: tensors of that size that a layer keeps for the
    gradient     decoder: numbers of the decoder's largest feature map
    taps: numbers of the feature maps that a critic may keep, of `channels` channels
    """

    latent: int = 0
    image: int = 0
    text: int = 0
    units: int = 0
    saved: int = 28
    decoder: int = 0
    taps: int = 0
    channels: int = 0


def decoded(vae: Mapping[str, Any], cells: int) -> dict[str, int]:
    """`image` and `decoder` of `Sizes` for an AutoencoderKL and latents of so many cells."""
    levels = vae.get("block_out_channels", [64])
    pixels = cells * 4 ** (len(levels) - 1)
    return {"image": 3 * pixels, "decoder": pixels * levels[min(1, len(levels) - 1)]}


@dataclass(frozen=True)
class Layout:
    """pipeline: the class that model_index.json must name; network: the part that is trained; adapted: what the names
    of its layers that get adapters end in; rules: the parts that a rule is about, and what it finds in their
    configurations, by part: which part, what is wrong, the remedy; absent: parts that an export writes as null; flags:
    what its model_index.json says besides; sizes: counts from the parts' configurations and the (height, width) of the
    latents, which is None for the configuration's own."""

    pipeline: str
    network: str
    adapted: tuple[str, ...]
    parts: tuple[Part, ...]
    rules: tuple[tuple[tuple[str, ...], Rule], ...]
    absent: tuple[str, ...] = ()
    flags: Mapping[str, object] = field(default_factory=dict)
    sizes: Callable[[Mapping[str, Mapping[str, Any]], tuple[int, int] | None], Sizes] = lambda found, size: Sizes()

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def files(self, names: Iterable[str]) -> list[str]:
        """Those of a folder's files, by relative name, that are used: no other part, and no other precision."""
        within: dict[str, set[str]] = {}
        for name in names:
            folder, _, file = name.rpartition("/")
            within.setdefault(folder, set()).add(file)
        used = [INDEX] if INDEX in within.get("", ()) else []
        return used + [f"{part.name}/{name}" for part in self.parts for name in part.files(within.get(part.name, ()))]


def listing(folder: Path) -> list[str]:
    """Relative names of the files in `folder` that are neither hidden nor in a hidden folder, sorted."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def used(folder: Path, layout: Layout | None) -> list[str]:
    """Relative names of the files of the pipeline in `folder` that are used. A part's folder may be a link.

    layout: None for a backbone that has none: all that could be weights, descriptions, and vocabularies.
    """
    if layout is None:
        return [name for name in listing(folder) if name.endswith(_ANYTHING_SAFE)]
    names = [INDEX] if (folder / INDEX).is_file() else []
    for part in layout.parts:
        within = [path.name for path in (folder / part.name).glob("[!.]*") if path.is_file()]
        names += [f"{part.name}/{name}" for name in part.files(within)]
    return names


def unreadable(folder: Path, layout: Layout) -> Iterator[tuple[str, str, str]]:
    """What of the pipeline in `folder` must not be opened: name, what is wrong, the remedy. Before anything is read."""
    names = [INDEX] if (folder / INDEX).is_symlink() or (folder / INDEX).exists() else []
    for part in layout.parts:
        try:
            within = [path.name for path in (folder / part.name).iterdir()]
        except OSError:
            continue  # it is missing, or no folder: reported where the part is checked
        names += [f"{part.name}/{name}" for name in part.files(within)]
        for name in sorted(set(ADAPTERS) & set(within)):
            yield f"{part.name}/{name}", *ADAPTER
    yield from faults(folder, names)


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)


def copy(source: Path, folder: Path, layout: Layout | None, put: Callable[[Path, Path], None] = _copy) -> None:
    """The files of `source` that are used, in `folder`, weights under their plain names; what is not copied is null in
    model_index.json, so that the folder is a whole pipeline for diffusers too. Of the descriptions nothing is kept that
    names code or places on another machine. put: makes a large file in the new place."""
    if layout is None:
        for name in used(source, None):
            put(source / name, folder / name)
        return
    _write(folder / INDEX, _reduced(read_json(source / INDEX), layout))
    for part in layout.parts:
        place(source / part.name, folder / part.name, part, put)


def place(source: Path, folder: Path, part: Part, put: Callable[[Path, Path], None]) -> None:
    """The files of a part that are used, under their plain names. put: makes a large file in the new place."""
    within = [path.name for path in source.glob("[!.]*") if path.is_file()]
    weights = part.weights(within)
    for name in part.files(within):
        if weights is not None and name == weights.index:
            _write(folder / weights.plain(name), _plain_index(source / name, weights))
        elif weights is not None and name in weights.names:
            put(source / name, folder / weights.plain(name))
        elif name.endswith(".json"):
            _write(folder / name, plain(name, read_json(source / name)))
        else:
            put(source / name, folder / name)


def _reduced(index: Mapping[str, object], layout: Layout) -> dict[str, object]:
    kept = {part.name for part in layout.parts}
    reduced = {
        name: [None, None] if name in layout.absent or (name not in kept and isinstance(entry, list)) else entry
        for name, entry in index.items()
        if not isinstance(entry, str | dict) or name in _TEXTS
    }
    return reduced | ({"requires_safety_checker": False} if "requires_safety_checker" in index else {})


def _plain_index(file: Path, weights: Weights) -> dict[str, object]:
    listed = shard_map(file.parent, weights)
    return read_json(file) | {"weight_map": {tensor: weights.plain(name) for tensor, name in listed.items()}}


def _write(file: Path, content: Mapping[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

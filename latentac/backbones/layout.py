"""The folder layout of a diffusers pipeline as data: its parts, the classes that each may have, and its files.

A backbone's class names its layout in an attribute `layout`; `prepare` reads, fetches and copies by it. One without is
copied whole and only rehearsed.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentac.backbones.weights import Weights, choose, read_json, shard_map

INDEX = "model_index.json"
_TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
}
_ANYTHING_SAFE = (".safetensors", ".json", ".txt", ".model")


Rule = Callable[[Mapping[str, Mapping[str, Any]]], Iterable[tuple[str, str, str]]]


@dataclass(frozen=True)
class Part:
    """name: of its folder and in model_index.json; classes: that the backbone can load; kind: what is in the folder."""

    name: str
    kind: Literal["network", "text_encoder", "autoencoder", "tokenizer", "scheduler"]
    classes: tuple[str, ...]

    @property
    def stem(self) -> str | None:
        """What the names of its weight files begin with."""
        if self.kind in {"network", "autoencoder"}:
            return "diffusion_pytorch_model"
        return "model" if self.kind == "text_encoder" else None

    @property
    def configuration(self) -> str | None:
        """The JSON file that says how it is built."""
        return {"scheduler": "scheduler_config.json", "tokenizer": None}.get(self.kind, "config.json")

    def weights(self, names: Collection[str]) -> Weights | None:
        """Which of its files, by name, it is loaded from."""
        return None if self.stem is None else choose(names, self.stem)

    def files(self, names: Collection[str]) -> list[str]:
        """Those of the folder's file `names` that are used."""
        wanted = _TOKENIZER_FILES if self.kind == "tokenizer" else {str(self.configuration)}
        weights = self.weights(names)
        return [*sorted(wanted.intersection(names)), *(weights.names if weights else ())]


@dataclass(frozen=True)
class Layout:
    """pipeline: the class that model_index.json must name; network: the part that is trained; adapted: what the names
    of its layers that get adapters end in; rules: the parts that a rule is about, and what it finds in their
    configurations, by part: which part, what is wrong, the remedy."""

    pipeline: str
    network: str
    adapted: tuple[str, ...]
    parts: tuple[Part, ...]
    rules: tuple[tuple[tuple[str, ...], Rule], ...]

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def files(self, names: Iterable[str]) -> list[str]:
        """Those of a folder's files, by relative name, that are used: no T5, no safety checker, no other precision."""
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


def used(folder: Path, layout: Layout) -> list[str]:
    """Relative names of the files of the pipeline in `folder` that are used. A part's folder may be a link."""
    names = [INDEX] if (folder / INDEX).is_file() else []
    for part in layout.parts:
        within = [path.name for path in (folder / part.name).glob("[!.]*") if path.is_file()]
        names += [f"{part.name}/{name}" for name in part.files(within)]
    return names


def outside(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the files that are links out of `folder`; a hub cache's own links to its blobs are not."""
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append((folder.parent.parent / "blobs").resolve())
    return [name for name in names if not any((folder / name).resolve().is_relative_to(root) for root in roots)]


def copy(source: Path, folder: Path, layout: Layout | None) -> None:
    """The files of `source` that are used, in `folder`, weights under their plain names; what is not copied is null in
    model_index.json, so that the folder is a whole pipeline for diffusers too."""
    if layout is None:
        for name in (name for name in listing(source) if name.endswith(_ANYTHING_SAFE)):
            _copy(source / name, folder / name)
        return
    _write(folder / INDEX, _reduced(read_json(source / INDEX), layout))
    names = used(source, layout)
    for part in layout.parts:
        within = [name.removeprefix(f"{part.name}/") for name in names if name.startswith(f"{part.name}/")]
        weights = part.weights(within)
        for name in within:
            if weights is None or name not in weights.names:
                _copy(source / part.name / name, folder / part.name / name)
            elif name == weights.index:
                _write(folder / part.name / weights.plain(name), _plain_index(source / part.name / name, weights))
            else:
                _copy(source / part.name / name, folder / part.name / weights.plain(name))


def _reduced(index: Mapping[str, object], layout: Layout) -> dict[str, object]:
    kept = {part.name for part in layout.parts}
    reduced = {
        name: [None, None] if name not in kept and (entry is None or isinstance(entry, list)) else entry
        for name, entry in index.items()
    }
    return reduced | ({"requires_safety_checker": False} if "requires_safety_checker" in index else {})


def _plain_index(file: Path, weights: Weights) -> dict[str, object]:
    listed = shard_map(file.parent, weights)
    return read_json(file) | {"weight_map": {tensor: weights.plain(name) for tensor, name in listed.items()}}


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)


def _write(file: Path, content: Mapping[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")

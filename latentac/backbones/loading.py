"""A part of a pipeline as a module on its device, with every weight from the folder.

The libraries look for more in a folder than a part has: adapters that name a base elsewhere, templates, pickles. So
they never see it: they are given a folder of links to the files that the part consists of, and of its descriptions
without what names code or other places.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from latentac.backbones.bounds import beyond
from latentac.backbones.inspection import weights_of
from latentac.backbones.layout import Part, place
from latentac.backbones.vocabulary import TOKENIZER, reduced
from latentac.backbones.weights import shapes
from latentac.system.errors import ConfigError, Problem
from latentac.system.modelfiles import ADAPTERS, Damaged, check, read_json

_SPARE = 2**16  # numbers that older versions did not keep, such as a table of positions


def load(kind: Any, folder: Path, part: Part, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """`kind.from_pretrained` in `dtype`, frozen and in eval mode; from a variant where there is nothing else.

    Raises ConfigError where weights are missing or not of the shape that the configuration asks for: the libraries
    would draw those at random.
    """
    diffusers_logging.disable_progress_bar()  # loading takes milliseconds, or has a bar of its own in `prepare`
    transformers_logging.disable_progress_bar()
    with _errors(folder, part), _view(folder, part) as view:
        _check_size(kind, view, folder, part)
        module, info = kind.from_pretrained(
            view, use_safetensors=True, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    wrong = {
        "lacks": _names(info["missing_keys"]),
        "holds in another shape": _names(info.get("mismatched_keys", ())),
        # A file may hold more than what is read of it, such as CLIP's vision half beside a text encoder.
        "has beside the weights of its configuration": []
        if part.kind in {"text_encoder", "model"}
        else _names(info["unexpected_keys"]),
    }
    problems = [
        Problem(
            "backbone.source",
            str(folder),
            f"{part.label}: its weights file {what} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}",
            f"Use the weights that belong to {part.name}/config.json",
        )
        for what, names in wrong.items()
        if names
    ]
    if problems:
        raise ConfigError(problems)
    return module.eval().requires_grad_(False).to(device)


def load_tokenizer(kind: Any, folder: Path, part: Part) -> Any:
    """`kind.from_pretrained` of a tokenizer. Raises ConfigError."""
    with _errors(folder, part), _view(folder, part) as view:
        if (view / TOKENIZER).is_file():
            described = reduced(read_json(view / TOKENIZER), part.model_type)
            (view / TOKENIZER).write_text(json.dumps(described), encoding="utf-8")
        return kind.from_pretrained(view, local_files_only=True, trust_remote_code=False)


@contextmanager
def _view(folder: Path, part: Part) -> Iterator[Path]:
    """A folder with what the part consists of and nothing else. Raises Damaged."""
    source = folder / part.name
    for name in ADAPTERS:
        if (source / name).exists():
            raise Damaged(f"{name} is an adapter of peft, whose base model lies elsewhere")
    check(folder, *(f"{part.name}/{name}" for name in part.files([path.name for path in source.iterdir()])))
    with tempfile.TemporaryDirectory(prefix="latentac-part-") as temporary:
        view = Path(temporary)
        place(source, view, part, lambda file, link: link.symlink_to(file.resolve()))
        yield view


@contextmanager
def _errors(folder: Path, part: Part) -> Iterator[None]:
    """Whatever a library raises of a folder, as ConfigError."""
    try:
        yield
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        remedy = f"Use a complete {part.label} whose files belong to each other"
        problem = f"{part.label}: cannot be loaded ({first})"
        raise ConfigError([Problem("backbone.source", str(folder), problem, remedy)]) from error


def _check_size(kind: Any, view: Path, folder: Path, part: Part) -> None:
    """Raises ConfigError where the configuration asks for more numbers than the weights hold: whatever is missing would
    be allocated before it is missed."""
    described = read_json(view / "config.json")
    wrong = next(beyond(described), None)
    if wrong is not None:
        raise Damaged(f"config.json: {wrong}")
    chosen = weights_of(folder, part)
    if chosen is None:
        raise Damaged("has no safetensors weights")
    held = sum(map(prod, shapes(folder / part.name, chosen).values()))
    with torch.device("meta"):  # shapes without memory
        empty = kind.from_config(described) if hasattr(kind, "from_config") else _configured(kind, view)
    different = {id(tensor): tensor.numel() for tensor in empty.state_dict(keep_vars=True).values()}  # some are shared
    asked = sum(different.values())
    if asked > held + _SPARE:
        problem = f"{part.label}: its config.json asks for {asked:,} numbers, and its weights file has {held:,}"
        remedy = f"Use the weights that belong to {part.name}/config.json"
        raise ConfigError([Problem("backbone.source", str(folder), problem, remedy)])


def _configured(kind: Any, view: Path) -> Any:
    """A model of transformers as its configuration says."""
    return kind(kind.config_class.from_pretrained(view, local_files_only=True))


def _names(keys: Any) -> list[str]:
    """Sorted names of weights; a mismatch is (name, shape, shape). Integers of older versions are not weights."""
    names = [key if isinstance(key, str) else key[0] for key in keys]
    return sorted(name for name in names if not name.endswith("position_ids"))

"""The licence of a model as its own folder states it."""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from latentac.config.fields import read_yaml
from latentac.system.modelfiles import Damaged, check, read_bytes

NOT_STATED = "not stated"
CARD = "README.md"
_TEXTS = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)([-_]\w+)*(\.(md|txt|rst))?", re.IGNORECASE)
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_MOST_SHOWN = 100
PATTERNS = (CARD, "LICENSE*", "LICENCE*", "License*", "license*", "COPYING*", "NOTICE*")
"""What a hub is asked for."""


def is_about(name: str) -> bool:
    """Whether a file of a folder says where its model comes from and what may be done with it."""
    return name in {CARD, "conversion.json"} or _TEXTS.fullmatch(name) is not None


def licence_of(folder: Path) -> str:
    """What the metadata of the model card say, else the first line of a licence's text, else NOT_STATED."""
    there = sorted(path.name for path in folder.iterdir() if is_about(path.name))
    stated = _stated(folder) if CARD in there else ""
    return stated or next(filter(None, (_first_line(folder, name) for name in _licences(there))), NOT_STATED)


def _stated(folder: Path) -> str:
    """Of the model card's metadata: `license`, and the name and address of one that the hub has no word for."""
    found = _FRONT.match(_text(folder, CARD))
    if found is None:
        return ""
    try:
        metadata = read_yaml(found[1])
    except yaml.YAMLError:
        return ""
    if not isinstance(metadata, dict):
        return ""
    words = [metadata.get(field) for field in ("license", "license_name", "license_link")]
    words = [", ".join(map(str, word)) if isinstance(word, list) else word for word in words]
    first, *more = [_shortened(str(word)) for word in words if word] or [""]
    return f"{first} ({', '.join(more)})" if more else first


def _licences(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.upper().startswith(("LICEN", "COPYING"))]


def _first_line(folder: Path, name: str) -> str:
    line = next((line.strip(" #*=-") for line in _text(folder, name).splitlines() if line.strip(" #*=-")), "")
    return f"{_shortened(line)} ({name})" if line else ""


def _text(folder: Path, name: str) -> str:
    """Of a regular file of bounded size in the folder, else ""."""
    try:
        check(folder, name)
        return read_bytes(folder / name).decode(errors="replace").lstrip("\ufeff")
    except (Damaged, OSError):
        return ""


def _shortened(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _MOST_SHOWN else f"{plain[:_MOST_SHOWN]}..."

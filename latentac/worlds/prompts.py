"""Prompt sets: what is trained on, what is held out, and fair draws from either."""

import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from latentac.config.schema import Prompts, Serving, suggestion
from latentac.system.errors import ConfigError, Problem
from latentac.worlds import animals
from latentac.worlds.promptfiles import READERS, SPLITS, Flaw, Row, read_file

_PROBLEMS = 20  # reported together; a longer list helps nobody
_STEMS = {"train": ("train",), "held_out": ("held_out", "test", "val", "validation")}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One text and the category that it counts for.

    metadata: JSON that came with it, for the rewards that ask for it (GenEval's `include`, for example); nobody changes
    it. Equal prompts have equal metadata; the hash is of text and category alone.
    """

    text: str
    category: str = "all"
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """What `load_prompts` reads as this prompt again."""
        known = {"text": self.text, "category": self.category}
        return {**known, "metadata": dict(self.metadata)} if self.metadata else known


@dataclass(frozen=True)
class PromptSet:
    """Reinforcement learning sees `train` alone; every reported number is of `held_out`.

    places: text -> where it stands (`prompts.jsonl, line 3`), for messages; a built-in set has none.
    """

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> str:
        content = {"train": [p.to_dict() for p in self.train], "held_out": [p.to_dict() for p in self.held_out]}
        return json.dumps(content, indent=0) + "\n"


def load_prompts(source: str | Prompts) -> PromptSet:
    """The prompts that the settings name; a text is their `source`, with the defaults of the rest.

    `builtin:shapes`, `builtin:words` or `builtin:animals`; a file (formats: `latentac.worlds.promptfiles`); or a folder
    with train.* and held_out.* (or test.*, val.*). Where there is one list, `held_out_fraction` of it is held out, by a
    hash of the text alone. A prompt that is repeated within a list, with the same category and metadata, counts once.
    Raises ConfigError with the problems of all files together: unreadable, empty or malformed ones, and a prompt that
    is in both splits.
    """
    settings = Prompts(source=source) if isinstance(source, str) else source
    if settings.source.startswith("builtin:") and not (settings.train or settings.held_out):
        return _builtin(settings.source)
    rows, flaws = _read(settings)
    lists = {split: _once(found, split) for split, found in rows.items()}
    for split, found in lists.items():
        if not found and not flaws:
            where = ", ".join(part for part in (_named(settings), split) if part)
            flaws.append(Flaw(where, "holds no prompts", "Write at least one into it"))
    if "" in lists and not flaws:
        lists, flaws = _divided(lists[""], settings)
    flaws += _shared(lists)
    if flaws:
        raise ConfigError(_problems(settings, flaws))
    chosen = {split: tuple(Prompt(row.text, row.category, row.metadata) for row in lists[split]) for split in SPLITS}
    places = {row.text: row.where for split in SPLITS for row in lists[split]}
    return PromptSet(chosen["train"], chosen["held_out"], places)


def within(prompts: Sequence[Prompt], limits: Serving, truncated: Iterable[int]) -> tuple[Prompt, ...]:
    """Those that an endpoint of these limits draws. truncated: the indices of those that the text encoder cuts."""
    refused = set[int]() if limits.allow_truncation else set(truncated)
    return tuple(
        prompt
        for index, prompt in enumerate(prompts)
        if index not in refused and len(prompt.text) <= limits.max_prompt_characters
    )


def balanced(prompts: Sequence[Prompt], count: int, seed: int, *purpose: object) -> list[int]:
    """`count` indices into `prompts`, the categories in turn, without repeats until a category is used up.

    A uniform draw would show little but the largest category. The draw depends on `seed` and `purpose` alone.
    """
    import torch  # here: who only reads prompts does without it

    from latentac.method.randomness import generator_for

    generator = generator_for(seed, "prompts", *purpose)
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt.category, []).append(index)
    columns = []
    for category in sorted(members):
        mine, drawn = members[category], list[int]()
        while len(drawn) * len(members) < count:
            drawn += [mine[place] for place in torch.randperm(len(mine), generator=generator).tolist()]
        columns.append(drawn)
    return [columns[slot % len(columns)][slot // len(columns)] for slot in range(count)]


def _builtin(source: str) -> PromptSet:
    if source == "builtin:animals":
        train, held_out = (tuple(Prompt(text) for text in animals.prompts(split)) for split in SPLITS)
        return PromptSet(train, held_out)
    worlds = {"builtin:shapes": "latentac.worlds.shapes.captions", "builtin:words": "latentac.worlds.words.captions"}
    if source not in worlds:
        remedy = f"{suggestion(source, [*worlds, 'builtin:animals'])} Your own: a file or a folder."
        raise ConfigError([Problem("prompts.source", source, "is not a built-in prompt set", remedy)])
    captions = import_module(worlds[source])
    train, held_out = (
        tuple(Prompt(prompt.text, prompt.category) for prompt in captions.prompts(split)) for split in SPLITS
    )
    return PromptSet(train, held_out)


def _read(settings: Prompts) -> tuple[dict[str, list[Row]], list[Flaw]]:
    """The rows by split, those of a single list under "", and what is wrong."""
    if settings.train or settings.held_out:
        named = {"train": settings.train, "held_out": settings.held_out}
        files = {split: Path(os.path.expanduser(name)) for split, name in named.items() if name}
    else:
        place = Path(os.path.expanduser(settings.source))  # not pathlib: it raises where a name is too long, or no home
        if not os.path.isdir(place):
            return read_file(place)
        files, flaws = _in_folder(place)
        if flaws:
            return {}, flaws
    if "train" not in files:
        return {}, [
            Flaw(str(files["held_out"]), "is held out, and nothing is left to train on", "Set prompts.train too")
        ]
    rows, flaws = {}, []
    for split, file in files.items():
        found, wrong = read_file(file)
        flaws += wrong
        if found.keys() - {""}:
            flaws.append(Flaw(str(file), f"holds two lists, and is to be {split} alone", "Name it as prompts.source"))
        elif found:
            rows[split if len(files) > 1 else ""] = found[""]
    return rows, flaws


def _in_folder(folder: Path) -> tuple[dict[str, Path], list[Flaw]]:
    files: dict[str, Path] = {}
    flaws: list[Flaw] = []
    try:
        there = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        return {}, [Flaw(str(folder), problem, "Give this user the right to read it")]
    for split, stems in _STEMS.items():
        names = {f"{stem}{ending}" for stem in stems for ending in ("", "_metadata")}
        found = [path for path in there if path.stem in names]
        if len(found) > 1:
            problem = f"has more than one file for {split}: {', '.join(path.name for path in found)}"
            flaws.append(Flaw(str(folder), problem, "Name the two files as prompts.train and prompts.held_out"))
        elif found:
            files[split] = found[0]
    if "train" not in files:
        problem = f"has no train.*: {', '.join(path.name for path in there[:8]) or 'nothing that could be prompts'}"
        remedy = f"Put train and held_out there, each ending in one of {', '.join(READERS)}"
        flaws.append(Flaw(str(folder), problem, remedy))
    return files, flaws


def _once(rows: Sequence[Row], split: str) -> list[Row]:
    """Each prompt once; the same text with another category or other metadata is another prompt."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        metadata = json.dumps(row.metadata, sort_keys=True) if row.metadata else ""
        found.setdefault((row.text, row.category, metadata), row)
    if len(found) < len(rows):
        _log.info("prompts%s: %d are repeated and count once", split and f" ({split})", len(rows) - len(found))
    return list(found.values())


def _key(text: str) -> str:
    """The same for what a text encoder, which folds case and white space, may not tell apart."""
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def _divided(rows: Sequence[Row], settings: Prompts) -> tuple[dict[str, list[Row]], list[Flaw]]:
    """A share of the texts is held out: those whose sha256 is smallest, with all prompts of that text."""

    def rank(key: str) -> str:
        return hashlib.sha256(f"{settings.split_seed} {key}".encode()).hexdigest()

    keys = sorted({_key(row.text) for row in rows}, key=rank)
    if len(keys) < 2:
        problem = "holds one prompt, so that nothing is left to hold out"
        return {}, [Flaw(_named(settings), problem, "Write more prompts, or a second list")]
    count = min(max(1, round(settings.held_out_fraction * len(keys))), len(keys) - 1)
    chosen = set(keys[:count])
    lists: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        lists["held_out" if _key(row.text) in chosen else "train"].append(row)
    counts = len(lists["held_out"]), len(rows), settings.held_out_fraction
    _log.info("prompts: %d of %d are held out (prompts.held_out_fraction = %g)", *counts)
    return lists, []


def _shared(lists: Mapping[str, Sequence[Row]]) -> list[Flaw]:
    """Prompts of `held_out` that are in `train` too."""
    first: dict[str, Row] = {}
    for row in lists.get("train", ()):
        first.setdefault(_key(row.text), row)
    found = [(row, first[_key(row.text)]) for row in lists.get("held_out", ()) if _key(row.text) in first]
    remedy = "Take it out of one of them: what was trained on says nothing about new prompts"
    return [Flaw(row.where, f"{row.text[:80]!r} is in both splits: {other.where}", remedy) for row, other in found]


def _named(settings: Prompts) -> str:
    return settings.train or settings.source


def _problems(settings: Prompts, flaws: Sequence[Flaw]) -> list[Problem]:
    path = "prompts.train, prompts.held_out" if settings.train or settings.held_out else "prompts.source"
    problems = [Problem(path, flaw.where, flaw.problem, f"{flaw.remedy}.") for flaw in flaws[:_PROBLEMS]]
    more = len(flaws) - _PROBLEMS
    if more > 0:
        problems.append(Problem(path, _named(settings), f"has {more} more problems", "Correct these first."))
    return problems

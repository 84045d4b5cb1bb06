"""Prompt sets: what is trained on, what is held out, and fair draws from either."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from latentac.errors import ConfigError, Problem


@dataclass(frozen=True)
class Prompt:
    """One text, the category that it counts for, and what else the file says of it, for rewards."""

    text: str
    category: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PromptSet:
    """Reinforcement learning sees `train` alone; every reported number is of `held_out`."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]

    def to_json(self) -> str:
        content = {"train": [asdict(p) for p in self.train], "held_out": [asdict(p) for p in self.held_out]}
        return json.dumps(content, indent=0) + "\n"


def load_prompts(source: str) -> PromptSet:
    """`builtin:shapes`, or the path of a JSON file {"train": [{"text", "category"}], "held_out": [...]}.

    Raises ConfigError for an unknown name, an unreadable file, an empty split, or a prompt that is in both.
    """
    if source.startswith("builtin:"):
        return _builtin(source)
    try:
        content = json.loads(Path(source).read_text())
        train, held_out = (tuple(_prompt(entry) for entry in content[split]) for split in ("train", "held_out"))
    except OSError as error:
        raise _refused(source, f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _refused(source, f"does not hold prompts: {type(error).__name__} {error}") from error
    if not train or not held_out:
        raise _refused(source, "has an empty split")
    shared = {prompt.text for prompt in train} & {prompt.text for prompt in held_out}
    if shared:
        raise _refused(source, f"has {min(shared)!r} in both splits")
    return PromptSet(train, held_out)


def balanced(prompts: Sequence[Prompt], count: int, seed: int, *purpose: object) -> list[int]:
    """`count` indices into `prompts`, the categories in turn, without repeats until a category is used up.

    A uniform draw would show little but the largest category. The draw depends on `seed` and `purpose` alone.
    """
    import torch  # here: who only reads prompts does without it

    from latentac.distributed import generator_for

    generator = generator_for(seed, "prompts", *purpose)
    categories = sorted({prompt.category for prompt in prompts})
    columns = []
    for category in categories:
        members = torch.tensor([index for index, prompt in enumerate(prompts) if prompt.category == category])
        drawn: list[int] = []
        while len(drawn) * len(categories) < count:
            drawn += members[torch.randperm(len(members), generator=generator)].tolist()
        columns.append(drawn)
    return [columns[slot % len(categories)][slot // len(categories)] for slot in range(count)]


def _builtin(source: str) -> PromptSet:
    if source != "builtin:shapes":
        raise _refused(source, "is no built-in prompt set")
    from latentac.shapes import captions

    train, held_out = (
        tuple(Prompt(prompt.text, prompt.category) for prompt in captions.prompts(split)) for split in captions.SPLITS
    )
    return PromptSet(train, held_out)


def _prompt(entry: Any) -> Prompt:
    return Prompt(str(entry["text"]), str(entry.get("category", "all")), entry.get("metadata", {}))


def _refused(source: str, problem: str) -> ConfigError:
    remedy = 'Use builtin:shapes, or a JSON file {"train": [{"text", "category"}], "held_out": [...]}'
    return ConfigError([Problem("prompts.source", source, problem, remedy)])

"""The language of the embedded world: what can be asked for, its wording, and which half of it is held out.

    category     example                              combinations
    one_object   a red circle                         6 colours x 3 shapes
    counting     three blue squares                   2, 3 or 4 of one kind
    relation     a red circle left of a green square  two kinds of different colours, 4 relations
    two_objects  a red circle and a blue triangle     two kinds of different colours, anywhere

A combination is what an image shows, not how it is said: `A left of B` and `B right of A` are one combination, and so
are `A and B` and `B and A`. The split is by combination: no held-out image is asked for in training in other words.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
SHAPES = ("circle", "square", "triangle")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = ("one_object", "counting", "relation", "two_objects")
SPLITS = ("train", "held_out")
HELD_OUT_FRACTION = 0.25
_SALT = 29  # the first for which the few held-out single and counted objects spread over colours, shapes and numbers

_OPPOSITE = {"right of": "left of", "below": "above"}


@dataclass(frozen=True, order=True)
class Kind:
    """What an object looks like: one of COLOURS and one of SHAPES."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Specification:
    """What an image must show and nothing else: `count` objects of each of `kinds`; the first in `relation` to the
    second."""

    category: str
    kinds: tuple[Kind, ...]
    count: int = 1
    relation: str | None = None

    @property
    def caption(self) -> str:
        """Plain English, and the inverse of `parse_caption`."""
        first, last = self.kinds[0], self.kinds[-1]
        if self.category == "one_object":
            return f"a {first}"
        if self.category == "counting":
            number = next(word for word, count in NUMBERS.items() if count == self.count)
            return f"{number} {first}s"
        return f"a {first} {self.relation or 'and'} a {last}"

    @property
    def combination(self) -> str:
        """The same text for every wording of the same image."""
        kinds, relation = self.kinds, self.relation
        if self.category == "two_objects":
            kinds = tuple(sorted(kinds))
        if relation in _OPPOSITE:
            kinds, relation = kinds[::-1], _OPPOSITE[relation]
        return f"{self.category}: {self.count} {relation or '-'} {', '.join(map(str, kinds))}"


@dataclass(frozen=True)
class Prompt:
    """One caption; `category` is one of CATEGORIES, `split` one of SPLITS."""

    text: str
    category: str
    split: str


def specifications() -> tuple[Specification, ...]:
    """Every sentence of the language, in a fixed order, category by category."""
    kinds = [Kind(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
    pairs = [pair for pair in permutations(kinds, 2) if pair[0].colour != pair[1].colour]
    return (
        *(Specification("one_object", (kind,)) for kind in kinds),
        *(Specification("counting", (kind,), count) for kind, count in product(kinds, NUMBERS.values())),
        *(Specification("relation", pair, relation=relation) for pair, relation in product(pairs, RELATIONS)),
        *(Specification("two_objects", pair) for pair in pairs),
    )


def prompts(split: str) -> tuple[Prompt, ...]:
    """All prompts of `split` ("train" or "held_out"), in a fixed order. A quarter of each category's combinations is
    held out: those whose sha256 is smallest, so the split depends on nothing but the words.

    Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    everything = specifications()
    held_out = set[str]()
    for category in CATEGORIES:
        combinations = {spec.combination for spec in everything if spec.category == category}
        ranked = sorted(combinations, key=_rank)
        held_out.update(ranked[: round(HELD_OUT_FRACTION * len(ranked))])
    return tuple(
        Prompt(spec.caption, spec.category, split)
        for spec in everything
        if (spec.combination in held_out) == (split == "held_out")
    )


def balanced_prompts(split: str, count: int, seed: int) -> tuple[Prompt, ...]:
    """`count` prompts of `split`, the categories in turn, drawn from `seed` without repeats until a category is used
    up. There are 60 times more relations than single objects, so a uniform draw would show little else.
    """
    generator = np.random.default_rng(seed)
    by_category = {category: [p for p in prompts(split) if p.category == category] for category in CATEGORIES}
    rounds = -(-count // len(CATEGORIES))
    columns = [_without_repeats(by_category[category], rounds, generator) for category in CATEGORIES]
    return tuple(prompt for row in zip(*columns, strict=True) for prompt in row)[:count]


def _rank(combination: str) -> str:
    return hashlib.sha256(f"{_SALT} {combination}".encode()).hexdigest()


def _without_repeats(choices: Sequence[Prompt], count: int, generator: np.random.Generator) -> list[Prompt]:
    drawn: list[Prompt] = []
    while len(drawn) < count:
        drawn += [choices[index] for index in generator.permutation(len(choices))]
    return drawn[:count]


_BY_CAPTION = {spec.caption: spec for spec in specifications()}


def parse_caption(text: str) -> Specification:
    """The specification that `text` words. Upper case and surplus spaces are forgiven, nothing else.

    Raises ValueError, naming the text, for any sentence outside the language.
    """
    spec = _BY_CAPTION.get(" ".join(text.lower().split()))
    if spec is None:
        raise ValueError(f"the caption {text!r} is not one of the {len(_BY_CAPTION)} sentences of the shapes language")
    return spec

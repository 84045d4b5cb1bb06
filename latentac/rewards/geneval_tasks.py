"""GenEval's six tasks as functions of what a detector found (Ghosh et al., arXiv 2310.11513): no network is here.

    single_object, two_object     each wanted class is there
    counting                      as many as wanted, and not one more
    colors, color_attr            the most certain objects of a class have the wanted colour
    position                      an object lies left of, right of, above or below another

The metadata of a prompt say it, as the published file does:

    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "position": ["left of", 0]}]}
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
MOST_OBJECTS = 16
"""Of a class: the most certain ones."""
_FAR = 0.1
"""Share of the two objects' size that lies between their centres without a meaning."""
_SAME = {
    "computermouse": "mouse",
    "tvremote": "remote",
    "computerkeyboard": "keyboard",
    "sofa": "couch",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "tvmonitor": "tv",
}
"""Names of one class in the prompts, in COCO, and in older lists of COCO's classes."""


@dataclass(frozen=True)
class Detection:
    """box: left, top, right, bottom in pixels; score: 0 to 1; mask: bool [H, W], where the object is."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None


Detections = Mapping[str, Sequence[Detection]]
"""Class -> what was found of it, the most certain one first."""
Colour = Callable[[str, Sequence[Detection]], Sequence[str]]
"""The colour of each of some objects of a class."""


@dataclass(frozen=True)
class Wanted:
    """An entry of `include` or `exclude`. place: a position, and the place in `include` of the object it is about."""

    kind: str
    count: int
    colour: str | None = None
    place: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    tag: str
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...] = ()


def class_name(name: str) -> str:
    """By which a class is compared: `computer mouse` is `mouse`, and `TV` is `tv`."""
    plain = "".join(name.lower().split())
    return _SAME.get(plain, plain)


def read_task(metadata: Mapping[str, Any]) -> Task:
    """The task of a prompt. Raises ValueError with what is wrong with its metadata.

    Where they have no tag, as the prompt file's became the prompt's category, it follows from the rest.
    """
    include, exclude = (_entries(metadata, name) for name in ("include", "exclude"))
    if not include:
        raise ValueError("include is empty or missing, so every image would have reward 1")
    for number, one in enumerate(include):
        if one.place is not None and not 0 <= one.place[1] < number:
            raise ValueError(f"include.{number}.position is about the object {one.place[1]}, which is no earlier one")
    tag = metadata.get("tag", _tag(include, exclude))
    if tag not in TASKS:
        raise ValueError(f"tag is {str(tag)[:40]!r}, and must be one of {', '.join(TASKS)}")
    return Task(str(tag), include, exclude)


def _tag(include: Sequence[Wanted], exclude: Sequence[Wanted]) -> str:
    """Each of the six tasks has its own form."""
    if exclude:
        return "counting"
    if any(one.place for one in include):
        return "position"
    if any(one.colour for one in include):
        return "colors" if len(include) == 1 else "color_attr"
    return "single_object" if len(include) == 1 else "two_object"


def _entries(metadata: Mapping[str, Any], name: str) -> tuple[Wanted, ...]:
    given = metadata.get(name) or []
    if not isinstance(given, list | tuple):
        raise ValueError(f"{name} is no list")
    found = []
    for number, one in enumerate(given):
        where = f"{name}.{number}"
        if not isinstance(one, Mapping) or not isinstance(one.get("class"), str):
            raise ValueError(f"{where} has no class")
        count = one.get("count", 1)
        if type(count) is not int or not 0 < count <= MOST_OBJECTS:
            raise ValueError(f"{where}.count is {str(count)[:40]}, and must be a whole number from 1 to {MOST_OBJECTS}")
        colour, place = one.get("color"), one.get("position")
        if colour is not None and colour not in COLOURS:
            raise ValueError(f"{where}.color is {str(colour)[:40]!r}, and must be one of {', '.join(COLOURS)}")
        if place is not None and not (
            isinstance(place, list | tuple) and len(place) == 2 and place[0] in POSITIONS and type(place[1]) is int
        ):
            raise ValueError(f"{where}.position is {str(place)[:40]}, and must be like ['left of', 0]")
        found.append(Wanted(one["class"], count, colour, None if place is None else (place[0], place[1])))
    return tuple(found)


def kept(found: Iterable[tuple[str, Detection]], threshold: float, overlap: float = 1.0) -> dict[str, list[Detection]]:
    """What counts of a detector's findings, by class: those above `threshold`, the most certain first, at most
    MOST_OBJECTS. overlap: intersection over union from which the less certain of two of a class is dropped; 1 drops
    none, as published."""
    chosen: dict[str, list[Detection]] = {}
    for name, one in sorted(found, key=lambda each: -each[1].score):
        if one.score > threshold and len(chosen.setdefault(class_name(name), [])) < MOST_OBJECTS:
            chosen[class_name(name)].append(one)
    if overlap < 1:
        chosen = {name: _apart(many, overlap) for name, many in chosen.items()}
    return {name: many for name, many in chosen.items() if many}


def _apart(many: Sequence[Detection], overlap: float) -> list[Detection]:
    found: list[Detection] = []
    for one in many:
        if all(intersection_over_union(one.box, other.box) < overlap for other in found):
            found.append(one)
    return found


def intersection_over_union(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two boxes, whose last pixels belong to them."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    whole = area(*one) + area(*other) - shared
    return shared / whole if whole else 0.0


def positions(one: Sequence[float], other: Sequence[float]) -> set[str]:
    """How the box `one` lies to the box `other`: none, one, or two of POSITIONS.

    The offset of the centres, less _FAR of the two sizes along each axis, must be more than half of the whole offset.
    """
    first, second = (np.asarray(box[:4], np.float64).reshape(2, 2) for box in (one, other))
    offset = first.mean(0) - second.mean(0)
    sizes = np.abs(first[1] - first[0]) + np.abs(second[1] - second[0])
    beyond = np.maximum(np.abs(offset) - _FAR * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    right, down = beyond / np.linalg.norm(offset)
    held = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, is_so in held.items() if is_so}


def judged(detections: Detections, task: Task, colour: Colour) -> list[str]:
    """What is wrong with an image for its task; nothing where the reward is 1.

    colour: is asked only where a colour is wanted. Only the most certain objects of a class count for colours and
    positions, as many as are wanted.
    """
    wrong: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for one in task.include:
        found = detections.get(class_name(one.kind), [])[: one.count]
        reasons = list(_missing(one, found, colour))
        if one.place is not None and not reasons:
            reasons = list(_misplaced(one, found, groups[one.place[1]]))
        groups.append(None if reasons else found)
        wrong += reasons
    for one in task.exclude:
        count = len(detections.get(class_name(one.kind), []))
        if count >= one.count:
            wrong.append(f"{count} {one.kind}, and less than {one.count} are wanted")
    return wrong


def _missing(one: Wanted, found: Sequence[Detection], colour: Colour) -> Iterable[str]:
    if len(found) < one.count:
        yield f"{len(found)} {one.kind}, and {one.count} are wanted"
    elif one.colour is not None:
        seen = list(colour(one.kind, found))
        if seen.count(one.colour) < one.count:
            yield f"{one.kind} is {' and '.join(seen)}, and {one.colour} is wanted"


def _misplaced(one: Wanted, found: Sequence[Detection], group: Sequence[Detection] | None) -> Iterable[str]:
    wanted = one.place[0] if one.place is not None else ""
    if group is None:
        yield f"nothing for {one.kind} to be {wanted}"
    elif any(wanted not in positions(each.box, other.box) for each in found for other in group):
        yield f"{one.kind} is not {wanted} the other"

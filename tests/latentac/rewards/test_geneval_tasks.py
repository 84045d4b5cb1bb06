"""GenEval's six tasks on made detections, with answers worked out by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from latentac.rewards.geneval_tasks import (
    MOST_OBJECTS,
    TASKS,
    Detection,
    class_name,
    intersection_over_union,
    judged,
    kept,
    positions,
    read_task,
)

Box = tuple[float, float, float, float]
LEFT, MIDDLE, RIGHT = (0.0, 40.0, 20.0, 60.0), (40.0, 40.0, 60.0, 60.0), (80.0, 40.0, 100.0, 60.0)
TOP, BOTTOM = (40.0, 0.0, 60.0, 20.0), (40.0, 80.0, 60.0, 100.0)


def found(*objects: tuple[str, Box, float]) -> dict[str, list[Detection]]:
    """What counts outside of counting: above 0.3."""
    return kept([(name, Detection(box, score)) for name, box, score in objects], 0.3)


def colour_by_place(kind: str, many: Sequence[Detection]) -> list[str]:
    """Red on the left, else green."""
    return ["red" if one.box[0] < 40 else "green" for one in many]


def ask(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> Any:
    return read_task({"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "a photo"})


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
RED_DOG, GREEN_DOG, GREEN_CAT = {**DOG, "color": "red"}, {**DOG, "color": "green"}, {**CAT, "color": "green"}
THREE = ask("counting", {"class": "dog", "count": 3}, exclude=[{"class": "dog", "count": 4}])


def left_of(position: str = "left of") -> Any:
    """A cat in that position to a dog."""
    return ask("position", DOG, {**CAT, "position": [position, 0]})


def dogs(count: int) -> list[tuple[str, Box, float]]:
    return [("dog", (10.0 * place, 0.0, 10.0 * place + 8, 8.0), 0.95) for place in range(count)]


CASES: dict[str, tuple[Any, list[tuple[str, Box, float]], bool]] = {
    "single: there": (ask("single_object", DOG), [("dog", LEFT, 0.9)], True),
    "single: another": (ask("single_object", DOG), [("cat", LEFT, 0.9)], False),
    "single: two are enough": (ask("single_object", DOG), dogs(2), True),
    "single: uncertain": (ask("single_object", DOG), [("dog", LEFT, 0.3)], False),
    "single: nothing": (ask("single_object", DOG), [], False),
    "two: both": (ask("two_object", DOG, CAT), [("dog", LEFT, 0.9), ("cat", RIGHT, 0.5)], True),
    "two: one": (ask("two_object", DOG, CAT), [("dog", LEFT, 0.9), ("dog", RIGHT, 0.5)], False),
    "counting: three": (THREE, dogs(3), True),
    "counting: two": (THREE, dogs(2), False),
    "counting: four": (THREE, dogs(4), False),
    "colors: red": (ask("colors", RED_DOG), [("dog", LEFT, 0.9)], True),
    "colors: green": (ask("colors", RED_DOG), [("dog", RIGHT, 0.9)], False),
    "colors: the most certain counts": (ask("colors", RED_DOG), [("dog", RIGHT, 0.9), ("dog", LEFT, 0.8)], False),
    "colors: and it is red": (ask("colors", RED_DOG), [("dog", RIGHT, 0.8), ("dog", LEFT, 0.9)], True),
    "color_attr: both": (ask("color_attr", RED_DOG, GREEN_CAT), [("dog", LEFT, 0.9), ("cat", RIGHT, 0.9)], True),
    "color_attr: changed": (ask("color_attr", RED_DOG, GREEN_CAT), [("cat", LEFT, 0.9), ("dog", RIGHT, 0.9)], False),
    "color_attr: one": (ask("color_attr", GREEN_DOG, GREEN_CAT), [("dog", LEFT, 0.9), ("cat", RIGHT, 0.9)], False),
    "position: left": (left_of(), [("dog", RIGHT, 0.9), ("cat", LEFT, 0.9)], True),
    "position: right": (left_of(), [("dog", LEFT, 0.9), ("cat", RIGHT, 0.9)], False),
    "position: right of": (left_of("right of"), [("dog", LEFT, 0.9), ("cat", RIGHT, 0.9)], True),
    "position: above": (left_of("above"), [("dog", BOTTOM, 0.9), ("cat", TOP, 0.9)], True),
    "position: below": (left_of("below"), [("dog", TOP, 0.9), ("cat", BOTTOM, 0.9)], True),
    "position: not below": (left_of("below"), [("dog", BOTTOM, 0.9), ("cat", TOP, 0.9)], False),
    "position: on it": (left_of(), [("dog", MIDDLE, 0.9), ("cat", (39.0, 40.0, 59.0, 60.0), 0.9)], False),
    "position: no dog": (left_of(), [("cat", LEFT, 0.9)], False),
    "position: no cat": (left_of(), [("dog", LEFT, 0.9)], False),
}


@pytest.mark.parametrize("name", CASES)
def test_each_task_is_judged_as_worked_out_by_hand(name: str) -> None:
    """All six, with what is right and what is wrong about an image."""
    task, objects, right = CASES[name]
    wrong = judged(found(*objects), task, colour_by_place)
    assert (not wrong) == right, wrong


def test_all_six_tasks_are_among_the_cases() -> None:
    """Each with at least one image that is right and one that is wrong."""
    for tag in TASKS:
        assert {right for task, _, right in CASES.values() if task.tag == tag} == {True, False}


def test_what_is_wrong_is_said() -> None:
    """In words, for each entry."""
    task = ask("color_attr", RED_DOG, {**CAT, "count": 2}, exclude=[{"class": "dog", "count": 1}])
    wrong = judged(found(("dog", RIGHT, 0.9), ("cat", LEFT, 0.9)), task, colour_by_place)
    assert wrong == [
        "dog is green, and red is wanted",
        "1 cat, and 2 are wanted",
        "1 dog, and less than 1 are wanted",
    ]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        (TOP, MIDDLE, {"above"}),
        (BOTTOM, MIDDLE, {"below"}),
        ((0.0, 0.0, 20.0, 20.0), (60.0, 60.0, 80.0, 80.0), {"left of", "above"}),
        # Sizes of 20 each: 4 pixels between the centres mean nothing. 5 pixels leave 1 of 5, which is not half.
        ((44.0, 40.0, 64.0, 60.0), MIDDLE, set()),
        ((45.0, 40.0, 65.0, 60.0), MIDDLE, set()),
        # 8 pixels leave 4 of 8, which is half and not more; 9 leave 5 of 9.
        ((48.0, 40.0, 68.0, 60.0), MIDDLE, set()),
        ((49.0, 40.0, 69.0, 60.0), MIDDLE, {"right of"}),
        (MIDDLE, MIDDLE, set()),
    ],
)
def test_positions_are_those_of_the_published_rule(one: Box, other: Box, expected: set[str]) -> None:
    """Offsets of centres, less a tenth of both sizes, against half of the whole offset."""
    assert positions(one, other) == expected


def test_what_counts_of_a_detectors_findings() -> None:
    """Above the threshold, the most certain first, sixteen of a class; of overlapping ones the first if asked."""
    many = [("dog", Detection(LEFT, 0.01 * place)) for place in range(100)]
    chosen = kept(many, 0.3)["dog"]
    assert [one.score for one in chosen] == pytest.approx([0.01 * place for place in range(99, 99 - MOST_OBJECTS, -1)])
    assert kept([("dog", Detection(LEFT, 0.3))], 0.3) == {}
    near = [
        ("dog", Detection(LEFT, 0.9)),
        ("dog", Detection((1.0, 40.0, 21.0, 60.0), 0.8)),
        ("dog", Detection(TOP, 0.7)),
    ]
    assert [one.score for one in kept(near, 0.3, 0.5)["dog"]] == [0.9, 0.7]
    assert len(kept(near, 0.3)["dog"]) == 3
    assert intersection_over_union((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert intersection_over_union((0, 0, 9, 9), (20, 0, 29, 9)) == 0


def test_one_class_has_one_name() -> None:
    """In the prompts, in COCO, and in its older lists."""
    assert class_name("computer mouse") == class_name("mouse")
    assert class_name("TV") == class_name("tvmonitor") == "tv"
    assert class_name("potted plant") == class_name("pottedplant")
    assert kept([("motorbike", Detection(LEFT, 0.9))], 0.3).keys() == {"motorcycle"}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "include is empty or missing"),
        ({"tag": "objects", "include": [DOG]}, "tag is 'objects', and must be one of single_object"),
        ({"tag": "single_object"}, "include is empty or missing, so every image would have reward 1"),
        ({"tag": "single_object", "include": "dog"}, "include is no list"),
        ({"tag": "single_object", "include": [{"count": 1}]}, "include.0 has no class"),
        ({"tag": "counting", "include": [{**DOG, "count": 0}]}, "include.0.count is 0"),
        ({"tag": "counting", "include": [{**DOG, "count": 17}]}, "from 1 to 16"),
        ({"tag": "colors", "include": [{**DOG, "color": "mauve"}]}, "include.0.color is 'mauve'"),
        ({"tag": "position", "include": [DOG, {**CAT, "position": ["beside", 0]}]}, "must be like \\['left of', 0\\]"),
        ({"tag": "position", "include": [{**DOG, "position": ["left of", 0]}]}, "which is no earlier one"),
    ],
)
def test_metadata_that_are_no_task_are_refused(metadata: dict[str, Any], words: str) -> None:
    """With the place in them."""
    with pytest.raises(ValueError, match=words):
        read_task(metadata)


def test_the_colour_is_asked_only_where_one_is_wanted() -> None:
    """So most prompts never load work on the second network."""
    asked: list[str] = []

    def colour(kind: str, many: Sequence[Detection]) -> list[str]:
        asked.append(kind)
        return ["red"] * len(many)

    there = found(("dog", LEFT, 0.9), ("cat", RIGHT, 0.9))
    assert judged(there, ask("two_object", DOG, CAT), colour) == []
    assert judged({}, ask("colors", RED_DOG), colour) != []
    assert asked == []
    assert judged(there, ask("colors", RED_DOG), colour) == []
    assert asked == ["dog"]


def test_the_task_follows_from_the_form_where_there_is_no_tag() -> None:
    """A prompt file's tag becomes the category of its prompt, and the metadata have the rest."""
    for name, (task, _, _) in CASES.items():
        include = [
            {"class": one.kind, "count": one.count}
            | ({"color": one.colour} if one.colour else {})
            | ({"position": list(one.place)} if one.place else {})
            for one in task.include
        ]
        exclude = [{"class": one.kind, "count": one.count} for one in task.exclude]
        assert read_task({"include": include, "exclude": exclude}) == task, name

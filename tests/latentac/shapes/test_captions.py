"""The shapes language: what can be said, what it means, and what is held out."""

import pytest

from latentac.worlds.shapes.captions import (
    CATEGORIES,
    COLOURS,
    SHAPES,
    SPLITS,
    Kind,
    Specification,
    balanced_prompts,
    parse_caption,
    prompts,
    specifications,
)


def test_every_sentence_parses_back_to_what_it_says():
    """parse_caption inverts Specification.caption, and no two specifications share a caption."""
    everything = specifications()
    assert len({spec.caption for spec in everything}) == len(everything) == 18 + 54 + 1080 + 270
    assert all(parse_caption(spec.caption) == spec for spec in everything)


def test_captions_are_plain_english():
    """The four examples of the manual."""
    red, green, blue = Kind("red", "circle"), Kind("green", "square"), Kind("blue", "triangle")
    assert Specification("one_object", (red,)).caption == "a red circle"
    assert Specification("counting", (green,), 3).caption == "three green squares"
    assert Specification("relation", (red, green), relation="left of").caption == "a red circle left of a green square"
    assert Specification("two_objects", (red, blue)).caption == "a red circle and a blue triangle"


@pytest.mark.parametrize("text", ["", "a red dog", "five red circles", "a red circle left of a red square", "red"])
def test_a_sentence_outside_the_language_is_refused_by_name(text):
    """The message quotes the caption."""
    with pytest.raises(ValueError, match=repr(text)):
        parse_caption(text)


def test_upper_case_and_spaces_are_forgiven():
    """A person's typing at the demo page."""
    assert parse_caption("  A red  Circle ") == parse_caption("a red circle")


def test_splits_are_disjoint_by_combination_and_complete():
    """No combination is in both splits, in whatever words; together they are the language."""
    train, held_out = ({parse_caption(p.text).combination for p in prompts(split)} for split in SPLITS)
    assert not train & held_out
    assert train | held_out == {spec.combination for spec in specifications()}


def test_both_wordings_of_a_relation_are_on_the_same_side():
    """`A left of B` and `B right of A` are one combination."""
    first = parse_caption("a red circle left of a green square")
    assert first.combination == parse_caption("a green square right of a red circle").combination
    assert first.combination != parse_caption("a green square left of a red circle").combination


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_covers_every_category(split):
    """And about a quarter of each category is held out."""
    for category in CATEGORIES:
        share = sum(p.category == category for p in prompts(split)) / sum(
            s.category == category for s in specifications()
        )
        assert share == pytest.approx(0.25 if split == "held_out" else 0.75, abs=0.05)


def test_training_knows_every_word():
    """Only combinations are held out, never a colour, a shape, a number or a relation."""
    words = {word for prompt in prompts("train") for word in prompt.text.split()}
    assert {*COLOURS, *SHAPES, "two", "three", "four", "left", "right", "above", "below", "and"} <= words


def test_the_split_never_changes():
    """It depends on the words only: these are the held-out single objects of every version."""
    single = [p.text for p in prompts("held_out") if p.category == "one_object"]
    assert single == ["a red square", "a green triangle", "a cyan circle", "a magenta triangle"]


def test_balanced_prompts_take_the_categories_in_turn():
    """Equal shares, the same for the same seed, no repeats before a category is used up."""
    drawn = balanced_prompts("held_out", 16, seed=3)
    assert [p.category for p in drawn] == list(CATEGORIES) * 4
    assert drawn == balanced_prompts("held_out", 16, seed=3) != balanced_prompts("held_out", 16, seed=4)
    assert len({p.text for p in drawn}) == 16
    assert {p.split for p in drawn} == {"held_out"}


def test_an_unknown_split_is_refused():
    """By name."""
    with pytest.raises(ValueError, match="'test'"):
        prompts("test")

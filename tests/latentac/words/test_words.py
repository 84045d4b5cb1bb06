"""The world of words: its vocabulary and split, its language, its images, and how two engines read them."""

from collections import Counter

import numpy as np
import pytest

from latentac.rewards import REWARDS
from latentac.system.errors import ConfigError
from latentac.worlds.prompts import load_prompts
from latentac.worlds.words.captions import (
    CATEGORIES,
    COLOURS,
    STYLES,
    Specification,
    parse_caption,
    prompts,
    specifications,
)
from latentac.worlds.words.signs import FONTS, GROUNDS, HEIGHT, INKS, LIGHT, WIDTH, render, sample_images, sample_sign
from latentac.worlds.words.vocabulary import SPLITS, WORDS, combination, parts, words


def test_words_are_of_three_to_six_letters() -> None:
    """Of the English alphabet, in its order, and each once."""
    assert list(WORDS) == sorted(set(WORDS))
    assert all(3 <= len(word) <= 6 and word.isascii() and word.isalpha() and word.islower() for word in WORDS)
    assert len(WORDS) == 557


def test_a_quarter_of_the_words_is_held_out() -> None:
    """The two sides share no word and no combination of letters."""
    train, held_out = words("train"), words("held_out")
    assert sorted(train + held_out) == list(WORDS)
    assert len(held_out) == pytest.approx(len(WORDS) / 4, abs=2)
    assert not {combination(word) for word in train} & {combination(word) for word in held_out}
    lengths = Counter(len(word) for word in held_out)
    assert min(lengths[length] for length in (3, 4, 5, 6)) >= 10
    with pytest.raises(ValueError, match="'test'"):
        words("test")


def test_what_held_out_words_consist_of_is_in_training() -> None:
    """Each pair of neighbouring letters, and each first and last letter."""
    assert parts("lamp") == ("^l", "la", "am", "mp", "p$")
    known = {part for word in words("train") for part in parts(word)}
    assert all(set(parts(word)) <= known for word in words("held_out"))


def test_every_sentence_parses_back_to_what_it_says() -> None:
    """And no two specifications share a caption."""
    everything = [spec for split in SPLITS for spec in specifications(split)]
    assert len({spec.caption for spec in everything}) == len(everything) == len(WORDS) * (1 + 7 + 4 + 28)
    assert all(parse_caption(spec.caption) == spec for spec in everything)
    assert parse_caption(' The  word "LAMP" in red ') == Specification("lamp", "red")


def test_captions_are_plain_english() -> None:
    """The four examples of the manual."""
    found = [Specification("lamp", *rest) for rest in ((), ("red",), (None, "serif"), ("red", "serif"))]
    assert [spec.caption for spec in found] == [
        'the word "lamp"',
        'the word "lamp" in red',
        'the word "lamp" in serif letters',
        'the word "lamp" in red serif letters',
    ]
    assert [spec.category for spec in found] == list(CATEGORIES)


@pytest.mark.parametrize("text", ["", "lamp", 'the word "xyz"', 'the word "lamp" in pink', 'a word "lamp"'])
def test_a_sentence_outside_the_language_is_refused_by_name(text: str) -> None:
    """The message quotes the caption."""
    with pytest.raises(ValueError, match=repr(text).replace("(", ".")):
        parse_caption(text)


def test_prompts_are_a_built_in_set() -> None:
    """`builtin:words`, with the categories; training sees no held-out word."""
    found = load_prompts("builtin:words")
    assert [(prompt.text, prompt.category) for prompt in found.train] == [
        (prompt.text, prompt.category) for prompt in prompts("train")
    ]
    assert {prompt.category for prompt in found.held_out} == set(CATEGORIES)
    held_out = set(words("held_out"))
    assert not [prompt.text for prompt in found.train if parse_caption(prompt.text).word in held_out]
    with pytest.raises(ConfigError, match=r"builtin:words"):
        load_prompts("builtin:word")


def draws(count: int, seed: int = 0) -> tuple[list[Specification], np.random.Generator]:
    generator = np.random.default_rng(seed)
    everything = [spec for split in SPLITS for spec in specifications(split)]
    return [everything[place] for place in generator.permutation(len(everything))[:count]], generator


def test_images_follow_from_the_seed() -> None:
    """Bit for bit, uint8 [B, 32, 96, 3], and no two are alike."""
    specs, _ = draws(20)
    images = sample_images(specs, np.random.default_rng(3))
    assert images.dtype == np.uint8
    assert images.shape == (20, HEIGHT, WIDTH, 3)
    assert (images == sample_images(specs, np.random.default_rng(3))).all()
    assert len({image.tobytes() for image in images}) == 20


def test_a_sign_shows_what_is_specified_and_draws_the_rest() -> None:
    """Colour and style as asked; each of them, each font and each ground is drawn where it is open."""
    specs, generator = draws(400)
    signs = [sample_sign(spec, generator) for spec in specs]
    for spec, sign in zip(specs, signs, strict=True):
        assert sign.word == spec.word
        assert spec.colour in (None, sign.colour)
        assert spec.style is None or sign.font in FONTS[spec.style]
    assert {sign.colour for sign in signs} == set(COLOURS) == set(INKS)
    assert {sign.ground for sign in signs} == set(GROUNDS)
    assert {sign.font for sign in signs} == {name for names in FONTS.values() for name in names}
    assert set(FONTS) == set(STYLES)


def test_a_word_stands_whole_in_its_image_and_apart_from_its_ground() -> None:
    """No ink touches the edge, and letters differ from the ground by at least 60 grey levels of luminance."""
    luminance = np.array([0.299, 0.587, 0.114])
    specs, generator = draws(200, seed=1)
    for spec in specs:
        sign = sample_sign(spec, generator)
        empty = render(type(sign)(**{**vars(sign), "word": ""})).astype(float)
        image = render(sign).astype(float)
        inked = np.abs(image - empty).max(axis=2) > 24
        assert inked.any()
        assert not inked[[0, -1]].any(), sign
        assert not inked[:, [0, -1]].any(), sign
        apart = np.abs((np.array(INKS[sign.colour]) - empty) @ luminance)
        assert apart.min() > 60, sign
        assert (np.array(INKS[sign.colour]) @ luminance > empty.mean((0, 1)) @ luminance) == (sign.colour in LIGHT)


@pytest.mark.parametrize("engine", ["tesseract", "rapidocr"])
@pytest.mark.parametrize("layout", ["line", "sparse"])
def test_both_engines_read_the_words(engine: str, layout: str) -> None:
    """At 32 x 96 pixels, with the default enlargement: at least 56 of 60 exactly."""
    specs, generator = draws(60, seed=2)
    scores = REWARDS.build("ocr", engine=engine, layout=layout)(
        sample_images(specs, generator), [spec.caption for spec in specs]
    )
    assert (scores == 1).sum() >= 56
    assert scores.mean() > 0.97
    assert (
        REWARDS.build("ocr", engine=engine, layout=layout)(
            sample_images(specs, generator), [spec.caption for spec in specs[1:] + specs[:1]]
        ).mean()
        < 0.35
    )

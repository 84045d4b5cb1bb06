"""The language of the world of words: a word, and perhaps the colour and the style of its letters.

category  example                                   prompts
word      the word "lamp"                           one per word
colour    the word "lamp" in red                    7 colours
style     the word "lamp" in serif letters          4 styles
both      the word "lamp" in red serif letters      28
"""

from dataclasses import dataclass
from functools import cache

from latentac.worlds.words.vocabulary import SPLITS, WORDS, words

COLOURS = ("black", "red", "green", "blue", "white", "yellow", "cyan")
STYLES = ("plain", "bold", "serif", "typewriter")
CATEGORIES = ("word", "colour", "style", "both")


@dataclass(frozen=True)
class Specification:
    """What an image must show. colour: one of COLOURS, style: one of STYLES; None leaves it open."""

    word: str
    colour: str | None = None
    style: str | None = None

    @property
    def category(self) -> str:
        """One of CATEGORIES."""
        if self.colour and self.style:
            return "both"
        return "colour" if self.colour else "style" if self.style else "word"

    @property
    def caption(self) -> str:
        """Plain English, and the inverse of `parse_caption`."""
        letters = [part for part in (self.colour, self.style and f"{self.style} letters") if part]
        return " in ".join([f'the word "{self.word}"', *([" ".join(letters)] if letters else [])])


@dataclass(frozen=True)
class Prompt:
    """One caption; `category` is one of CATEGORIES, `split` one of SPLITS."""

    text: str
    category: str
    split: str


def specifications(split: str) -> tuple[Specification, ...]:
    """Every sentence about the words of "train" or "held_out". Raises ValueError for another split."""
    return tuple(
        Specification(word, colour, style)
        for word in words(split)
        for colour in (None, *COLOURS)
        for style in (None, *STYLES)
    )


def prompts(split: str) -> tuple[Prompt, ...]:
    """All of them as prompts, in the same order. Raises ValueError for another split."""
    return tuple(Prompt(spec.caption, spec.category, split) for spec in specifications(split))


@cache
def _by_caption() -> dict[str, Specification]:
    return {spec.caption: spec for split in SPLITS for spec in specifications(split)}


def parse_caption(text: str) -> Specification:
    """The specification that `text` words. Upper case and surplus spaces are forgiven, nothing else.

    Raises ValueError, naming the text, for any sentence outside the language.
    """
    spec = _by_caption().get(" ".join(text.lower().split()))
    if spec is None:
        raise ValueError(f"the caption {text!r} is no sentence about one of the {len(WORDS)} words")
    return spec

"""Prompts of one animal each, for models that draw photographs. They need no file and no download."""

_ANIMALS = (
    *("ant", "bat", "bear", "bee", "beetle", "bird", "butterfly", "camel", "cat", "chicken"),
    *("cow", "crab", "deer", "dog", "dolphin", "duck", "eagle", "elephant", "fish", "fox"),
    *("frog", "goat", "goose", "hedgehog", "horse", "kangaroo", "lion", "lizard", "monkey", "mouse"),
    *("owl", "panda", "penguin", "pig", "rabbit", "sheep", "snail", "squirrel", "turtle", "whale"),
)
_PLACES = ("in a meadow", "on a beach", "in the snow", "beside a river", "in front of a brick wall")
_HELD_OUT_EVERY = 5


def prompts(split: str) -> tuple[str, ...]:
    """The texts of `train`, 160, or `held_out`, 40. Every animal and every place is in both, no combination is.

    Raises ValueError for another split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r} is not one of train, held_out")
    return tuple(
        f"a photo of {'an' if animal[0] in 'aeo' else 'a'} {animal} {place}"
        for number, animal in enumerate(_ANIMALS)
        for index, place in enumerate(_PLACES)
        if ((number + index) % _HELD_OUT_EVERY == 0) == (split == "held_out")
    )

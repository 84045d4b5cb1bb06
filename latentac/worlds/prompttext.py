"""What a prompt may be: its characters, its length, and the values beside it."""

import math
import re
import unicodedata
from typing import Any

MAX_CHARACTERS = 10_000
"""Of a prompt: far more than any text encoder reads."""


_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff"


_BLANKS = r"\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"


_VISIBLE = re.compile(f"[^{_BLANKS}]")


_TEXTS = rf"(?:[^\r{_CONTROLS}]|\r\n)*"


PATTERN = f"^{_TEXTS}[^{_BLANKS}{_CONTROLS}]{_TEXTS}$"
"""A prompt as a regular expression, for other programs: what `text_problem` accepts, apart from the length."""


MAX_CATEGORY = 100


MAX_DEPTH = 32


_KINDS = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}


class Repeated:
    """Stands in for a JSON object in which a key is given twice."""

    def __init__(self, key: str) -> None:
        self.key = key


def text_problem(text: Any, most: int, forbidden: str = "") -> str:
    """Why `text` can be no prompt, or "". Tabs and line breaks are text, unless they are `forbidden`."""
    if text is None:
        return "is null"
    if not isinstance(text, str):
        return f"is {kind_of(text)} and no text"
    if not text:
        return "is empty"
    if len(text) > most:
        return f"has {len(text)} characters, above {most}"
    if text.isascii() and text.isprintable():
        return "" if text.strip() else "is nothing but white space"
    for place, character in enumerate(text, 1):
        kind = unicodedata.category(character)
        if kind == "Cs":
            return f"has a lone surrogate (U+{ord(character):04X}) at character {place}"
        if character == "\ufeff":
            return f"has a byte order mark at character {place}"
        broken = character == "\r" and text[place : place + 1] != "\n"
        if kind == "Cc" and (character not in "\t\n\r" or character in forbidden or broken):
            return f"has a control character (U+{ord(character):04X}) at character {place}"
    return "" if _VISIBLE.search(text) else "is nothing but white space"


def value_problem(key: str, value: Any) -> str:
    """Why metadata cannot be kept as JSON, or "". Not recursive: what is nested deeply is what it looks for."""
    pending: list[tuple[Any, int]] = [(key, 0), (value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            return f"is nested more than {MAX_DEPTH} deep"
        if isinstance(item, Repeated):
            return f"has {shown(item.key)} twice"
        if isinstance(item, float) and not math.isfinite(item):
            return f"holds {item}, which is not a JSON number"
        if isinstance(item, str) and not item.isascii() and any("\ud800" <= each <= "\udfff" for each in item):
            return "has a lone surrogate"
        if isinstance(item, str) and "\0" in item:
            return "has a control character (U+0000)"
        if isinstance(item, dict):
            pending += [(each, depth + 1) for pair in item.items() for each in pair]
        elif isinstance(item, list):
            pending += [(each, depth + 1) for each in item]
    return ""


def kind_of(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), "an object")


def shown(key: str) -> str:
    return f"`{key[:40]}`".encode(errors="backslashreplace").decode()

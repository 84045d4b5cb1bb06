"""Docstrings as Markdown: a line `name: meaning` is an item of a list, and a shape such as [B, K, *latent] is code."""

import re
from typing import Any

from griffe import Extension, Object

SHAPE = re.compile(r"(?<![\w`\])])\[[A-Z*][^\]\[`]*\](?![\[(`])")
MEANING = re.compile(r"^ *([a-z_]\w*(?:, \w+)*): (?=\S)", re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = SHAPE.sub(r"`\g<0>`", obj.docstring.value)
            obj.docstring.value = MEANING.sub(r"\n- `\1`: ", text)

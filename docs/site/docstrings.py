"""Docstrings as Markdown: a line `name: meaning` is an item of a list, a shape such as [B, K, *latent] is code, and
<bucket> is a word."""

import re
from typing import Any

from griffe import Extension, Object

SHAPE = re.compile(r"(?<![\w`\])])\[[A-Z*][^\]\[`]*\](?![\[(`])")
MEANING = re.compile(r"^ *([a-z_]\w*(?:, \w+)*): (?=\S)", re.MULTILINE)
CODE_OR_BRACKET = re.compile(r"(`[^`]*`|^ {4}.*)|<", re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = SHAPE.sub(r"`\g<0>`", obj.docstring.value)
            text = CODE_OR_BRACKET.sub(lambda found: found[1] or "&lt;", text)
            obj.docstring.value = MEANING.sub(r"\n- `\1`: ", text)

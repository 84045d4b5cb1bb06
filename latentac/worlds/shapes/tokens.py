"""The tokenizer of the shapes language: one token per word."""

from pathlib import Path

from transformers import CLIPTokenizer

from latentac.worlds.pretraining import tokens

TEXT_LENGTH = 16
"""The longest caption has 10 tokens, its two marks included."""
# They were learned once, by the trainer of the tokenizers library, from the words of the language; its order among
# equally frequent pairs changes from run to run.
_MERGES = """
r e, a n, l e, r i, c i, e l, l e/, o w/, q u, r c, s qu, t ri, an g, le s/, ci rc, squ a, tri ang, a b, a g,
a n/, b l, b el, c y, e n, e n/, f o, f t/, g h, g re, h re, l ow/, m ag, o v, o f/, r e/, t w, t a/, t hre, u
e/, u r/, y el, re s/, re d/, an d/, le ft/, ri gh, circ le/, circ les/, squa re/, squa res/, triang le/,
triang les/, ab ov, bl ue/, bel ow/, cy an/, en ta/, fo ur/, gre en/, mag enta/, tw o/, thre e/, yel low/,
righ t/, abov e/
"""


def build_tokenizer(folder: Path, length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """A CLIPTokenizer of the language, written to `folder`. Any other text has tokens too; length: the most of them."""
    return tokens.build_tokenizer(folder, _MERGES, length)

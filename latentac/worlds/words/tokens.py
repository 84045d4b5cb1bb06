"""The tokenizer of the words language: one token per letter, so that a model can spell what it has never seen.

A few words of the sentences around the quotes are one token each: those with merges that occur in no word of the
vocabulary.
"""

from pathlib import Path

from transformers import CLIPTokenizer

from latentac.worlds.pretraining import tokens

TEXT_LENGTH = 29
"""Of the longest caption, its two marks included."""
_MERGES = """
h e/, t he/, r s/, e rs/, t ers/, t ters/, e tters/, l etters/, c y, cy a, cya n/, i f/, r if/, e rif/, s erif/,
t y, ty p, typ e, type w, typew r, typewr i, typewri t, typewrit e, typewrite r/
"""


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer of the language, written to `folder`. Any other text has tokens too."""
    return tokens.build_tokenizer(folder, _MERGES, TEXT_LENGTH)

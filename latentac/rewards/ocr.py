"""Whether an image shows the text between the prompt's quotes, as an OCR engine reads it.

    r = 1 - min(d(read, wanted), n) / n

d: Levenshtein's distance; n: characters of the wanted text. Both texts are normalised first: Unicode NFKC, without case
(casefold), without any white space. Several quoted texts of a prompt are one text, in their order.

So does Flow-GRPO (Liu et al., arXiv 2505.05470), with these differences. There the engine is PaddleOCR; only the first
quoted text counts; only spaces are removed; a reading that contains the wanted text has 1, whatever stands around it
(here: `contained`); and a failure of the engine is worth 0, while it is an error here.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field

from latentac.config import extensions
from latentac.rewards.ocr_engines import Engine, Engines, Rapid, Tesseract, data_folder
from latentac.rewards.parallel import each_in_parallel
from latentac.system.errors import ConfigError, RewardError

if TYPE_CHECKING:
    from latentac.rewards.folders import Checkpoint

_QUOTED = re.compile(r'"([^"]*)"|“([^“”]*)”')
_MOST_SIDE = 4096


class Ocr:
    """1 minus the edit distance between the quoted text of the prompt and the text that is read, over the length of the
    quoted text, at least 0. Case and white space do not matter; every other character that is read counts."""

    unit = "share of the quoted text that is read: 1 - edit distance / its length, 0 to 1"

    class Settings(extensions.Settings):
        """Which engine reads, and how."""

        engine: Literal["tesseract", "rapidocr"] = "tesseract"
        """`tesseract` (fast; printed text) or `rapidocr` (PP-OCR; also text in scenes). Both are in `latentac[ocr]`."""
        layout: Literal["page", "block", "line", "word", "sparse"] = "sparse"
        """What to expect: text in any place (`sparse`), a page, a block, one line, or one word. It is tesseract's page
        segmentation mode 11, 3, 6, 7 or 8. For `line` and `word`, rapidocr does not look for the place of the text."""
        enlarge: Annotated[int, Field(ge=0, le=_MOST_SIDE)] = 32
        """An image with a smaller height is enlarged to this one, in pixels (bicubic). 0: never. Larger letters than it
        needs make tesseract sensitive to noise."""
        contained: bool = False
        """Give 1 where the text that is read contains the quoted text, as Flow-GRPO does."""
        engines: Annotated[int, Field(gt=0, le=64)] = 2
        """Most images that are read at the same time, in each process. Each takes a core, and 10 to 30 MB; the first of
        rapidocr takes 110 MB."""
        language: Annotated[str, Field(pattern=r"^\w+(\+\w+)*$", max_length=100)] = "eng"
        """Of tesseract, as its data is named; `eng+deu` are two. rapidocr reads English and Chinese."""
        language_data: str = ""
        """Folder with the data of tesseract, `eng.traineddata` for instance, or an address of `latentac mirror`.
        Default: that of TESSDATA_PREFIX, or of the system."""

    def __init__(self, settings: "Ocr.Settings") -> None:
        self._settings = settings
        self._engines = Engines(self._build, settings.engines)

    def fetch(self) -> None:
        """Load the engine. Nothing is downloaded. Raises ConfigError for a missing package or missing data."""
        with self._engines.one():
            pass

    def checkpoints(self) -> "list[Checkpoint]":
        """The language data that the settings name. Those of the system come with its packages."""
        from latentac.rewards.folders import Checkpoint

        own = self._settings
        if own.engine != "tesseract" or not own.language_data:
            return []
        folder = data_folder(own.language_data, own.language)
        names = frozenset(f"{each}.traineddata" for each in own.language.split("+"))
        return [Checkpoint("language_data", "", folder, names)]

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray]:
        """A drawn word, what it is worth for itself, for one with another letter and for another one; digits, which
        tesseract knows in each language."""
        shown = np.stack([_drawn("2468")] * 3 + [_drawn("")])
        prompts = ['the number "2468"', 'the number "2568"', 'the number "1357"', 'the number "2468"']
        return shown, prompts, np.array([1.0, 0.75, 0.0, 0.0], np.float32)

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """float32 [B], 0 to 1, for `images` uint8 [B, H, W, 3]. Raises RewardError for a prompt without quoted text and
        for an engine that cannot be used."""
        wanted, scores = [quoted(prompt) for prompt in prompts], np.zeros(len(prompts), np.float32)

        def work(place: int) -> None:
            with self._engines.one() as engine:
                read = normalised(engine.read(_enlarged(images[place], self._settings.enlarge)))
            scores[place] = closeness(read, wanted[place], self._settings.contained)

        try:
            each_in_parallel(range(len(prompts)), work, self._settings.engines, "ocr")
        except ConfigError as error:
            first = error.problems[0]
            raise RewardError(f"{first.path} = {first.value!r}", first.problem, first.remedy) from error
        return scores

    def _build(self) -> Engine:
        own = self._settings
        if own.engine == "rapidocr":
            return Rapid(own.layout)
        return Tesseract(own.language_data, own.language, own.layout)


def quoted(prompt: str) -> str:
    """The normalised text between the double quotes of a prompt. Raises RewardError where there is none."""
    found = normalised("".join("".join(pair) for pair in _QUOTED.findall(prompt)))
    if not found:
        remedy = 'Name the text that the image shall show between double quotes: the word "lamp"'
        raise RewardError(f"prompt {prompt!r}", "has no text between double quotes", remedy)
    return found


def normalised(text: str) -> str:
    """Without case and white space, and with one form of each character."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def closeness(read: str, wanted: str, contained: bool = False) -> float:
    """1 - min(d, n) / n of two normalised texts, n the length of `wanted`."""
    if contained and wanted in read:
        return 1.0
    if abs(len(read) - len(wanted)) >= len(wanted):  # at least as far apart as their lengths
        return 0.0
    return 1.0 - min(_distance(read, wanted), len(wanted)) / len(wanted)


def _distance(one: str, other: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete, or replace."""
    row = list(range(len(other) + 1))
    for line, letter in enumerate(one, 1):
        above, row = row, [line]
        for place, target in enumerate(other, 1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (letter != target)))
    return row[-1]


def _enlarged(image: np.ndarray, least: int) -> np.ndarray:
    height, width = image.shape[:2]
    if height >= least:
        return image
    size = min(_MOST_SIDE, max(1, round(width * least / height))), least
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _drawn(text: str) -> np.ndarray:
    """Black on white, uint8 [64, 192, 3], in the font that Pillow has."""
    image = Image.new("RGB", (192, 64), "white")
    ImageDraw.Draw(image).text((96, 32), text, "black", ImageFont.load_default(36), anchor="mm")
    return np.asarray(image)

"""Images of the world of words: one word on a ground, 32 x 96 pixels, anti-aliased, slightly turned.

A word begins at the left, so that a small model need not know its length to place its letters.

The fonts are those that matplotlib brings: DejaVu and STIX. Both may be copied and embedded freely.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentac.worlds.words.captions import COLOURS, Specification

HEIGHT, WIDTH = 32, 96
FONTS = {
    "plain": ("DejaVuSans.ttf",),
    "bold": ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf"),
    "serif": ("DejaVuSerif.ttf", "STIXGeneral.ttf"),
    "typewriter": ("DejaVuSansMono.ttf",),
}
"""Style -> files of matplotlib."""
INKS = {
    "black": (25, 25, 30),
    "red": (190, 30, 35),
    "green": (10, 135, 45),
    "blue": (30, 50, 180),
    "white": (245, 245, 245),
    "yellow": (250, 220, 70),
    "cyan": (90, 225, 235),
}
LIGHT = ("white", "yellow", "cyan")
"""Inks that stand on a dark ground; the others stand on a light one."""
GROUNDS = ("flat", "gradient", "stripes", "grain", "clouds")

_SUPERSAMPLING = 4
_EDGE = 3.0  # pixels between the turned word and the edge
_SIZES = 18.0, 23.0  # pixels of a font; a word that is too wide is smaller
_MOST_SHIFT = 4.0  # pixels along the word, and half of it across
_MOST_TURN = 3.0  # degrees
_MOST_TEXTURE = 18.0  # grey levels


@dataclass(frozen=True)
class Sign:
    """size: of the font, in pixels; (x, y): centre of the word's ink; turn: degrees, counterclockwise; ground: one of
    GROUNDS; shade: RGB of the ground; texture: its amplitude in grey levels; seed: of the texture."""

    word: str
    colour: str
    font: str
    size: float
    x: float
    y: float
    turn: float
    ground: str
    shade: tuple[int, int, int]
    texture: float
    seed: int


def sample_sign(spec: Specification, generator: np.random.Generator) -> Sign:
    """A sign that shows `spec`. What the specification leaves open is drawn."""
    colour = spec.colour or COLOURS[generator.integers(len(COLOURS))]
    fonts = FONTS[spec.style] if spec.style else tuple(name for names in FONTS.values() for name in names)
    font = fonts[generator.integers(len(fonts))]
    turn = float(generator.uniform(-_MOST_TURN, _MOST_TURN))
    size = min(float(generator.uniform(*_SIZES)), _largest(spec.word, font, turn))
    width, height = _extent(spec.word, font, size, turn)
    x = width / 2 + _EDGE + float(generator.uniform(0, 1)) * min(_MOST_SHIFT, WIDTH - width - 2 * _EDGE)
    y = HEIGHT / 2 + float(generator.uniform(-1, 1)) * min(_MOST_SHIFT / 2, (HEIGHT - height) / 2 - _EDGE)
    low, high = (20, 85) if colour in LIGHT else (195, 250)
    red, green, blue = (int(level) for level in generator.integers(low, high, 3))
    ground = GROUNDS[generator.integers(len(GROUNDS))]
    texture = float(generator.uniform(0.3, 1.0) * _MOST_TEXTURE)
    seed = int(generator.integers(2**31))
    return Sign(spec.word, colour, font, size, x, y, turn, ground, (red, green, blue), texture, seed)


def render(sign: Sign) -> np.ndarray:
    """uint8 [32, 96, 3]: every pixel is the mean of 4 x 4 samples of the letters. Deterministic for one Pillow."""
    coverage = _coverage(sign)[..., None]
    ground = np.asarray(sign.shade, np.float32) + sign.texture * _texture(sign)
    image = ground + coverage * (np.asarray(INKS[sign.colour], np.float32) - ground)
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def sample_images(specs: Sequence[Specification], generator: np.random.Generator) -> np.ndarray:
    """One rendered sign for each of `specs`: uint8 [B, 32, 96, 3]."""
    return np.stack([render(sample_sign(spec, generator)) for spec in specs])


@cache
def _font(name: str, size: float) -> ImageFont.FreeTypeFont:
    import matplotlib  # here: captions and prompts do without it

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


@cache
def _box(word: str, name: str) -> tuple[float, float]:
    """Width and height of the word's ink in a font of one pixel."""
    left, top, right, bottom = _font(name, 100.0).getbbox(word, anchor="mm")
    return (right - left) / 100, (bottom - top) / 100


def _extent(word: str, font: str, size: float, turn: float) -> tuple[float, float]:
    """Width and height of the turned word, in pixels."""
    width, height = (size * side for side in _box(word, font))
    sine, cosine = abs(np.sin(np.radians(turn))), np.cos(np.radians(turn))
    return float(width * cosine + height * sine), float(width * sine + height * cosine)


def _largest(word: str, font: str, turn: float) -> float:
    """The largest size with which the turned word leaves the edge free."""
    width, height = _extent(word, font, 1.0, turn)
    return float(min((WIDTH - 2 * _EDGE) / width, (HEIGHT - 2 * _EDGE) / height))


def _coverage(sign: Sign) -> np.ndarray:
    """The share of every pixel that letters cover: float32 [32, 96]."""
    fine = (WIDTH * _SUPERSAMPLING, HEIGHT * _SUPERSAMPLING)
    layer = Image.new("L", fine)
    font = _font(sign.font, round(sign.size, 1) * _SUPERSAMPLING)
    left, top, right, bottom = font.getbbox(sign.word)
    middle = sign.x * _SUPERSAMPLING, sign.y * _SUPERSAMPLING
    # The middle of the ink, not of the line, stands at (x, y).
    corner = middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2
    ImageDraw.Draw(layer).text(corner, sign.word, 255, font)
    layer = layer.rotate(sign.turn, Image.Resampling.BICUBIC, center=middle)
    small = layer.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _texture(sign: Sign) -> np.ndarray:
    """float32 [32, 96, 1 or 3], -1 to 1."""
    generator = np.random.default_rng(sign.seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    angle = generator.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x / WIDTH + np.sin(angle) * y / HEIGHT
    if sign.ground == "gradient":
        return (1.4 * (along - along.mean())).clip(-1, 1)[..., None]
    if sign.ground == "stripes":
        return np.sin(2 * np.pi * generator.uniform(2, 7) * along)[..., None]
    if sign.ground == "grain":
        return generator.uniform(-1, 1, (HEIGHT, WIDTH, 3)).astype(np.float32)
    if sign.ground == "clouds":
        coarse = generator.uniform(-1, 1, (4, 10)).astype(np.float32)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        return np.asarray(smooth, np.float32).clip(-1, 1)[..., None]
    return np.zeros((HEIGHT, WIDTH, 1), np.float32)

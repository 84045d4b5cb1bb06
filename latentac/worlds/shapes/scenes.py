"""Images of the embedded world: where the objects of a specification stand, and their anti-aliased rendering.

Coordinates are pixels, x to the right and y down, from the upper left corner of a 32 x 32 image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from latentac.worlds.shapes.captions import Kind, Specification

IMAGE_SIZE = 32
BACKGROUND = (20, 20, 28)
PALETTE = {
    "red": (235, 60, 55),
    "yellow": (245, 215, 60),
    "green": (60, 190, 80),
    "cyan": (55, 205, 215),
    "blue": (65, 75, 245),
    "magenta": (220, 80, 215),
}
# Half extents as multiples of an object's size: the three shapes then cover about the same area, pi size^2.
SQUARE_HALF_SIDE = 0.88
TRIANGLE_HALF_BASE = 1.25
TRIANGLE_HALF_HEIGHT = 1.15

_SUPERSAMPLING = 4
_TRIES = 20  # places tried before a crowded scene is begun anew
_GAP = 2.0  # pixels between bounding boxes, so that neighbours never blur into each other
_EDGE = 0.5  # pixels between a bounding box and the image's edge
_SIZES = {"one_object": (4.5, 8.0), "counting": (3.2, 4.6), "relation": (3.8, 5.6), "two_objects": (3.8, 5.6)}
_GRID = (np.arange(IMAGE_SIZE * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING


@dataclass(frozen=True)
class Object:
    """`size` is a circle's radius; (`x`, `y`) is the centre of the bounding box. All in pixels."""

    kind: Kind
    x: float
    y: float
    size: float

    @property
    def half_extents(self) -> tuple[float, float]:
        """Half the width and half the height of the bounding box, in pixels."""
        if self.kind.shape == "circle":
            return self.size, self.size
        if self.kind.shape == "square":
            return SQUARE_HALF_SIDE * self.size, SQUARE_HALF_SIDE * self.size
        return TRIANGLE_HALF_BASE * self.size, TRIANGLE_HALF_HEIGHT * self.size


@dataclass(frozen=True)
class Scene:
    """Objects that do not touch, on the plain background."""

    objects: tuple[Object, ...]


def sample_scene(spec: Specification, generator: np.random.Generator) -> Scene:
    """A scene that shows `spec` and nothing else: sizes and places are drawn until they fit."""
    kinds = spec.kinds * spec.count
    while True:
        placed: list[Object] = []
        for _ in range(_TRIES):
            kind = kinds[len(placed)]
            candidate = _place(kind, float(generator.uniform(*_SIZES[spec.category])), generator)
            if any(_too_close(candidate, other) for other in placed):
                continue
            placed.append(candidate)
            if len(placed) == len(kinds):
                break
        complete = len(placed) == len(kinds)
        if complete and (spec.relation is None or _related(placed[0], placed[1], spec.relation)):
            return Scene(tuple(placed))


def render(scene: Scene) -> np.ndarray:
    """uint8 [32, 32, 3]: every pixel is the mean of 4 x 4 samples, so edges are anti-aliased. Deterministic."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = BACKGROUND
    for item in scene.objects:
        coverage = _coverage(item)[..., None]
        image += coverage * (np.asarray(PALETTE[item.kind.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)


def sample_images(specs: Sequence[Specification], generator: np.random.Generator) -> np.ndarray:
    """One rendered scene for each of `specs`: uint8 [B, 32, 32, 3]."""
    return np.stack([render(sample_scene(spec, generator)) for spec in specs])


def _place(kind: Kind, size: float, generator: np.random.Generator) -> Object:
    width, height = Object(kind, 0.0, 0.0, size).half_extents
    x = generator.uniform(width + _EDGE, IMAGE_SIZE - width - _EDGE)
    y = generator.uniform(height + _EDGE, IMAGE_SIZE - height - _EDGE)
    return Object(kind, float(x), float(y), size)


def _too_close(first: Object, second: Object) -> bool:
    (width, height), (other_width, other_height) = first.half_extents, second.half_extents
    return (
        abs(first.x - second.x) < width + other_width + _GAP and abs(first.y - second.y) < height + other_height + _GAP
    )


def _related(first: Object, second: Object, relation: str) -> bool:
    """A clear case: the offset along the relation's axis is at least twice the offset across it."""
    right, down = first.x - second.x, first.y - second.y
    along = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
    across = abs(down) if relation in ("left of", "right of") else abs(right)
    return along >= 2 * across


def _coverage(item: Object) -> np.ndarray:
    """The share of every pixel that the object covers: float32 [32, 32]."""
    x, y = _GRID[None, :] - np.float32(item.x), _GRID[:, None] - np.float32(item.y)
    if item.kind.shape == "circle":
        inside = x * x + y * y <= np.float32(item.size**2)
    else:
        half_width, half_height = (np.float32(extent) for extent in item.half_extents)
        inside = np.abs(y) <= half_height
        if item.kind.shape == "square":
            inside = inside & (np.abs(x) <= half_width)
        else:  # the apex is at the top, y = -half_height
            inside = inside & (2 * half_height * np.abs(x) <= half_width * (y + half_height))
    samples = inside.astype(np.uint8)  # slices are summed, for np.mean over two axes takes ten times as long
    counted = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for row, column in product(range(_SUPERSAMPLING), repeat=2):
        counted += samples[row::_SUPERSAMPLING, column::_SUPERSAMPLING]
    return counted / np.float32(_SUPERSAMPLING**2)

"""Does an image show what its specification says, and nothing else? In GenEval's manner, with classical vision.

Every pixel goes to the palette colour whose mixture with the background it is nearest to; connected pixels of one
colour are an object; its shape is the one of three ideal shapes, of the same area and centroid, that overlaps it most.
Counts, colours, shapes and relations must then all be right, and whatever is not a clean object makes the answer no.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from latentac.worlds.shapes.captions import SHAPES, Kind, Specification
from latentac.worlds.shapes.scenes import (
    BACKGROUND,
    IMAGE_SIZE,
    PALETTE,
    TRIANGLE_HALF_BASE,
    TRIANGLE_HALF_HEIGHT,
)

FOREGROUND_COVERAGE = 0.5  # a pixel belongs to an object when the object covers half of it
COLOUR_COSINE = 0.93  # least agreement with the palette's hue; neighbouring hues are at most 0.88 alike
SPECK_PIXELS = 3  # a component of at most so many pixels is noise of the autoencoder and no object
STRAY_PIXELS = 6  # at most so many pixels of noise, of specks and of hues outside the palette together
LEAST_OVERLAP = 0.80  # intersection over union with the ideal shape
LEAST_PIXELS = 14  # below this the three shapes cannot be told apart
MOST_PIXELS = 280  # the renderer's largest objects have 210; an image all of one colour is not a square

_COLOURS = tuple(PALETTE)
_OFFSETS = np.array([PALETTE[name] for name in _COLOURS], np.float32) - np.array(BACKGROUND, np.float32)
_STRENGTHS = np.linalg.norm(_OFFSETS, axis=1)
_HUES = _OFFSETS / _STRENGTHS[:, None]
_IN_PLANE = np.zeros((3, 3, 3, 3), bool)  # pixels touch within one image and one colour, along an edge or a corner
_IN_PLANE[1, 1] = True


@dataclass(frozen=True)
class Detection:
    """One clean object: what it is, and its centroid in pixels."""

    kind: Kind
    x: float
    y: float


def verify(images: np.ndarray, specs: Sequence[Specification]) -> np.ndarray:
    """bool [B]: whether each of `images` uint8 [B, 32, 32, 3] shows exactly its specification."""
    found = detect(images)
    pairs = zip(found, specs, strict=True)
    return np.array([detections is not None and _agrees(detections, spec) for detections, spec in pairs], bool)


def detect(images: np.ndarray) -> list[list[Detection] | None]:
    """The objects of each of `images` uint8 [B, 32, 32, 3]; None where anything is not a clean object."""
    if not len(images):
        return []
    coverage, masks, stray = _segment(images)
    labels, _ = ndimage.label(masks, structure=_IN_PLANE)
    results: list[list[Detection] | None] = [[] for _ in images]
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        image, colour, rows, columns = box[0].start, box[1].start, box[2], box[3]
        detections = results[image]
        if detections is None:
            continue
        pixels = int(np.count_nonzero(labels[box] == label))
        if pixels <= SPECK_PIXELS:
            stray[image] += pixels
            continue
        detection = _classify(coverage[image, colour], rows, columns, colour)
        if detection is None or not LEAST_PIXELS <= pixels <= MOST_PIXELS:
            results[image] = None
        else:
            detections.append(detection)
    return [None if noise > STRAY_PIXELS else result for noise, result in zip(stray, results, strict=True)]


def _segment(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage float32 and foreground bool [B, colours, 32, 32], and stray pixels int [B]."""
    offset = images.astype(np.float32) - np.array(BACKGROUND, np.float32)
    projection = offset @ _HUES.T
    nearest = projection.argmax(axis=-1)
    strongest = np.take_along_axis(projection, nearest[..., None], axis=-1)[..., 0]
    length = np.linalg.norm(offset, axis=-1)
    own_hue = strongest >= COLOUR_COSINE * length
    share = np.clip(strongest / _STRENGTHS[nearest], 0.0, 1.0)
    mine = (nearest[:, None] == np.arange(len(_COLOURS))[None, :, None, None]) & own_hue[:, None]
    coverage = np.where(mine, share[:, None], np.float32(0.0))
    foreign = ~own_hue & (length > FOREGROUND_COVERAGE * _STRENGTHS.min())
    return coverage, coverage > FOREGROUND_COVERAGE, foreign.sum(axis=(1, 2))


def _classify(coverage: np.ndarray, rows: slice, columns: slice, colour: int) -> Detection | None:
    """The object whose foreground fills `rows` x `columns` of `coverage` float32 [32, 32]; None if it has no shape."""
    top, left = max(rows.start - 1, 0), max(columns.start - 1, 0)
    crop = coverage[top : min(rows.stop + 1, IMAGE_SIZE), left : min(columns.stop + 1, IMAGE_SIZE)]
    area = float(crop.sum())
    y = float(crop.sum(axis=1) @ np.arange(crop.shape[0])) / area
    x = float(crop.sum(axis=0) @ np.arange(crop.shape[1])) / area
    ideals = _ideal_shapes(crop.shape, x, y, area)
    overlaps = np.minimum(ideals, crop).sum(axis=(1, 2)) / np.maximum(ideals, crop).sum(axis=(1, 2))
    best = int(overlaps.argmax())
    if overlaps[best] < LEAST_OVERLAP:
        return None
    return Detection(Kind(_COLOURS[colour], SHAPES[best]), left + x + 0.5, top + y + 0.5)


def _ideal_shapes(extent: tuple[int, int], x: float, y: float, area: float) -> np.ndarray:
    """Coverage float [3, *extent] of the circle, the square and the triangle of `area` with centroid (x, y)."""
    down, right = np.arange(extent[0])[:, None] - y, np.arange(extent[1])[None, :] - x
    circle = np.clip(np.sqrt(area / np.pi) - np.hypot(down, right) + 0.5, 0.0, 1.0)
    half_side = np.sqrt(area) / 2
    square = np.clip(half_side - np.abs(down) + 0.5, 0.0, 1.0) * np.clip(half_side - np.abs(right) + 0.5, 0.0, 1.0)
    size = np.sqrt(area / (2 * TRIANGLE_HALF_BASE * TRIANGLE_HALF_HEIGHT))
    half_base, height = TRIANGLE_HALF_BASE * size, 2 * TRIANGLE_HALF_HEIGHT * size
    slope = np.hypot(half_base, height)
    to_side = (half_base * (down + 2 * height / 3) - height * np.abs(right)) / slope  # the apex is 2/3 height above
    triangle = np.clip(to_side + 0.5, 0.0, 1.0) * np.clip(height / 3 - down + 0.5, 0.0, 1.0)
    return np.stack([circle, square, triangle])


def _agrees(found: Sequence[Detection], spec: Specification) -> bool:
    if sorted(detection.kind for detection in found) != sorted(spec.kinds * spec.count):
        return False
    if spec.relation is None:
        return True
    first, second = sorted(found, key=lambda detection: detection.kind != spec.kinds[0])
    right, down = first.x - second.x, first.y - second.y
    along = {"left of": -right, "right of": right, "above": -down, "below": down}[spec.relation]
    across = abs(down) if spec.relation in ("left of", "right of") else abs(right)
    return along > across

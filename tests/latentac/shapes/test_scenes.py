"""Scenes obey their specification and render to the same bytes everywhere."""

import hashlib

import numpy as np
import pytest

from latentac.worlds.shapes.captions import CATEGORIES, Kind, parse_caption, specifications
from latentac.worlds.shapes.scenes import (
    BACKGROUND,
    IMAGE_SIZE,
    PALETTE,
    Object,
    Scene,
    render,
    sample_images,
    sample_scene,
)

IMAGES_SHA256 = "d48e82e787af4bdff7f512b00ac483464641f6f821a74b31568934a4462e7934"
SQUARE = Scene((Object(Kind("red", "square"), 16.0, 16.0, 8.0),))


def test_a_scene_renders_to_the_same_bytes_everywhere():
    """Sampling and rendering are functions of the specification and the generator's seed."""
    specs = [parse_caption(text) for text in ("four cyan triangles", "a red circle above a blue square")]
    images = sample_images(specs, np.random.default_rng(7))
    assert (images == sample_images(specs, np.random.default_rng(7))).all()
    assert hashlib.sha256(images.tobytes()).hexdigest() == IMAGES_SHA256


def test_an_image_has_the_object_in_its_colour_on_the_plain_background():
    """Centre and corner pixels are pure."""
    image = render(SQUARE)
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    assert tuple(image[16, 16]) == PALETTE["red"]
    assert tuple(image[0, 0]) == BACKGROUND


def test_edges_are_anti_aliased():
    """A quarter of the pixel's width covered is a quarter of the way from the background to the colour."""
    red = np.array(PALETTE["red"], float)
    half_width = SQUARE.objects[0].half_extents[0]
    shifted = Object(Kind("red", "square"), 16.0 + (0.25 - half_width) % 1, 16.0, 8.0)
    column = int(np.floor(shifted.x + half_width))
    expected = np.array(BACKGROUND) + 0.25 * (red - np.array(BACKGROUND))
    assert render(Scene((shifted,)))[16, column] == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_scene_shows_its_specification(category):
    """The right objects, inside the image, apart from one another, and in a clear relation."""
    generator = np.random.default_rng(1)
    for spec in [spec for spec in specifications() if spec.category == category][:60]:
        scene = sample_scene(spec, generator)
        assert [item.kind for item in scene.objects] == list(spec.kinds * spec.count)
        for item in scene.objects:
            width, height = item.half_extents
            assert width <= item.x <= IMAGE_SIZE - width
            assert height <= item.y <= IMAGE_SIZE - height
        if spec.relation == "left of":
            assert scene.objects[0].x < scene.objects[1].x
        if spec.relation == "above":
            assert scene.objects[0].y < scene.objects[1].y

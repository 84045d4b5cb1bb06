"""The verifier says yes to true images, no to wrong ones, and cannot be talked round."""

from dataclasses import replace

import numpy as np
import pytest

from latentac.worlds.shapes.captions import (
    CATEGORIES,
    COLOURS,
    RELATIONS,
    SHAPES,
    Specification,
    parse_caption,
    specifications,
)
from latentac.worlds.shapes.scenes import BACKGROUND, PALETTE, render, sample_images, sample_scene
from latentac.worlds.shapes.verifier import verify

IMAGES = 150


def images_of(category: str, seed: int) -> tuple[list[Specification], np.ndarray]:
    generator = np.random.default_rng(seed)
    choices = [spec for spec in specifications() if spec.category == category]
    specs = [choices[index] for index in generator.integers(len(choices), size=IMAGES)]
    return specs, sample_images(specs, generator)


def another_colour(spec: Specification) -> Specification:
    used = {kind.colour for kind in spec.kinds}
    colour = next(colour for colour in COLOURS if colour not in used)
    return replace(spec, kinds=(replace(spec.kinds[0], colour=colour), *spec.kinds[1:]))


def another_shape(spec: Specification) -> Specification:
    shape = SHAPES[(SHAPES.index(spec.kinds[0].shape) + 1) % len(SHAPES)]
    return replace(spec, kinds=(replace(spec.kinds[0], shape=shape), *spec.kinds[1:]))


def another_count(spec: Specification) -> Specification:
    return replace(spec, count=2 + (spec.count - 1) % 3)


def opposite(spec: Specification) -> Specification:
    return replace(spec, relation=RELATIONS[RELATIONS.index(spec.relation) ^ 1])


def turned(spec: Specification) -> Specification:
    return replace(spec, relation=RELATIONS[(RELATIONS.index(spec.relation) + 2) % 4])


def swapped_colours(spec: Specification) -> Specification:
    first, second = spec.kinds
    kinds = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    return replace(spec, kinds=kinds)


CHANGES = [(category, change) for category in CATEGORIES for change in (another_colour, another_shape)]
CHANGES += [("counting", another_count), ("relation", opposite), ("relation", turned)]


@pytest.mark.parametrize("category", CATEGORIES)
def test_yes_to_the_renderers_own_images(category):
    """At least 93 % in every category."""
    specs, images = images_of(category, seed=11)
    assert verify(images, specs).mean() >= 0.93


@pytest.mark.parametrize(("category", "change"), CHANGES)
def test_no_when_one_attribute_is_changed(category, change):
    """At least 95 %, whichever attribute it is."""
    specs, images = images_of(category, seed=12)
    assert verify(images, [change(spec) for spec in specs]).mean() <= 0.05


def test_no_when_two_objects_swap_colours():
    """Each object has its own colour; only where both are of one shape is the image still right."""
    specs, images = images_of("two_objects", seed=13)
    different = np.array([spec.kinds[0].shape != spec.kinds[1].shape for spec in specs])
    accepted = verify(images, [swapped_colours(spec) for spec in specs])
    assert accepted[different].mean() <= 0.05
    assert accepted[~different].mean() >= 0.93


def test_no_to_a_missing_and_to_an_extra_object():
    """One of two is not both, and two are not one."""
    specs, images = images_of("two_objects", seed=14)
    only_first = [Specification("one_object", spec.kinds[:1]) for spec in specs]
    assert verify(images, only_first).mean() <= 0.05
    generator = np.random.default_rng(0)
    single = np.stack([render(sample_scene(spec, generator)) for spec in only_first])
    assert verify(single, specs).mean() <= 0.05


def blob(name: str) -> np.ndarray:
    """Red things that are nearly a circle, a square or a triangle."""
    image = np.empty((32, 32, 3), np.uint8)
    image[:] = BACKGROUND
    rows, columns = np.mgrid[0:32, 0:32]
    masks = {
        "ellipse": ((rows - 16) / 5) ** 2 + ((columns - 16) / 9) ** 2 <= 1,
        "bar": (abs(rows - 16) <= 3) & (abs(columns - 16) <= 7),
        "ring": (np.hypot(rows - 16, columns - 16) <= 8) & (np.hypot(rows - 16, columns - 16) >= 5),
        "cross": (abs(rows - 16) <= 2) & (abs(columns - 16) <= 8) | (abs(rows - 16) <= 8) & (abs(columns - 16) <= 2),
        "dot": np.hypot(rows - 16, columns - 16) <= 1.5,
        "half disc": (np.hypot(rows - 16, columns - 16) <= 8) & (rows <= 16),
        "upside-down triangle": (rows >= 8) & (rows <= 24) & (abs(columns - 16) <= (24 - rows) / 2),
        "everything": rows >= 0,
    }
    image[masks[name]] = PALETTE["red"]
    return image


@pytest.mark.parametrize(
    "name", ["ellipse", "bar", "ring", "cross", "dot", "half disc", "upside-down triangle", "everything"]
)
def test_no_to_what_is_nearly_a_shape(name):
    """A policy that is rewarded must not get away with a blob."""
    images = np.stack([blob(name)] * len(SHAPES))
    assert not verify(images, [parse_caption(f"a red {shape}") for shape in SHAPES]).any()


def test_no_to_dim_objects_noise_and_empty_images():
    """Half a colour is not a colour, and a good object among clutter is not a good image."""
    spec = parse_caption("a red circle")
    image = render(sample_scene(spec, np.random.default_rng(2))).astype(float)
    background = np.array(BACKGROUND, float)
    dim = background + 0.55 * (image - background)
    cluttered = image.copy()
    cluttered[::5, ::5] = 200.0
    empty = np.broadcast_to(background, image.shape)
    noise = np.random.default_rng(3).uniform(0, 255, image.shape)
    images = np.stack([dim, cluttered, empty, noise]).astype(np.uint8)
    assert not verify(images, [spec] * len(images)).any()


def test_a_little_blur_and_noise_is_forgiven():
    """What an autoencoder does to an image is not the image's fault."""
    specs, images = images_of("one_object", seed=15)
    blurred = images.astype(float)
    for axis in (1, 2):
        blurred = 0.8 * blurred + 0.1 * np.roll(blurred, 1, axis) + 0.1 * np.roll(blurred, -1, axis)
    blurred += np.random.default_rng(0).normal(0, 4, images.shape)
    assert verify(blurred.clip(0, 255).astype(np.uint8), specs).mean() >= 0.9

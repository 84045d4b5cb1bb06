"""What pages are made of: templates with the project's way to write numbers, and images as data: URIs."""

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from latentac.runs.reporting.summary import AGAIN, Files, read_json
from latentac.system.errors import IntegrityError, describe
from latentac.system.terminal import printable

_ARMS = {"base": "evaluate", "incumbent": "evaluate", "trained": "evaluate", "steered": "steer"}
_INDEX = ("prompts", "seeds", "image_size", "columns")
_MAX_IMAGE = 256  # pixels a side; larger images are reduced, so that a gallery stays within a few MB
_MOST_PIXELS = 2**27
"""Of a file: 128 images of 1,024 x 1,024. A PNG of a few kB can say that it has a billion."""


def images_of(files: Files, gallery: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """data: URIs of PNGs: the gallery's images for each arm that there is, and `served`, at most one."""
    images: dict[str, list[str]] = {}
    if gallery is not None:
        for arm, step in _ARMS.items():
            if step in files:
                manifest, folder = files[step]
                index = read_json(files[step], "gallery/gallery.json")
                if any(index.get(name) != gallery.get(name) for name in _INDEX):
                    problem = "its gallery has other prompts, seeds or sizes than that of evaluate"
                    raise IntegrityError(manifest.key, problem, AGAIN)
                if arm == "incumbent" and not (folder / "gallery" / "incumbent.png").exists():
                    continue
                images[arm] = _cut(folder / "gallery" / f"{arm}.png", manifest.key, gallery)
    if "deploy" in files:
        manifest, folder = files["deploy"]
        with _opened(folder / "image.png", manifest.key) as image:
            images["served"] = [_uri(image.convert("RGB"))]
    return images


def _cut(sheet: Path, key: str, gallery: Mapping[str, Any]) -> list[str]:
    """The images of a contact sheet, row by row."""
    count, columns, size = len(gallery["prompts"]), gallery["columns"], gallery["image_size"]
    height, width = sides(size)
    expected = (columns * width, math.ceil(count / columns) * height)
    with _opened(sheet, key) as image:
        if image.size != expected:
            problem = f"gallery/{sheet.name} is {image.size} pixels, gallery.json says {expected}"
            raise IntegrityError(key, problem, AGAIN)
        corners = [(index % columns * width, index // columns * height) for index in range(count)]
        cells = [image.crop((x, y, x + width, y + height)).convert("RGB") for x, y in corners]
    return [_uri(cell) for cell in cells]


def sides(size: int | list[int]) -> tuple[int, int]:
    """Height and width of a gallery's images. Older versions knew squares only, and wrote one number."""
    height, width = size if isinstance(size, list) else (size, size)
    return height, width


@contextmanager
def _opened(file: Path, key: str) -> Iterator[Any]:
    """A PNG of an artifact as a PIL image. Raises IntegrityError where it is none that steps write."""
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:  # other formats' readers run programs
            if math.prod(image.size) > _MOST_PIXELS or image.mode not in ("RGB", "L"):
                raise ValueError(f"it has {image.size} pixels of mode {image.mode}")
            image.load()
            yield image
    except (IntegrityError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever the decoder raises
        problem = f"{file.name} is not an image that can be shown ({describe(error, 200)})"
        raise IntegrityError(key, problem, AGAIN) from None


def _uri(image: Any) -> str:
    """A data: URI of a PIL image."""
    if max(image.size) > _MAX_IMAGE:
        image.thumbnail((_MAX_IMAGE, _MAX_IMAGE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render(template: str, **values: Any) -> str:
    """The page that a template of `templates` gives for `values`; words are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("latentac.runs.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "short": short,
        "shorter_side": lambda size: min(sides(size)),
        "flat": flat,
        "json": partial(json.dumps, indent=2),
    }
    return environment.get_template(template).render(**values) + "\n"


def _plain(value: Any) -> Any:
    """Text without characters that turn the words behind it around; what is markup already has been made here."""
    return printable(value) if type(value) is str else value


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A number as the report writes it, with a real minus; a dash for none."""
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''}.{0 if isinstance(value, int) else digits}f}"
    return text.replace("-", "−")


def short(value: Any) -> str:
    """A whole number in full, another with three significant digits, a string bare, anything else as JSON."""
    if isinstance(value, float) and math.isfinite(value):
        return (f"{value:.0f}" if value.is_integer() else f"{value:.3g}").replace("-", "−")
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def flat(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """`a.b.c` and the value as written, for every leaf of nested settings."""
    if isinstance(settings, list) and not any(isinstance(item, dict | list) for item in settings):
        settings = json.dumps(settings, ensure_ascii=False)
    if not isinstance(settings, dict | list):
        yield path, settings if isinstance(settings, str) else json.dumps(settings)
        return
    for name, item in settings.items() if isinstance(settings, dict) else enumerate(settings):
        yield from flat(item, f"{path}.{name}".lstrip("."))

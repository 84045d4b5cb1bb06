"""The JSON files that steps publish and others read: the shape of each, checked before anything is made of it.

A run's artifacts may be somebody else's. Their hashes say that they are whole, not what is in them. So a file is read
through `parse` or `read` alone: what does not have its shape is one IntegrityError that names file, field and value.
A shape has what is used of a file. Further fields are ignored, and those of later versions have defaults, so what
earlier versions published is read too.
"""

import reprlib
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from latentac.store.shapes import SHAPES
from latentac.system.errors import IntegrityError
from latentac.system.reading import read_bytes, record

_MOST_SHOWN = 80


_ADAPTERS = {name: TypeAdapter[Any](shape) for name, shape in SHAPES.items()}
_AGAIN = "Run the step that writes it again, with this version of latentac"


def parse(raw: str | bytes, where: str, remedy: str = _AGAIN) -> Any:
    """The JSON of a file, as it is written, if it has its shape. where: the file's place, which ends in its name.

    Raises IntegrityError that names it, the field and its value.
    """
    return checked(record(raw, where), where, remedy)


def read(file: Path, where: str = "", remedy: str = _AGAIN) -> Any:
    """`parse` of a regular file of bounded size. where: its place for messages, if that is another than its path."""
    where = where or str(file)
    try:
        return parse(read_bytes(file), where, remedy)
    except ValueError as error:
        raise IntegrityError(where, str(error), remedy) from None


def checked(content: Any, where: str, remedy: str = _AGAIN) -> Any:
    """`content`, if it has the shape of the file at `where`. Raises IntegrityError."""
    try:
        _ADAPTERS[where.rpartition("/")[2]].validate_python(content, strict=True)
    except ValidationError as error:
        raise IntegrityError(where, problem_of(error), remedy) from None
    return content


def metric(manifest: Any, name: str, kind: type) -> Any:
    """What a manifest's metrics say under `name`. Raises IntegrityError where that is nothing of this kind."""
    value = manifest.metrics.get(name)
    if type(value) is not kind:
        where = f"{manifest.key}/manifest.json"
        raise IntegrityError(where, f"metrics.{name} is {_shown(value)}, and must be of type {kind.__name__}", _AGAIN)
    return value


def problem_of(error: ValidationError) -> str:
    """The first thing that is wrong: its field, its value, and what that must be."""
    first = error.errors(include_url=False)[0]
    field = ".".join(_cut(str(part)) for part in first["loc"])
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if first["type"] == "missing":
        return f"it has no field {field}"
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # of fields that do not fit each other
        return f"{field}: {message}" if field else message
    message = message.replace("Input should", "must")
    return f"{field or 'its content'} is {_shown(first['input'])}, and {message}"


def _shown(value: Any) -> str:
    return _cut(reprlib.repr(value))  # not repr: the value may be the whole file


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."

"""The configuration explained: `latentac config show` and `latentac config fields`, and the page that is made of them.

Everything is read off the classes: a field's type, default, bounds and the text below it.
"""

import json
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from latentac.config.extensions import declared_settings
from latentac.config.schema import Config, suggestion
from latentac.config.sections import Extension
from latentac.config.validation import section_of
from latentac.runs.resolution import TABLES
from latentac.system.errors import ConfigError, Problem

_WIDTH = 110


def commented_yaml(config: Config) -> str:
    """The configuration as YAML that can be given back as a file, with each field's description above it."""
    return "\n".join(_yaml(config, type(config), "", 0)) + "\n"


def fields_text(path: str = "") -> str:
    """The reference of a section, a field or a table's rows, as text for a terminal. Raises ConfigError.

    path: `train`, `rewards.weight`, `algorithm.grpo` (a row), `algorithm.grpo.group_size`; "" for everything.
    """
    return "\n".join(_text(one) for one in _entries(path)).strip() + "\n"


def fields_markdown() -> str:
    """The whole reference as a page of Markdown."""
    lines = [
        "# Configuration",
        "",
        "`make reference` writes this page from the classes. `latentac config fields` prints the same text.",
        "",
    ]
    for title, message, rows in _sections():
        lines += [f"## {title}", "", message, "", "| Field | Type | Default | Meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(text)} |" for name, kind, default, text in rows
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


Row = tuple[str, str, str, str]
"""Name, type, default and description of a field."""


def _sections() -> Iterator[tuple[str, str, list[Row]]]:
    """Title, description and fields of each section, and of each row of a table that can stand there."""
    yield "Top level", _described(Config), _rows(Config)
    yield from _below(Config, "")


def _below(section: type[BaseModel], path: str) -> Iterator[tuple[str, str, list[Row]]]:
    for name in section.model_fields:
        below, place = section_of(section, name), f"{path}.{name}".lstrip(".")
        if below is None:
            continue
        yield place, _described(below), _rows(below)
        if place in TABLES:
            for row in TABLES[place]:
                kind = TABLES[place].load(row)
                settings = declared_settings(kind)
                own = _rows(settings) if settings else []
                yield f"{place}, use: {row}", _described(kind), own
        yield from _below(below, place)


def _entries(path: str) -> list[tuple[str, str, list[Row]]]:
    """The sections that `path` names, cut down to one field where it names one."""
    found = list(_sections())
    if not path:
        return found
    titles = {title.replace(", use: ", "."): entry for entry in found for title in [entry[0]]}
    exact = [entry for title, entry in titles.items() if title == path or title.startswith(f"{path}.")]
    if exact:
        return exact
    above, _, name = path.rpartition(".")
    title, _, rows = titles.get(above or "Top level", ("", "", []))
    named = [row for row in rows if row[0] == name]
    if not named:
        known = [title for title in titles if title != "Top level"]
        raise ConfigError([Problem("config fields", path, "names no section and no field", suggestion(path, known))])
    return [(title, "", named)]


def _rows(section: type[BaseModel]) -> list[Row]:
    return [
        (name, _kind(field.annotation, field.metadata), _default(field), description(section, name))
        for name, field in section.model_fields.items()
    ]


def description(section: type[BaseModel], name: str) -> str:
    """The text below a field, or below the one that it overrides, on one line."""
    declared = [kind.model_fields.get(name) for kind in section.__mro__ if hasattr(kind, "model_fields")]
    return " ".join(next((field.description for field in declared if field and field.description), "").split())


def _kind(annotation: Any, metadata: Sequence[Any]) -> str:
    """The type in words, with its bounds."""
    bounds = {name: getattr(one, name) for one in metadata for name in ("gt", "ge", "lt", "le") if hasattr(one, name)}
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    text = ", ".join(f"{signs[name]} {value:g}" for name, value in bounds.items() if value is not None)
    return _name(annotation) + (f" {text}" if text else "")


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0], [one for each in arguments[1:] for one in getattr(each, "metadata", [each])])
    if origin in (list, Sequence):
        return f"list of {_name(arguments[0])}"
    if origin is dict:
        return f"{_name(arguments[0])} -> {_name(arguments[1])}"
    if arguments:
        return " or ".join(_name(one) for one in arguments)
    plain = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
    return plain.get(annotation) or ("section" if hasattr(annotation, "model_fields") else annotation.__name__)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Extension):
        return f"`{{use: {value.use}}}`"
    return "" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def _described(kind: Any) -> str:
    """The first paragraph of a docstring."""
    first = (kind.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(first.split())


def _text(entry: tuple[str, str, list[Row]]) -> str:
    title, message, rows = entry
    lines = [title, *textwrap.wrap(message, _WIDTH, initial_indent="  ", subsequent_indent="  ")]
    for name, kind, default, text in rows:
        plain = "; ".join(part.replace("`", "") for part in (kind, default and f"default {default}") if part)
        lines.append(f"  {name}: {plain}".replace("default required", "required"))
        lines += textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _yaml(section: BaseModel, kind: type[BaseModel], path: str, depth: int) -> Iterator[str]:
    """The fields of a section, those of an extension's own settings last."""
    described = dict.fromkeys(kind.model_fields, kind)
    if isinstance(section, Extension) and (table := TABLES.get(path)) is not None:
        settings = declared_settings(table.load(section.use))
        described |= dict.fromkeys(settings.model_fields, settings) if settings else {}
    values = {name: getattr(section, name) for name in kind.model_fields} | dict(section.model_extra or {})
    for name, value in values.items():
        place = f"{path}.{name}".lstrip(".")
        yield from _comment(description(described[name], name) if name in described else "", depth)
        yield from _value(name, value, place, depth)


def _value(name: str, value: Any, place: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, BaseModel):
        yield f"{indent}{name}:"
        yield from _yaml(value, type(value), place, depth + 1)
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        yield f"{indent}{name}:"
        commented: set[str] = set()  # entries have most of their fields in common
        for item in value:
            lines = [line for line in _yaml(item, type(item), place, depth + 2) if line not in commented]
            commented |= {line for line in lines if line.lstrip().startswith("#")}
            first = next(number for number, line in enumerate(lines) if line not in commented)
            lines[first] = f"{indent}  - {lines[first].lstrip()}"
            yield from lines
    else:
        yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    """JSON is YAML; a text that needs no quotes goes without."""
    if isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum() and not value[0].isdigit():
        return value if value.lower() not in {"true", "false", "null", "yes", "no", "on", "off"} else json.dumps(value)
    shown = json.dumps(value if not isinstance(value, Mapping) else dict(value), ensure_ascii=False)
    return re.sub(r"^(-?\d+)e", r"\1.0e", shown) if isinstance(value, float) else shown  # YAML 1.1 reads 1e-05 as text


def _comment(text: str, depth: int) -> list[str]:
    indent = "  " * depth + "# "
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)

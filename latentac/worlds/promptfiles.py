"""Files of prompts: JSON, JSONL, CSV and plain text, read strictly. Every problem is reported with its line.

| Ending | Content |
|---|---|
| .json | {"train": [...], "held_out": [...]}, or one list |
| .jsonl, .ndjson | one entry a line |
| .csv | a header, then one prompt a row; separated by commas, semicolons or tabs |
| .txt | one prompt a line |

An entry is a text, or an object: `prompt` or else `text` is the text, `category` or else `tag` the category, everything
else metadata; so is what an object under `metadata` holds.
"""

import codecs
import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentac.system.reading import has_more_values
from latentac.worlds.prompttext import (
    MAX_CATEGORY,
    MAX_CHARACTERS,
    MAX_DEPTH,
    Repeated,
    kind_of,
    shown,
    text_problem,
    value_problem,
)

SPLITS = ("train", "held_out")
_MAX_LINE = 1_000_000
_MAX_BYTES = 256 * 2**20
_MAX_LINES = 1_000_000
_MAX_VALUES = 8_000_000
"""Of all JSON, or of the cells of a table: read, each takes some 60 bytes."""
_SOLID = re.compile(r"[^ \t\n\r]")
_MARKS = {  # UTF-32 first: its mark begins like that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_ZEROS = {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE", "x000": "UTF-32LE", "000x": "UTF-32BE"}
"""Of four bytes in a row, those that are mostly zero in Latin text -> the encoding."""
_TEXT, _CATEGORY = ("prompt", "text"), ("category", "tag")


@dataclass(frozen=True)
class Row:
    """A prompt and where it stands: `prompts.jsonl, line 3`."""

    where: str
    text: str
    category: str = "all"
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Flaw:
    """What is wrong, where, and what to do about it."""

    where: str
    problem: str
    remedy: str = "Correct it, or take it out"


_EMPTY_LINE = ("is empty", "Take the line out")


class _Unreadable(Exception):
    """The file as a whole is none of prompts."""

    def __init__(self, problem: str, remedy: str, where: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.where = problem, remedy, where


def read_file(path: Path) -> tuple[dict[str, list[Row]], list[Flaw]]:
    """The rows of `path` by split, and what is wrong with the others. A file with one list has it under ""."""
    flaws: list[Flaw] = []
    try:
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise _Unreadable(f"is not a supported format: {path.suffix or 'no ending'}", _formats())
        return reader(path.name, _text_of(path), flaws), flaws
    except _Unreadable as error:
        place = f"{path.name}, {error.where}" if error.where else str(path)
        return {}, [*flaws, Flaw(place, error.problem, error.remedy)]


def _formats() -> str:
    return f"Use a file that ends in {', '.join(READERS)}"


def _text_of(path: Path) -> str:
    """The file's characters, without a byte order mark."""
    try:
        if not path.is_file():
            raise _Unreadable("is not a file" if path.exists() else "does not exist", _formats())
        if path.stat().st_size > _MAX_BYTES:
            raise _Unreadable(f"is larger than {_MAX_BYTES // 2**20} MiB", _formats())
        raw = path.read_bytes()
    except OSError as error:
        raise _Unreadable(f"cannot be read: {error.strerror}", "Give this user the right to read it") from None
    if encoding := _wide_encoding(raw):
        remedy = f"Convert it: iconv -f {encoding} -t UTF-8 {path.name}"
        raise _Unreadable(f"is {encoding}, and only UTF-8 is read", remedy)
    if raw.count(b"\n") > _MAX_LINES:
        raise _Unreadable(f"has more than {_MAX_LINES:,} lines", "Train on a part of them")
    try:
        content = raw.decode("utf-8-sig")
        if path.suffix.lower().startswith(".json") and has_more_values(content, _MAX_VALUES):
            raise _Unreadable(f"has more than {_MAX_VALUES:,} values", "Train on a part of them")
        return content
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        problem = f"is not UTF-8 (byte 0x{byte:02x}): perhaps Latin-1 or Windows-1252"
        remedy = f"Save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
        raise _Unreadable(problem, remedy, f"line {line}") from None


def _wide_encoding(raw: bytes) -> str:
    """UTF-16 or UTF-32 by its byte order mark, or by where Latin text has its zero bytes; "" for anything else."""
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            return encoding
    return _ZEROS.get("".join("0" if raw[place::4].count(0) * 8 > len(raw) else "x" for place in range(4)), "")


def _json(name: str, content: str, flaws: list[Flaw]) -> dict[str, list[Row]]:
    try:
        found = json.loads(content, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        hint = "One object a line is JSONL: name it .jsonl" if error.msg == "Extra data" else "Correct the file"
        raise _Unreadable(f"is not JSON: {error.msg}, column {error.colno}", hint, f"line {error.lineno}") from None
    except (ValueError, RecursionError) as error:
        raise _Unreadable(_undecodable(error), "Correct the file") from None
    if isinstance(found, list):
        return {"": _entries(name, "", found, _item_lines(content, ""), flaws)}
    form = 'Use {"train": [...], "held_out": [...]}, or one list'
    if isinstance(found, Repeated):
        raise _Unreadable(f"has {shown(found.key)} twice", form)
    if not isinstance(found, dict):
        raise _Unreadable(f"holds {kind_of(found)}, and no prompts", form)
    flaws += [
        Flaw(f"{name}, {shown(key)}", "is not a key of a prompt file", form) for key in found if key not in SPLITS
    ]
    rows = {}
    for split in SPLITS:
        entries = found.get(split)
        if isinstance(entries, list):
            rows[split] = _entries(name, split, entries, _item_lines(content, split), flaws)
        else:
            problem = "is missing" if split not in found else f"is {kind_of(entries)} and no list"
            flaws.append(Flaw(f"{name}, {split}", problem, form))
    return rows


def _entries(name: str, split: str, entries: Sequence[Any], lines: Iterator[int], flaws: list[Flaw]) -> list[Row]:
    places = (f"{name}, line {line}, {split}[{index}]" for index, line in enumerate(lines))
    return _rows(zip(places, entries, strict=True), flaws)


def _item_lines(content: str, key: str) -> Iterator[int]:
    """The line that each item of a list begins in. content: valid JSON with unique keys, which is that list, or for a
    `key` an object that has it there."""
    decoder, place = json.JSONDecoder(), _after(content, 0)
    while key:  # past the object's brace or comma: a name, a colon, a value
        name, place = decoder.raw_decode(content, _after(content, place + 1))
        place = _after(content, _after(content, place) + 1)
        if name == key:
            break
        place = _after(content, decoder.raw_decode(content, place)[1])
    line, counted, place = 1, 0, _after(content, place + 1)
    while content[place] != "]":
        line, counted = line + content.count("\n", counted, place), place
        yield line
        place = _after(content, decoder.raw_decode(content, place)[1])
        place = _after(content, place + 1) if content[place] == "," else place


def _after(content: str, place: int) -> int:
    """The first place from `place` on that is not white space."""
    found = _SOLID.search(content, place)
    return found.start() if found else len(content)


def _jsonl(name: str, content: str, flaws: list[Flaw]) -> dict[str, list[Row]]:
    def decoded() -> Iterator[tuple[str, Any]]:
        for where, line in _lines(name, content, flaws):
            try:
                yield where, json.loads(line, object_pairs_hook=_object)
            except json.JSONDecodeError as error:
                flaws.append(Flaw(where, f"is not JSON: {error.msg}, column {error.colno}"))
            except (ValueError, RecursionError) as error:
                flaws.append(Flaw(where, _undecodable(error)))

    return {"": _rows(decoded(), flaws)}


def _text(name: str, content: str, flaws: list[Flaw]) -> dict[str, list[Row]]:
    return {"": _rows(((where, line.strip(" \t")) for where, line in _lines(name, content, flaws)), flaws)}


def _lines(name: str, content: str, flaws: list[Flaw]) -> Iterator[tuple[str, str]]:
    """Each line and its place. Empty lines at the end are none; others are flaws, and so is what is too long."""
    lines = content.rstrip(" \t\r\n").split("\n") if content.strip() else []
    for number, line in enumerate(lines, 1):
        where, line = f"{name}, line {number}", line.removesuffix("\r")
        if not line.strip(" \t"):
            flaws.append(Flaw(where, *_EMPTY_LINE))
        elif len(line) > _MAX_LINE:
            flaws.append(Flaw(where, f"has {len(line)} characters, above {_MAX_LINE}"))
        else:
            yield where, line


def _csv(name: str, content: str, flaws: list[Flaw]) -> dict[str, list[Row]]:
    if not content.strip():
        return {"": []}
    header, separator = _header(name, content)
    if len(header) * content.count("\n") > _MAX_VALUES:
        raise _Unreadable(f"has more than {_MAX_VALUES:,} cells", "Train on a part of them")
    reader = csv.reader(io.StringIO(content.rstrip("\r\n") + "\n", newline=""), delimiter=separator, strict=True)

    def entries() -> Iterator[tuple[str, Any]]:
        line = 1
        try:
            for number, cells in enumerate(reader):
                where, line = f"{name}, line {line}", reader.line_num + 1
                if number == 0:
                    continue
                if len(cells) != len(header):
                    problem = f"has {len(cells)} cells, and the header {len(header)}"
                    flaw = Flaw(where, problem, "Put a cell that holds the separator into double quotes")
                    flaws.append(flaw if cells else Flaw(where, *_EMPTY_LINE))
                else:
                    yield where, _from_cells(header, cells)
        except csv.Error as error:
            large = "field larger" in str(error)
            remedy = "Shorten it, or use JSONL" if large else "Close what double quotes open"
            flaws.append(Flaw(f"{name}, line {line}", f"is not CSV: {error}", remedy))

    return {"": _rows(entries(), flaws)}


def _header(name: str, content: str) -> tuple[list[str], str]:
    """The names of the columns, and what separates them."""
    first = content.split("\n", 1)[0].rstrip("\r")
    for separator in ",;\t":
        try:
            names = [cell.strip() for cell in next(csv.reader([first], delimiter=separator), [])]
        except csv.Error:
            continue
        names = [known if (known := each.lower()) in (*_TEXT, *_CATEGORY) else each for each in names]
        if set(_TEXT) & set(names):
            if len(set(names)) < len(names) or "" in names:
                raise _Unreadable("names a column twice, or not at all", "Give each column its name", "line 1")
            return names, separator
    problem = f"has no column `prompt` or `text`: {first[:80]!r}"
    raise _Unreadable(problem, "Write the names of the columns into the first line", "line 1")


def _from_cells(header: Sequence[str], cells: Sequence[str]) -> Any:
    """As a JSON object. White space around a cell is not a part of it. An empty cell is none, unless it is that of the
    text; `metadata` holds JSON."""
    trimmed = zip(header, (cell.strip() for cell in cells), strict=True)
    found: dict[str, Any] = {column: cell for column, cell in trimmed if cell or column in _TEXT}
    if "prompt" in found and not found.get("text", "text"):
        del found["text"]
    if "metadata" in found:
        with contextlib.suppress(ValueError, RecursionError):  # it stays text, and is refused as that
            found["metadata"] = json.loads(found["metadata"], object_pairs_hook=_object)
    return found


READERS: Mapping[str, Callable[[str, str, list[Flaw]], dict[str, list[Row]]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".txt": _text,
}


def _rows(entries: Iterator[tuple[str, Any]], flaws: list[Flaw]) -> list[Row]:
    rows = []
    for where, entry in entries:
        found = _row(where, entry)
        if isinstance(found, Row):
            rows.append(found)
        else:
            flaws.append(found)
    return rows


def _row(where: str, entry: Any) -> Row | Flaw:
    if isinstance(entry, str):
        entry = {"text": entry}
    if isinstance(entry, Repeated):
        return Flaw(where, f"has {shown(entry.key)} twice")
    if not isinstance(entry, dict):
        return Flaw(where, f"is {kind_of(entry)}, and neither text nor an object")
    rest = dict(entry)
    text_key = next((key for key in _TEXT if key in rest), None)
    if text_key is None:
        return Flaw(where, "has neither `prompt` nor `text`")
    text = rest.pop(text_key)
    if problem := text_problem(text, MAX_CHARACTERS):
        return Flaw(f"{where}, {text_key}" if len(entry) > 1 else where, problem)
    category_key = next((key for key in _CATEGORY if key in rest), None)
    category = rest.pop(category_key) if category_key else "all"
    if problem := text_problem(category, MAX_CATEGORY, "\t\n\r"):
        return Flaw(f"{where}, {category_key}", problem)
    nested = rest.pop("metadata", {})
    if isinstance(nested, Repeated):
        return Flaw(f"{where}, metadata", f"has {shown(nested.key)} twice")
    if not isinstance(nested, dict):
        return Flaw(f"{where}, metadata", f"is {kind_of(nested)} and no object")
    if shared := rest.keys() & nested.keys():
        return Flaw(where, f"has {shown(min(shared))} twice: beside the text and in `metadata`")
    metadata = {**rest, **nested}
    for key, value in metadata.items():
        if found := value_problem(key, value):
            return Flaw(f"{where}, {shown(key)}", found)
    return Row(where, text, category, metadata)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            return Repeated(key)
        found[key] = value
    return found


def _undecodable(error: Exception) -> str:
    """Of what is JSON by its grammar, and cannot be held."""
    if isinstance(error, RecursionError):
        return f"is nested more than {MAX_DEPTH} deep"
    return f"cannot be read as JSON: {' '.join(str(error).split())[:100]}"

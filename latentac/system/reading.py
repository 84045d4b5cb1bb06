"""What may come from anywhere: JSON of the store, of a run's folder, of another program; numbers of a command line and
of the environment.

To open a pipe waits for whoever writes to it. A file that a user names may be one (`<(...)`), and is waited for within
a bound; a file that a program wrote is none.
"""

import argparse
import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentac.system.errors import ConfigError, IntegrityError, Problem
from latentac.system.waiting import within

PIPE_SECONDS = 10.0
MOST_SECONDS = 365 * 86400.0
SEEDS, PORTS = (0, 2**63 - 1), (0, 65535)

MOST_BYTES, MOST_VALUES, MOST_DEPTH = 32 * 2**20, 3_000_000, 64
"""Of a JSON text. A run of a hundred thousand iterations stays below; read, its values take some 100 bytes each."""

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for what is no JSON, is larger or nested deeper than what is written here, or has half a
    character, which neither a file nor a terminal can hold."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    content = text if isinstance(text, str) else text.decode()
    if has_more_values(content, MOST_VALUES):
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    try:
        found = json.loads(content)
        if _depth(found) > MOST_DEPTH:
            raise ValueError("it is nested too deep")
        if _SURROGATE.search(content):  # both halves are one character; json joins them
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return found


def read_given(file: Path, most: int = 2**20, encoding: str = "utf-8") -> str:
    """The first `most` characters of what a user names. Raises OSError, also where it gives no end within PIPE_SECONDS,
    and ValueError where it is no such text or no name of a file."""

    def read() -> str:
        with file.open(encoding=encoding) as stream:
            return stream.read(most)

    return within(PIPE_SECONDS, read)


def has_more_values(text: str, most: int) -> bool:
    """Whether a JSON text has more than `most` values, before it is read: each comes behind one of three characters."""

    def marks(text: str) -> int:
        return sum(map(text.count, ",[{"))

    return marks(text) > most and marks(_STRING.sub("", text)) > most


def _depth(found: Any) -> int:
    """How deep JSON is nested."""
    depth, level = 0, [found]
    while inner := [each for each in level if isinstance(each, dict | list)]:
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


def read_bytes(file: Path) -> bytes:
    """A regular file of at most MOST_BYTES. Raises ValueError for anything else, OSError."""
    # Without O_NONBLOCK a pipe would be waited for.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    return content


def read_record(file: Path) -> Any:
    """The JSON of a file of a run. Raises IntegrityError where it holds none, OSError where it cannot be read."""
    try:
        content = read_bytes(file)
    except ValueError as error:
        raise IntegrityError(str(file), str(error), "Remove it, and run the step that writes it again") from None
    return record(content, str(file))


def read_json(file: Path) -> Any:
    """The JSON of a file that anybody may have written. Raises ValueError, OSError."""
    return parse_json(read_bytes(file))


def record(text: str | bytes, where: str) -> Any:
    """The JSON of a file that this program writes. Raises IntegrityError, with `where` it is from, where it is none."""
    try:
        return parse_json(text)
    except ValueError as error:
        remedy = "Remove it and run the step that writes it"
        raise IntegrityError(where, f"it is not JSON ({error})", remedy) from None


def whole(least: int, most: int) -> Callable[[str], int]:
    """What reads an option: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        found = _whole(text, least, most)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number from {least} to {most}")
        return found

    return read


def whole_variable(name: str, least: int, most: int, default: int) -> int:
    """The whole number in the environment variable `name`, `default` where it is unset or empty. Raises ConfigError."""
    text = os.environ.get(name, "").strip()
    found = _whole(text, least, most) if text else default
    if found is None:
        problem = f"is not a whole number from {least} to {most}"
        raise ConfigError([Problem(name, text, problem, "Correct this environment variable, or unset it.")])
    return found


def _whole(text: str, least: int, most: int) -> int | None:
    """None where `text` is not a whole number from `least` to `most`."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text, re.ASCII) and least <= int(text) <= most else None


def seconds(text: str) -> float:
    """What reads an option: a time in seconds, up to a year."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MOST_SECONDS:  # so NaN is none either
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of seconds from 0 to {MOST_SECONDS:.0f}")
    return value

"""The fields of a configuration before it is one: nested dictionaries from files and `--set`, laid upon each other."""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from latentac.config.schema import Config, suggestion
from latentac.config.validation import section_of
from latentac.system.errors import ConfigError, Problem
from latentac.system.reading import read_given


class DuplicateKey(yaml.YAMLError):
    """A key that a mapping has twice: YAML forbids it, and PyYAML would take the last one without a word."""

    def __init__(self, key: object, first: int, second: int) -> None:
        lines = f"line {first}" if first == second else f"lines {first} and {second}"
        super().__init__(f"has the key {key!r:.100} twice, in {lines}")


MAX_CHARACTERS = 2**18
"""Of a YAML text. A configuration has a few thousand; PyYAML reads this many in some seconds."""

_MOST_EXPANDED, _MOST_NESTED, _MOST_DIGITS = 2**20, 50, 100
_UNUSABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


class TooMuch(yaml.YAMLError):
    """What a few lines of YAML can ask for, and no configuration needs."""


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader with unique keys and bounds: anchors make a few lines a billion values (`_Bounds`)."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise TooMuch(f"it has more than {MAX_CHARACTERS} characters")
        super().__init__(text)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _Bounds().of(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, int] = {}
        for name, _ in node.value:
            if name.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(name, deep=True), name.start_mark.line + 1
            if isinstance(key, Hashable):  # else the loader itself complains
                if key in found:
                    raise DuplicateKey(key, found[key], line)
                found[key] = line
        return super().construct_mapping(node, deep)


class _Bounds:
    """Characters and levels of a node with all that its aliases repeat; each anchor is counted once, so it is quick."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int] | None] = {}

    def of(self, node: yaml.Node) -> tuple[int, int]:
        """Raises TooMuch for a node beyond the bounds, or with a character that no name, path or terminal can hold."""
        if id(node) not in self._known:
            self._known[id(node)] = None  # until it is known: it is being counted
            self._known[id(node)] = _scalar(node) if isinstance(node, yaml.ScalarNode) else self._all_in(node)
        found = self._known[id(node)]
        if found is None:
            raise TooMuch("an anchor holds itself")
        return found

    def _all_in(self, node: yaml.Node) -> tuple[int, int]:
        below = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        found = [self.of(part) for part in below]
        size, depth = 1 + sum(size for size, _ in found), 1 + max((depth for _, depth in found), default=0)
        if size > _MOST_EXPANDED:
            raise TooMuch(f"its anchors, written out, are more than {_MOST_EXPANDED} characters")
        if depth > _MOST_NESTED:
            raise TooMuch("it is nested too deep")
        return size, depth


def _scalar(node: yaml.ScalarNode) -> tuple[int, int]:
    if found := _UNUSABLE.search(node.value):
        raise TooMuch(f"it has the character {found[0]!a}, in line {node.start_mark.line + 1}")
    if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
        raise TooMuch(f"it has a number of {len(node.value)} characters")
    return 1 + len(node.value), 0


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(_UniqueKeys):
    """YAML 1.1 reads 1e-4 as text; everyone who types a learning rate means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

_PATH = r"[A-Za-z_]\w*(?:\.\w+){0,20}"
_NEXT = re.compile(rf"\s+(?=['\"]?{_PATH}=)")


def reason_of(error: Exception) -> str:
    """What PyYAML says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def read_yaml(text: str) -> Any:
    """YAML 1.1 with unique keys. Raises yaml.YAMLError, of which DuplicateKey names the key and its lines."""
    return _load(text, _UniqueKeys)


def _load(text: str, loader: type[_UniqueKeys]) -> Any:
    """Raises yaml.YAMLError, whatever PyYAML raises."""
    try:
        return yaml.load(text, loader)  # noqa: S506 - a SafeLoader that refuses more
    except RecursionError:
        raise TooMuch("it is nested too deep") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # what a tag does not fit
        raise yaml.YAMLError(f"a value is not what it says it is ({error})") from None


def read_file(path: Path) -> dict[str, Any]:
    """A YAML or JSON file as nested dictionaries. Raises ConfigError."""
    try:
        content = _load(read_given(path, MAX_CHARACTERS + 1), _Loader)
    except DuplicateKey as error:
        raise _single("--config", str(path), str(error), "Keep one of them.") from None
    except OSError as error:
        raise _single(
            "--config", str(path), f"cannot be read: {error.strerror or error}", "Name a YAML file."
        ) from error
    except UnicodeDecodeError as error:
        remedy = "Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8, or -f UTF-16."
        raise _single("--config", str(path), f"is not UTF-8 text (byte {error.start})", remedy) from error
    except ValueError:  # a zero in its name
        raise _single("--config", str(path), "cannot be the name of a file", "Name a YAML file.") from None
    except yaml.YAMLError as error:
        raise _single("--config", str(path), f"is not YAML: {reason_of(error)}", "Correct the file.") from error
    if not isinstance(content, dict):
        raise _single("--config", str(path), "does not hold fields", "Write `section:` and its fields below.")
    return content


def split(text: str) -> list[str]:
    """The assignments in `text`: parted where white space, outside of brackets and quotes, stands before a `path=`.

    `rewards=[{name: a, weight: 1}] prompts.source=my file.json seed=3` are three. An assignment as a whole may stand in
    quotes, too; those go.
    """
    parts, start, depth, quote, place = [], 0, 0, "", 0
    while place < len(text):
        character = text[place]
        if quote:
            if text.startswith("\\" if quote == '"' else "''", place):
                place += 1  # what is escaped does not close
            elif character == quote:
                quote = ""
        elif character in "'\"" and (place == start or text[place - 1] in " \t\n=,:[{"):
            quote = character  # elsewhere it is an apostrophe
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif depth <= 0 and not text[place - 1 : place].isspace() and (found := _NEXT.match(text, place)):
            parts.append(text[start:place])
            start = place = found.end()
            continue
        place += 1
    parts.append(text[start:])
    parts = [part.strip() for part in parts]
    return [part[1:-1] if re.fullmatch(r"'.*'|\".*\"", part, re.DOTALL) else part for part in parts if part]


def read_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """`a.b=value` strings as nested dictionaries; the values are YAML, and one string may hold several (`split`).

    Raises ConfigError.
    """
    merged: dict[str, Any] = {}
    for assignment in (part for given in assignments for part in split(given) or [given]):
        path, equals, text = assignment.partition("=")
        if not equals or not re.fullmatch(_PATH, path):
            raise _single(
                "--set", assignment, "is not path=value", "Write for example --set policy.learning_rate=1e-4."
            )
        try:
            nested: Any = _load(text, _Loader)
        except DuplicateKey as error:
            raise _single("--set", assignment, str(error), "Keep one of them.") from None
        except yaml.YAMLError as error:
            raise _single(
                "--set", assignment, f"has a value that is not YAML: {reason_of(error)}", "Quote it."
            ) from error
        for name in reversed(path.split(".")):
            nested = {name: nested}
        merged = merge(merged, nested)
    return merged


def merge(base: Mapping[str, Any], over: Mapping[str, Any], section: Any = Config) -> dict[str, Any]:
    """`over` laid upon `base`: dictionaries are merged field by field, everything else is replaced.

    An entry of a list is changed by its name or its index: `rewards.shapes_verifier.weight`. Where an extension's `use`
    changes, the settings of the former one fall away; the framework's fields (a weight, a number of steps) stay.
    section: the class whose fields these are, or None where it is not known. Raises ConfigError.
    """
    use = base.get("use")
    if use is not None and over.get("use", use) != use and section is not None:
        base = {name: value for name, value in base.items() if name in section.model_fields and name != "name"}
    result = dict(base)
    for name, value in over.items():
        below, nested = result.get(name), section_of(section, name)
        if isinstance(below, list) and isinstance(value, Mapping):
            result[name] = _merge_entries(name, below, value, nested)
        elif isinstance(below, Mapping) and isinstance(value, Mapping):
            result[name] = merge(below, value, nested)
        else:
            result[name] = value
    return result


def _merge_entries(field: str, entries: Sequence[Any], over: Mapping[str, Any], section: Any) -> list[Any]:
    """`over`: name or index of an entry -> what to change in it."""
    result = list(entries)
    names = [_name_of(entry) for entry in entries]
    for key, value in over.items():
        places = [place for place, name in enumerate(names) if name == key]
        if not places and str(key).isdigit() and int(key) < len(result):
            places = [int(key)]
        if len(places) != 1 or not isinstance(value, Mapping) or not isinstance(result[places[0]], Mapping):
            remedy = f"{suggestion(str(key), [name for name in names if name])} Or give the whole list."
            raise _single(field, key, "names no entry of the list", remedy)
        result[places[0]] = merge(result[places[0]], value, section)
    return result


def _name_of(entry: Any) -> str:
    """What an entry of a list of extensions is called."""
    found = (entry.get("name") or entry.get("use")) if isinstance(entry, Mapping) else None
    return str(found or "").rpartition(":")[2]


def _single(path: str, value: object, problem: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(path, value, problem, remedy)])

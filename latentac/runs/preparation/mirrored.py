"""The first check of `prepare`: whether the sources that a configuration names by addresses are whole in a store."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latentac.store import sources
from latentac.system.errors import ConfigError, Problem


def check_sources(fields: Mapping[str, Any]) -> None:
    """Look for each file of each source that `fields`, nested dictionaries of a configuration, name by an address of
    `latentac mirror`. Nothing is fetched. Raises ConfigError that names all files that are missing, StoreUnavailable.
    """
    problems: list[Problem] = []
    for field, address in addresses(fields):
        problems += sources.faults(str(address), field)
    if problems:
        raise ConfigError(problems)


def addresses(fields: Any, field: str = "") -> Iterator[tuple[str, sources.Address]]:
    """Each value that is the address of a source, after the path of its field. Entries of a list that have names are
    called by them."""
    if isinstance(fields, Mapping):
        below: Sequence[tuple[object, Any]] = list(fields.items())
    elif isinstance(fields, list):
        below = [(_name(one) or place, one) for place, one in enumerate(fields)]
    else:
        address = sources.parse_address(fields) if isinstance(fields, str) else None
        if address is not None:
            yield field, address
        return
    for name, value in below:
        yield from addresses(value, f"{field}.{name}".lstrip("."))


def _name(entry: Any) -> str:
    return str(entry.get("name") or entry.get("use") or "") if isinstance(entry, Mapping) else ""

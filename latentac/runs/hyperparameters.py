"""The settings of a run that say what it is: those that differ from their defaults, flat, for trackers."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from latentac.config.extensions import declared_settings
from latentac.config.schema import Config
from latentac.config.sections import Extension
from latentac.runs.resolution import TABLES

_SECRET = re.compile(r"(^|_)(key|token|secret|password|credential)s?($|_)", re.IGNORECASE)
_NO_EFFECT = {"tracking", "serving", "card"}


def hyperparameters(config: Config) -> dict[str, Any]:
    """`policy.learning_rate` -> value, of every setting that is not its default, those of extensions among them.

    Values are numbers, truths and text. What may be a secret by its name is left out.
    """
    found: dict[str, Any] = {}

    def collect(path: str, value: Any) -> None:
        if _SECRET.search(path.rpartition(".")[2]):
            return
        if isinstance(value, Mapping):
            for name, item in value.items():
                collect(f"{path}.{name}".lstrip("."), item)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                collect(f"{path}.{place}", item)
        else:
            found[path] = value if isinstance(value, bool | int | float | str) else str(value)

    collect("", config.model_dump(exclude_defaults=True, exclude=_NO_EFFECT))
    usual = {f"{path}.{name}": value for path, own in _usual(config) for name, value in own.items()}
    kept = {path: value for path, value in found.items() if path not in usual or usual[path] != value}
    return {**kept, "seed": config.seed}


def _usual(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each extension's path and the defaults of its own settings, as they are in `found`."""
    for path, table in TABLES.items():
        place: Any = config
        for name in path.split("."):
            place = getattr(place, name)
        for index, extension in enumerate(place) if isinstance(place, list) else ((None, place),):
            if not isinstance(extension, Extension):
                continue
            declared = declared_settings(table.load(extension.use))
            fields = declared.model_fields.items() if declared else ()
            defaults = {
                name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()
            }
            plain = {
                name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in defaults.items()
            }
            yield path if index is None else f"{path}.{index}", plain

"""Extensions: classes that a configuration names by a row of a table, or as `module:Class`, with settings of their own.

    class Sharpness:
        class Settings(Settings):
            radius: Positive = 3

        def __init__(self, settings):
            self.radius = settings.radius

A class that has `Settings` is built as `Class(settings, *context)`, any other as `Class(*context)`. What the context is
depends on the table: nothing for a reward, the rewards' weights for an algorithm, and so on (the README of each table).
"""

import inspect
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ValidationError

from latentac.config.schema import suggestion
from latentac.config.sections import Extension, Section
from latentac.system.errors import ConfigError, Problem, describe

ALLOWED = "LATENTAC_ALLOW_EXTENSIONS"
"""Environment variable: the `module:Class` addresses, separated by commas, that an artifact may name."""


class Settings(Section):
    """Base of an extension's own settings: frozen, strict, and no other fields than the declared ones."""


@dataclass(frozen=True)
class Table:
    """One kind of extension. kind: for messages, such as `reward`; rows: name -> `module:Class`."""

    kind: str
    rows: Mapping[str, str]

    def __iter__(self) -> Iterator[str]:
        """The names of the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def build(self, use: str, *context: Any, **own: Any) -> Any:
        """The extension `use` with the settings `own`: `KERNELS.build("ddim", noise=0.5)`. Raises ConfigError."""
        return self.make(Extension.model_validate({"use": use, **own}), *context)

    def load(self, use: str, path: str = "use") -> Any:
        """The class that `use` names. Imports its module. Raises ConfigError; `path` is the field that names it."""
        address = self.rows.get(use, use)
        module, _, attribute = address.partition(":")
        if not (module and attribute):
            remedy = f"{suggestion(use, list(self.rows))} Your own: module:Class."
            raise ConfigError([Problem(path, use, f"no such {self.kind}", remedy)])
        try:
            found: Any = import_module(module)
            for name in attribute.split("."):
                found = getattr(found, name)
        except (Exception, SystemExit) as error:  # a script that ends itself where it is imported is not a module
            remedy = (
                "Check the name, and that the steps can import the module: from the working directory, from the folder "
                "that --package names, or from their image."
            )
            if (
                isinstance(error, ModuleNotFoundError)
                and error.name
                and error.name.split(".")[0] != module.split(".")[0]
            ):
                remedy = f"Install {error.name} where the steps run."
            problem = f"cannot be imported ({describe(error)})"
            raise ConfigError([Problem(path, use, problem, remedy)]) from error
        if not inspect.isclass(found):
            raise ConfigError([Problem(path, use, f"is not a class but {type(found).__name__}", "Name a class.")])
        return found

    def settings(self, extension: Extension, path: str = "") -> BaseModel | None:
        """The validated settings of `extension`, defaults included; None where its class declares none.

        Raises ConfigError with every problem; `path` is where the configuration has the extension.
        """
        settings, problems = self.examine(extension, path)
        if problems:
            raise ConfigError(problems)
        return settings

    def examine(self, extension: Extension, path: str = "") -> tuple[BaseModel | None, list[Problem]]:
        """The settings of `extension` and all their problems. A setting that is not valid has its default in the
        result, which is None where that is not possible. Raises ConfigError where the class cannot be imported."""
        declared = declared_settings(self.load(extension.use, _joined(path, "use")))
        names = list(declared.model_fields) if declared else []
        taken = sorted(set(names) & set(type(extension).model_fields))
        if taken:
            problem = f"its Settings declare {', '.join(taken)}, which the configuration has for every {self.kind}"
            remedy = "Give them other names, or read those of the configuration."
            return None, [Problem(_joined(path, "use"), extension.use, problem, remedy)]
        known = [*names, *type(extension).model_fields]
        own, problems = dict(extension.own), []
        for name in [name for name in own if name not in names]:
            problem = f"{extension.use} has no such setting"
            problems.append(Problem(_joined(path, name), own.pop(name), problem, suggestion(name, known)))
        if declared is None:
            return None, problems
        for _ in range(2):
            try:
                return declared.model_validate(own), problems
            except ValidationError as error:
                details = error.errors(include_url=False)
            problems += [_problem(detail, path) for detail in details]
            wrong = {str(detail["loc"][0]) for detail in details if detail["loc"]}
            if not wrong & own.keys():  # something is missing, or a combination is wrong
                break
            own = {name: value for name, value in own.items() if name not in wrong}
        return None, problems

    def make(self, extension: Extension, *context: Any, path: str = "") -> Any:
        """The extension itself: `Class(settings, *context)`, or `Class(*context)`. Raises ConfigError."""
        settings = self.settings(extension, path)
        kind = self.load(extension.use, _joined(path, "use"))
        return kind(*context) if settings is None else kind(settings, *context)

    def check_row(self, use: str, where: str, allowed: Collection[str] | None = None) -> None:
        """Refuse what an artifact may not name: it may name rows, and a `module:Class` that the operator allows.

        where: the file that names it; allowed: addresses, by default those of LATENTAC_ALLOW_EXTENSIONS. Nothing is
        imported. Raises ConfigError.
        """
        if use in self.rows or use in (operator_allows() if allowed is None else allowed):
            return
        remedy = (
            f"If you trust that code, start with {ALLOWED}={use}" if ":" in use else suggestion(use, list(self.rows))
        )
        raise ConfigError([Problem(where, use, f"names a {self.kind} that is not built in", remedy)])


def operator_allows() -> frozenset[str]:
    """The addresses of LATENTAC_ALLOW_EXTENSIONS."""
    return frozenset(name.strip() for name in os.environ.get(ALLOWED, "").split(",") if name.strip())


def declared_settings(kind: Any) -> type[BaseModel] | None:
    """The class's `Settings`, or None. Raises ConfigError if that is not a pydantic model."""
    declared = getattr(kind, "Settings", None)
    if declared is None or (inspect.isclass(declared) and issubclass(declared, BaseModel)):
        return declared
    remedy = "Derive it from latentac.config.extensions.Settings."
    raise ConfigError([Problem(f"{kind.__name__}.Settings", declared, "is not a settings model", remedy)])


def prefixed(problems: Iterable[Problem], path: str) -> list[Problem]:
    """The problems with `path` before each one's own."""
    return [Problem(_joined(path, found.path), found.value, found.problem, found.remedy) for found in problems]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _problem(detail: Any, path: str) -> Problem:
    where = ".".join([part for part in (path, *map(str, detail["loc"])) if part])
    if detail["type"] == "missing":
        return Problem(where, None, "is required", f"Add it to the file, or --set {where}=...")
    problem = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    if isinstance(value, dict) and not detail["loc"]:  # of the whole: a combination of fields
        value = {name: item for name, item in value.items() if item is not None}
    return Problem(where, value, problem[0].lower() + problem[1:], "Correct the value.")

"""What can name a run or a project: such a name is a part of paths, and of keys in the store."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from latentac.system.errors import ConfigError, Problem

PLAIN = "none"
"""The method of what is not steered, in results and requests."""

RULE = "letters, digits, '.', '_' and '-', at most 100, beginning with a letter, a digit or '_'"


def is_name(text: str) -> bool:
    """Whether `text` is a name."""
    return re.fullmatch(r"(?!manifest\.json|files-)[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", text) is not None


_TAKEN = ("store", "checkpoints", "failures", "models", "registry", "sources", "tensorboard")
"""What lies beside runs in an output folder or a store."""


def working_folder(run: str, output: str) -> Path:
    """`<output>/<run>`. Raises ConfigError for an id that would lie elsewhere or hide itself; call it before anything
    is made."""
    if not is_name(run) or run in _TAKEN:
        remedy = f"Use {RULE}, and none of {', '.join(f'`{name}`' for name in _TAKEN)}"
        raise ConfigError([Problem("run", run, "cannot be the id of a run", remedy)])
    return Path(output) / run


def as_name(text: str) -> str:
    """`text` as a name: itself where it is one, else what is left of it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:100]
    return name if is_name(name) else f"named-{name}"[:100].rstrip(".-")


def _checked(text: str) -> str:
    if not is_name(text):
        raise PydanticCustomError("name", "Is not a valid name")
    return text


Name = Annotated[str, AfterValidator(_checked)]

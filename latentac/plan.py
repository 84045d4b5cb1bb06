"""What a run would do and need, and everything that would refuse it, found without writing anything."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from latentac import package as packages
from latentac.config import Config
from latentac.errors import ConfigError, LatentacError, Problem, ResourceError
from latentac.run import recipe_fields
from latentac.store import open_store
from latentac.validation import resolve
from latentac.workspace import existing, free_bytes

T = TypeVar("T")
_WEIGHTS = ("*.safetensors", "*.json", "*.txt")


@dataclass(frozen=True)
class Plan:
    """settings: None where they are refused themselves; disk, memory: bytes, None where the backbone is not here;
    refused: one message each."""

    settings: Config | None
    disk: int | None
    memory: int | None
    refused: tuple[str, ...]


def plan(recipe: str, config: str, overrides: Sequence[str], package: str, store: str, output: Path) -> Plan:
    """All that `prepare` would check, each check on its own, so that one refusal does not hide another."""
    refused: list[str] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except LatentacError as error:
            refused.extend(line for line in str(error).splitlines() if line not in refused)
            return None

    attempt(lambda: _check_output(output))
    attempt(lambda: _check_store(store))
    if package:
        attempt(lambda: _check_package(Path(package)))
    from latentac import preparation
    from latentac.prompts import load_prompts
    from latentac.resolution import resolve_all

    fields = attempt(lambda: recipe_fields(recipe, config, overrides))
    resolved = attempt(lambda: resolve_all(fields)) if fields is not None else None
    # An extension that is refused hides nothing else, a field that is wrong does.
    settings = resolved.config if resolved else attempt(lambda: resolve(fields)) if fields is not None else None
    if settings is None:
        return Plan(None, None, None, tuple(refused))
    attempt(lambda: preparation.check_machine(settings, output))
    prompts = attempt(lambda: load_prompts(settings.prompts.source))
    if prompts is not None and resolved is not None:
        attempt(lambda: preparation.check_rewards(resolved.rewards, prompts))
    attempt(lambda: _check_source(settings.backbone.source))
    disk, memory = attempt(lambda: requirements(settings)) or (None, None)
    free = free_bytes(output)
    if disk is not None and free < disk:
        problem = f"has {free / 2**20:.0f} MiB free, this run needs {disk / 2**20:.0f}"
        refused.append(str(ResourceError(str(output), problem, "Free some space")))
    return Plan(resolved.config if resolved else None, disk, memory, tuple(refused))


def requirements(settings: Config) -> tuple[int | None, int | None]:
    """Bytes of disk and of memory, by the sizes of the backbone's files: the weights once, again for each result, and
    with two moments each for checkpoints. None where the backbone is not on this machine yet."""
    folder = _local_source(settings.backbone.source)
    if folder is None:
        return None, None
    whole = sum(path.stat().st_size for pattern in _WEIGHTS for path in folder.rglob(pattern))
    parts = [folder / name for name in ("unet", "transformer") if (folder / name).is_dir()]
    trained = sum(path.stat().st_size for part in parts for path in part.glob("*.safetensors"))
    checkpoints = settings.train.keep_checkpoints + 1
    return whole + trained * (2 + 3 * checkpoints), settings.train.num_workers * (whole + 4 * trained)


def settings_text(settings: Config) -> str:
    """The resolved settings as `latentac config show` prints them."""
    from latentac.reference import commented_yaml

    return commented_yaml(settings)


def _local_source(source: str) -> Path | None:
    """The folder that `source` names on this machine; None for a hub id. Raises ConfigError for an unknown builtin."""
    if source.startswith("builtin:"):
        from latentac.shapes import builtin_pipeline

        return builtin_pipeline(source.removeprefix("builtin:"))
    return Path(source) if Path(source).is_dir() else None


def _check_source(source: str) -> None:
    """Refuse a backbone that is not there, or no pipeline; what is not on this machine yet is not fetched for it."""
    folder = _local_source(source)
    if folder is None:
        problem = "is no folder here" if Path(source).is_absolute() or source.startswith(".") else ""
    else:
        problem = "" if (folder / "model_index.json").is_file() else "has no model_index.json"
    if problem:
        remedy = "Use builtin:shapes-unet, a diffusers folder with safetensors weights, or a hub id"
        raise ConfigError([Problem("backbone.source", source, problem, remedy)])


def _check_package(folder: Path) -> None:
    """Raises ConfigError where it could not be shipped; else it is importable from here on."""
    packages.pack(folder)
    packages.make_importable(folder.parent if (folder / "__init__.py").is_file() else folder)


def _check_output(output: Path) -> None:
    there = existing(output)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "no folder can be made in it" if there.is_dir() else f"{there} is no folder"
        raise ResourceError(str(output), problem, "Choose another --output, or make it one that you may write to.")


def _check_store(store: str) -> None:
    """Whether the store can be read, and, if it is a folder, written to."""
    opened = open_store(store)
    if store.startswith("file://"):
        there = existing(Path(store.removeprefix("file://")).absolute())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            remedy = "Give this user the right to write there, or choose another place."
            raise ConfigError([Problem("--store", store, f"nothing can be written to {there}", remedy)])
    else:
        opened.keys("registry")

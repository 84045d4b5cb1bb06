"""A run's configuration from a recipe, a file and overrides."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentac.config.fields import merge, read_file, read_overrides
from latentac.config.recipes import RECIPES, default_project
from latentac.config.schema import Config, suggestion
from latentac.config.validation import resolve
from latentac.system.errors import ConfigError, Problem

if TYPE_CHECKING:
    pass


def load_config(recipe: str = "shapes-unet", overrides: Sequence[str] = (), *, file: str = "") -> Config:
    """The complete configuration of a recipe, a YAML file over it, and `path=value` overrides, for scripts.

    Raises ConfigError with every problem, those of extensions included.
    """
    from latentac.runs.resolution import resolve_all

    return resolve_all(recipe_fields(recipe, file, overrides)).config


def resolve_recipe(recipe: str, config: str = "", overrides: Sequence[str] = ()) -> Config:
    """The configuration that `recipe_fields` make, with the settings of extensions as they were given.

    Raises ConfigError with every problem, of extensions too: where something is wrong, everything is looked at.
    """
    fields = recipe_fields(recipe, config, overrides)
    try:
        return resolve(fields)
    except ConfigError:
        from latentac.runs.resolution import (
            resolve_all,  # imports torch, which a right configuration can do without here
        )

        resolve_all(fields)
        raise


def recipe_fields(recipe: str, config: str = "", overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe, a YAML file over it ("" for none) and `path=value` overrides make together, not validated yet.

    Raises ConfigError.
    """
    if recipe not in RECIPES:
        raise ConfigError([Problem("recipe", recipe, "does not exist", suggestion(recipe, list(RECIPES)))])
    named = RECIPES[recipe]
    if config:
        named = merge(named, read_file(Path(config)))
    fields = merge(named, read_overrides(overrides))
    return {"project": default_project(recipe, config, named, fields), **fields}

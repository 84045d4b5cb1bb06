"""What a run would do and need, and everything that would refuse it, found without writing anything."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from latentac.backbones import layout_of
from latentac.backbones.guided import guided
from latentac.backbones.layout import INDEX
from latentac.backbones.source import locate
from latentac.config.schema import Config
from latentac.config.validation import resolve
from latentac.runs import package as packages
from latentac.runs.configuration import recipe_fields
from latentac.runs.preparation import prepare as preparation
from latentac.runs.preparation import sizing
from latentac.runs.preparation.costs import count_operations, describe_costs
from latentac.runs.preparation.mirrored import check_sources
from latentac.runs.preparation.rehearsal import rehearse
from latentac.runs.workspace import existing
from latentac.sampling.devices import pick_device
from latentac.store import open_store, sources
from latentac.store.sources import with_local_files
from latentac.system.errors import ConfigError, LatentacError, Problem, ResourceError

if TYPE_CHECKING:
    from latentac.rewards.configured import ConfiguredReward
    from latentac.runs.preparation.sizing import Requirements
    from latentac.worlds.prompts import PromptSet

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """settings: None where they are refused themselves; needs: disk, memory and operations by item, a line each, None
    where the backbone is not on this machine; refused: one message each."""

    settings: Config | None
    needs: tuple[str, ...] | None
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """What a run is asked to do: recipe, file, `path=value`, folder of code; and the GPU to estimate its time for,
    with the price of an hour."""

    recipe: str
    config: str
    overrides: Sequence[str]
    package: str
    gpu: str = ""
    price: float = 0.0


def plan(given: Given, store: str, output: Path) -> Plan:
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
    if given.package:
        attempt(lambda: _check_package(Path(given.package)))
    from latentac.runs.resolution import resolve_all
    from latentac.worlds.prompts import load_prompts

    fields = attempt(lambda: recipe_fields(given.recipe, given.config, given.overrides))
    attempt(lambda: check_sources(fields or {}))
    resolved = attempt(lambda: resolve_all(fields)) if fields is not None else None
    # An extension that is refused hides nothing else, a field that is wrong does.
    settings = resolved.config if resolved else attempt(lambda: resolve(fields)) if fields is not None else None
    if settings is None:
        return Plan(None, None, tuple(refused))
    attempt(lambda: preparation.check_machine(settings.backbone.device, settings.serving.port))
    prompts = attempt(lambda: load_prompts(with_local_files(settings.prompts)))
    given_rewards = [] if resolved is None else resolved.rewards
    rewards = [each for each in given_rewards if not each.elsewhere and attempt(partial(_fetched, each))]
    attempt(lambda: preparation.check_known(rewards))
    rehearsed = None
    folder = attempt(lambda: on_this_machine(settings.backbone.source, settings.backbone.revision))
    needed = attempt(lambda: requirements(settings, folder, prompts)) if folder else None
    if needed is not None:
        attempt(lambda: sizing.check_room(needed, output, store))
    if needed is not None and folder is not None and prompts is not None and resolved is not None:
        device = pick_device(settings.backbone.device)
        rehearsed = attempt(lambda: rehearse(resolved.config, folder, prompts.train[0].text, device))
    if rehearsed is not None and prompts is not None and resolved is not None:
        attempt(lambda: preparation.check_lengths(settings, prompts, rehearsed.backbone))
        block = settings.train.block_images
        attempt(lambda: preparation.check_scoring(rewards, prompts, rehearsed.images[0], block))
    needs = None if needed is None else tuple(sizing.describe(needed))
    if needs is not None and rehearsed is not None and prompts is not None:
        backbone, scale = rehearsed.backbone, settings.policy.guidance_scale
        text = backbone.encode([prompts.train[0].text])
        counted = attempt(lambda: count_operations(settings, guided(backbone, scale), text))
        needs += tuple(describe_costs(settings, counted, given.gpu, given.price)) if counted else ()
    return Plan(resolved.config if resolved else None, needs, tuple(refused))


def _fetched(reward: "ConfiguredReward") -> bool:
    """Raises ConfigError, RewardError where what the reward needs is not there."""
    reward.fetch()
    return True


def requirements(settings: Config, folder: Path, prompts: "PromptSet | None") -> "Requirements":
    """What the run needs with the pipeline in `folder`. Raises ConfigError with all that is wrong with that."""
    layout = layout_of(settings.backbone)
    found, _ = locate(str(folder), layout)
    return sizing.requirements(settings, found, len(prompts.train) if prompts else 0)


def on_this_machine(source: str, revision: str) -> Path | None:
    """The folder of the pipeline that `source` names, or None where it is not on this machine.

    A hub id or a source in a store that was not copied counts as not there: nothing is fetched. Raises ConfigError
    where there can be none.
    """
    if sources.is_address(source):
        return sources.cached(source)
    if source.startswith(("builtin:", "/", "./", "../", "~")) or os.path.exists(source):
        return locate(source, None)[0]
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(source, INDEX, revision=revision or None)
    except HFValidationError:
        return locate(source, None)[0]  # says what is wrong with it
    return Path(index).parent if isinstance(index, str) else None


def _check_package(folder: Path) -> None:
    """Raises ConfigError where it could not be shipped; else it is importable from here on."""
    packages.pack(folder)
    packages.use_in_place(folder)


def _check_output(output: Path) -> None:
    there = existing(output)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "no folder can be made in it" if there.is_dir() else f"{there} is not a folder"
        raise ResourceError(str(output), problem, "Choose another --output, or give yourself the right to write there.")


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

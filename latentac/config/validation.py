"""From nested dictionaries to a configuration, with every problem of the framework's fields at once."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from latentac.config.schema import Config, suggestion
from latentac.config.sections import Named
from latentac.system.errors import ConfigError, Problem
from latentac.system.names import PLAIN, RULE


def resolve(fields: Mapping[str, Any]) -> Config:
    """Validate nested dictionaries into a Config. Raises ConfigError with all problems of the framework's fields.

    The settings of extensions are checked by `latentac.runs.resolution`, which imports them.
    """
    config, problems = examine(fields)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def examine(fields: Mapping[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The configuration of `fields` as far as it can be understood, and all problems of the framework's fields.

    A field that is not valid has its default in the result, so that what else is wrong can be found as well; no
    problem is reported of a combination that such a field is part of. None where nothing can be made of `fields`.
    """
    problems: list[Problem] = []
    repaired, broken = copy.deepcopy(dict(fields)), set[str]()
    for _ in range(_REPAIRS):
        try:
            config = Config.model_validate(repaired)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                problem = _problem(detail)
                if problem.path not in broken:  # what the repair of a value makes is no further problem of the user's
                    problems.append(problem)
                broken.add(problem.path)
                if not _repair(repaired, detail):
                    return None, problems
            continue
        return config, [*problems, *_impossible(config, broken)]
    return None, problems


_REPAIRS = 5  # a repaired field may uncover the next problem of its section
_UNKNOWN = "?"


def _repair(fields: Any, detail: Any) -> bool:
    """Take the value that `detail` is about out of `fields`, or put a text where one is missing."""
    *above, name = detail["loc"] or [None]
    try:
        for part in above:
            fields = fields[part]
        if detail["type"] == "missing":
            fields[name] = _UNKNOWN
        else:
            del fields[name]
    except (LookupError, TypeError):
        return False
    return True


def _problem(detail: Any) -> Problem:
    location = [str(part) for part in detail["loc"]]
    path, kind = ".".join(location), detail["type"]
    if kind == "extra_forbidden":
        return Problem(path, detail["input"], "unknown field", suggestion(location[-1], _fields_beside(location)))
    if kind == "missing":
        return Problem(path, None, "is required", f"Add it to the file, or --set {path}=...")
    remedy = f"Use {RULE}." if kind == "name" else "Correct the value."
    return Problem(path, detail["input"], detail["msg"][0].lower() + detail["msg"][1:], remedy)


def _fields_beside(location: Sequence[str]) -> list[str]:
    """The fields of the section that holds `location`'s last part."""
    section: Any = Config
    for name in location[:-1]:
        if not name.isdigit():
            section = section_of(section, name)
    return list(section.model_fields)


def section_of(section: Any, name: str) -> Any:
    """The section that the field `name` of `section` holds, directly, optionally or in a list; None for a value."""
    if section is None or name not in section.model_fields:
        return None
    annotation = section.model_fields[name].annotation
    return next((a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")), None)


_NAME = r"[A-Za-z_][A-Za-z0-9_-]{0,63}"
"""What names an entry: in a path of fields (so no dot), beside an index (so no number alone), in files and requests."""

_RESERVED = {"rewards": ("reward_mean",), "steering.methods": (PLAIN,)}
"""Names that mean something else: the curve of the trained reward, sampling without steering."""


def _impossible(config: Config, broken: set[str]) -> list[Problem]:
    """Combinations of valid fields that cannot run, but for those of a field in `broken`."""
    problems = []

    def refuse(condition: bool, path: str, value: object, problem: str, remedy: str, *reads: str) -> None:
        unsure = any(found == read or found.startswith(f"{read}.") for read in (path, *reads) for found in broken)
        if condition and not unsure:
            problems.append(Problem(path, value, problem, remedy))

    train, kernel, names = config.train, config.kernel, config.reward_names
    lists: dict[str, Sequence[Named]] = {
        "rewards": config.rewards,
        "steering.methods": config.steering.methods,
        "tracking": config.tracking,
    }
    for path, entries in lists.items():
        listed = [entry.name for entry in entries]
        for index, name in enumerate(listed):
            refuse(
                not re.fullmatch(_NAME, name) or name in _RESERVED.get(path, ()),
                f"{path}.{index}.name",
                name,
                f"cannot be a name in {path}" if re.fullmatch(_NAME, name) else "is not a valid name",
                "Use up to 64 letters, digits, '_' and '-', beginning with a letter"
                + "".join(f"; {word} has another meaning" for word in _RESERVED.get(path, ()))
                + ".",
                f"{path}.{index}.use",
            )
        twice = sorted({name for name in listed if listed.count(name) > 1})
        refuse(
            bool(twice),
            path,
            listed,
            f"{', '.join(twice)} is the name of two entries",
            "Give each a name of its own, for example name: second.",
        )
    stopping = train.early_stopping
    for index, reward in enumerate(config.rewards):
        path, (low, high) = f"rewards.{index}", reward.bounds or (-math.inf, math.inf)
        refuse(low >= high, f"{path}.bounds", reward.bounds, "leave no room", "Give [low, high].")
        refuse(
            reward.floor is not None and reward.floor >= high,
            f"{path}.floor",
            reward.floor,
            f"is not below the reward's upper bound, {high:g}: nothing pulls a reward beyond that",
            "Lower the floor, or raise the bound.",
            f"{path}.bounds",
        )
        refuse(
            reward.floor is not None and config.critic.shared_head,
            f"{path}.floor",
            reward.floor,
            "needs a head of its own, and critic.shared_head gives one to all rewards together",
            "Set critic.shared_head=false.",
            "critic.shared_head",
        )
        refuse(
            bool(reward.scores_folder) and not reward.cached_scores,
            f"{path}.scores_folder",
            reward.scores_folder,
            "is not used, for no scores are kept",
            "Set cached_scores, for example to 100000.",
            f"{path}.cached_scores",
        )
    watched = config.watched_rewards
    refuse(
        stopping is not None and stopping.reward not in watched,
        "train.early_stopping.reward",
        stopping.reward if stopping else None,
        "is not a watched reward of this run: one that is trained on rises to the end",
        f"Choose one with weight 0 and no floor (now: {', '.join(watched) or 'none'}).",
        "rewards",
    )
    refuse(
        train.images_per_iteration % train.block_images != 0,
        "train.images_per_iteration",
        train.images_per_iteration,
        f"cannot be divided into blocks of {train.block_images} images",
        f"Use a multiple of {train.block_images}.",
        "train.block_images",
    )
    refuse(
        train.num_workers != "auto" and train.num_workers > max(train.num_blocks, 1),
        "train.num_workers",
        train.num_workers,
        f"is more than the {train.num_blocks} blocks of an iteration, of which each worker needs one",
        "Use fewer workers, smaller blocks, or more images per iteration.",
        "train.block_images",
        "train.images_per_iteration",
    )
    guidance = config.policy.guidance_scale
    refuse(
        guidance > config.serving.max_guidance_scale,
        "policy.guidance_scale",
        guidance,
        f"is more than serving.max_guidance_scale = {config.serving.max_guidance_scale:g}",
        "Raise the limit of the endpoint, which offers this scale by default.",
        "serving.max_guidance_scale",
    )
    refuse(
        config.export.weights == "adapter" and config.policy.adaptation != "lora",
        "export.weights",
        config.export.weights,
        f"needs an adapter, and policy.adaptation={config.policy.adaptation} trains none",
        "Set policy.adaptation=lora, or export.weights=merged.",
        "policy.adaptation",
    )
    rows = train.block_images * (kernel.num_steps - 1)
    refuse(
        train.updates_per_iteration > rows,
        "train.updates_per_iteration",
        train.updates_per_iteration,
        f"is more than the {rows} transitions of a block",
        "Use fewer updates or larger blocks.",
        "train.block_images",
        "kernel.num_steps",
    )
    refuse(
        all(reward.weight == 0 for reward in config.rewards),
        "rewards",
        list(names),
        "no reward has a weight above 0, so there is nothing to learn",
        "Give one a weight, for example weight: 1.0.",
    )
    for path, name in (("gate.reward", config.gate.reward), *((f"gate.floors.{n}", n) for n in config.gate.floors)):
        refuse(
            name not in names,
            path,
            config.gate.floors.get(name, name),
            f"{name} is not a reward of this run",
            f"Choose one of {', '.join(names)}.",
            "rewards",
        )
    return problems

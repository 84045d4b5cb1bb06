"""The resolver of extensions: it imports, validates and builds all that a configuration names.

`prepare` calls it once, and every problem of every step is in one ConfigError. The result is the configuration with
the defaults of all extensions filled in, which is what the run keeps and what its hash is of.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from latentac.backbones import BACKBONES
from latentac.config.extensions import Table
from latentac.config.schema import Config
from latentac.config.sections import Extension
from latentac.config.validation import examine
from latentac.critic import BODIES
from latentac.rewards import REWARDS
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.runs import package as packages
from latentac.runs.reporting.tracking import TRACKERS, missing_packages
from latentac.sampling.kernels import KERNELS
from latentac.sampling.steering import STEERING, SteeringSettings
from latentac.system.errors import ConfigError, LatentacError, Problem, RewardError, describe
from latentac.training.algorithms import ALGORITHMS
from latentac.training.optimizers import missing_optimizer

TABLES: dict[str, Table] = {
    "backbone": BACKBONES,
    "kernel": KERNELS,
    "rewards": REWARDS,
    "algorithm": ALGORITHMS,
    "critic.body": BODIES,
    "steering.methods": STEERING,
    "tracking": TRACKERS,
}
"""Path in the configuration -> the table whose rows can stand there."""

_MEMBERS = {
    "backbone": ("path", "schedule", "encode", "predict", "images", "decode", "clone", "adapt", "save"),
    "kernel": ("path", "transition", "std"),
    "rewards": ("__call__",),
    "algorithm": ("credit", "loss"),
    "critic.body": ("features", "forward"),
    "steering.methods": ("needs_gradient", "steps", "begin", "select"),
    "tracking": ("start", "log", "image", "finish"),
}
"""What a class of each table must have. What is set when it is built is checked there."""

_BUILT_ALGORITHM = ("uses_critic", "memory", "group_size", "value_gradient", "prediction_kl")
_LEVELS = torch.tensor([0.9]), torch.tensor([0.5])  # noise levels within any schedule

Made = TypeVar("Made")


@dataclass(frozen=True)
class Resolved:
    """config: with every extension's settings complete; rewards: built, in order; methods: of steering, their classes
    and settings by name."""

    config: Config
    rewards: list[ConfiguredReward]
    methods: dict[str, tuple[Any, SteeringSettings]]

    def described(self) -> dict[str, Any]:
        """What the classes say of themselves, for steps that do not import torch: extensions.json."""
        return {
            "code": packages.source_digests(self.config),
            "units": {reward.name: reward.unit for reward in self.rewards},
            "methods": {
                name: {
                    "summary": str(getattr(kind, "summary", "")),
                    "needs_gradient": bool(kind.needs_gradient),
                    "strength": settings.strength,
                    "particles": settings.particles,
                }
                for name, (kind, settings) in self.methods.items()
            },
        }


def resolve_all(fields: Mapping[str, Any], *, build_rewards: bool = True) -> Resolved:
    """Everything that nested dictionaries of a configuration name.

    build_rewards: False leaves `rewards` empty, where their services may be out of reach; their settings are checked.
    Raises ConfigError with every problem of every field, and RewardError where nothing is wrong but that a reward
    cannot be built.
    """
    config, problems = examine(fields)
    if config is None:
        raise ConfigError(problems)
    return _Resolver(config, problems).resolve(build_rewards)


class _Resolver:
    def __init__(self, config: Config, problems: list[Problem]) -> None:
        self.config, self.problems = config, problems
        self.failed: RewardError | None = None

    def resolve(self, build_rewards: bool) -> Resolved:
        config = self.config
        filled = config.model_copy(
            update={
                "backbone": self._filled("backbone", config.backbone),
                "kernel": self._filled("kernel", config.kernel),
                "rewards": [self._filled("rewards", one, index) for index, one in enumerate(config.rewards)],
                "algorithm": self._filled("algorithm", config.algorithm),
                "tracking": [self._filled("tracking", one, index) for index, one in enumerate(config.tracking)],
                "critic": config.critic.model_copy(update={"body": self._filled("critic.body", config.critic.body)}),
                "steering": config.steering.model_copy(
                    update={
                        "methods": [
                            self._filled("steering.methods", one, index)
                            for index, one in enumerate(config.steering.methods)
                        ]
                    }
                ),
            }
        )
        self.problems += missing_packages(filled.tracking)
        self.problems += missing_optimizer(filled.policy)
        self._check_sampling(filled)
        self._check_algorithm(filled)
        self._check_export(filled)
        self._check_sharding(filled)
        methods = self._methods(filled)
        rewards = self._rewards(filled) if build_rewards else []
        if self.problems:
            if self.failed is not None:
                self.problems.append(Problem(self.failed.where, None, self.failed.problem, self.failed.remedy))
            raise ConfigError(list({str(problem): problem for problem in self.problems}.values()))
        if self.failed is not None:
            raise self.failed
        return Resolved(filled, rewards, methods)

    def _attempt(self, path: str, value: object, work: Callable[[], Made]) -> Made | None:
        """What `work` gives, or None and its problems on the list."""
        try:
            return work()
        except RewardError as error:
            self.failed = self.failed or error
        except ConfigError as error:
            self.problems += error.problems
        except LatentacError as error:
            self.problems.append(Problem(path, value, error.problem, error.remedy))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a class of the user's own raises is a problem of its field
            problem = f"cannot be built ({describe(error)})"
            self.problems.append(Problem(path, value, problem, "Correct the class, or its settings."))
        return None

    def _bad(self, path: str) -> bool:
        return any(found.path == path or found.path.startswith(f"{path}.") for found in self.problems)

    def _filled(self, kind: str, extension: Extension, index: int | None = None) -> Extension:
        """The extension with all its settings, if they are right; as it was given, if not."""
        table, path = TABLES[kind], kind if index is None else f"{kind}.{index}"
        if self._bad(f"{path}.use"):
            return extension
        found = self._attempt(f"{path}.use", extension.use, partial(table.examine, extension, path))
        if found is None:
            return extension
        settings, problems = found
        self.problems += problems
        made = table.load(extension.use)
        missing = [name for name in _MEMBERS[kind] if not hasattr(made, name)]
        if missing:
            remedy = f"Give it {', '.join(missing)}: see the protocol of the {table.kind}s."
            self.problems.append(Problem(f"{path}.use", extension.use, f"is no {table.kind}", remedy))
            return extension
        return extension if settings is None else extension.with_own(settings.model_dump())

    def _check_sampling(self, config: Config) -> None:
        """The kernel must be stochastic, and of the backbone's kind."""
        if self._bad("kernel.use"):
            return
        kernel = self._attempt("kernel.use", config.kernel.use, lambda: KERNELS.make(config.kernel, path="kernel"))
        if kernel is None:
            return
        std = self._attempt("kernel.use", config.kernel.use, lambda: float(kernel.std(*_LEVELS)))
        if std is not None and not std > 0:
            own = config.kernel.own
            path, value = ("kernel.noise", own["noise"]) if "noise" in own else ("kernel", own)
            problem = f"makes the {config.kernel.use} kernel deterministic, and training needs the density of each step"
            self.problems.append(Problem(path, value, problem, "Make it stochastic, for example kernel.noise=1.0."))
        if self._bad("backbone.use"):
            return
        path = BACKBONES.load(config.backbone.use).path
        if kernel.path != path:
            fitting = ", ".join(name for name in KERNELS.rows if KERNELS.load(name).path == path)
            problem = f"samples {kernel.path} models, and {config.backbone.use} is a {path} one"
            self.problems.append(Problem("kernel.use", config.kernel.use, problem, f"Use one of {fitting}."))

    def _check_algorithm(self, config: Config) -> None:
        """It must be built, and a block must hold whole groups."""
        if self._bad("algorithm.use"):
            return
        path, use = "algorithm.use", config.algorithm.use
        weights = torch.tensor([reward.weight for reward in config.rewards])
        algorithm = self._attempt(path, use, lambda: ALGORITHMS.make(config.algorithm, weights, path="algorithm"))
        if algorithm is None:
            return
        floors = any(reward.floor is not None for reward in config.rewards)
        needed = (*_BUILT_ALGORITHM, "weights") if floors else _BUILT_ALGORITHM
        missing = [name for name in needed if not hasattr(algorithm, name)]
        if missing:
            remedy = "Derive it from latentac.training.algorithms.Algorithm, and set memory and uses_critic."
            self.problems.append(Problem(path, use, f"has no {', '.join(missing)}", remedy))
        elif (
            not (self._bad("train.block_images") or self._bad("algorithm.group_size"))
            and config.train.block_images % algorithm.group_size
        ):
            problem = f"is not a multiple of the algorithm's group_size = {algorithm.group_size}"
            value = config.train.block_images
            self.problems.append(Problem("train.block_images", value, problem, "Make a block hold whole groups."))

    def _check_export(self, config: Config) -> None:
        """A backbone whose adapter is to be exported must be able to load it."""
        if config.export.weights != "adapter" or self._bad("backbone.use") or self._bad("export"):
            return
        if not hasattr(BACKBONES.load(config.backbone.use), "adapted"):
            remedy = "Use export.weights=merged, or derive the class from latentac.backbones.pipeline.PipelineBackbone."
            problem = f"needs a backbone that loads adapters, and {config.backbone.use} does not"
            self.problems.append(Problem("export.weights", config.export.weights, problem, remedy))

    def _check_sharding(self, config: Config) -> None:
        """What sharded weights cannot be combined with."""
        if config.train.sharding == "none":
            return
        reasons = {
            ("precision", "float16"): "scales its gradients on each worker alone. Use backbone.precision=bfloat16",
            ("compile", "whole"): "is not tested with sharded weights. Use backbone.compile=none",
            ("compile", "blocks"): "is not tested with sharded weights. Use backbone.compile=none",
        }
        for name, value in config.backbone.own.items():
            if isinstance(value, str) and (name, value) in reasons and not self._bad(f"backbone.{name}"):
                problem, remedy = reasons[name, value].split(". ")
                self.problems.append(Problem(f"backbone.{name}", value, problem, f"{remedy}, or train.sharding=none."))
        if config.policy.optimizer == "adamw_8bit":
            problem, remedy = "scales blocks of 256 moments, which shares of the weights would cut", "Use adamw"
            value = config.policy.optimizer
            self.problems.append(Problem("policy.optimizer", value, problem, f"{remedy}, or train.sharding=none"))

    def _methods(self, config: Config) -> dict[str, tuple[Any, SteeringSettings]]:
        found = {}
        for index, method in enumerate(config.steering.methods):
            path = f"steering.methods.{index}"
            if self._bad(path):
                continue
            settings = STEERING.settings(method, path)
            if not isinstance(settings, SteeringSettings):
                remedy = "Give it a class `Settings` that derives from latentac.sampling.steering.SteeringSettings."
                self.problems.append(Problem(f"{path}.use", method.use, "has no settings of a method", remedy))
                continue
            build = partial(STEERING.make, method, torch.ones(len(config.rewards)), 1, path=path)
            made = self._attempt(f"{path}.use", method.use, build)
            if made is not None:
                found[method.name] = made, settings
        return found

    def _rewards(self, config: Config) -> list[ConfiguredReward]:
        built = []
        for index, one in enumerate(config.rewards):
            if not self._bad(f"rewards.{index}"):
                built += self._attempt(f"rewards.{index}.use", one.use, partial(load_rewards, [one])) or []
        return built

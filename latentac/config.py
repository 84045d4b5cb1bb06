"""The configuration of a run: strict and frozen. Every field is checked, and all problems are reported together.

A configuration is a recipe, then a file, then `--set path=value`, merged in that order (`latentac.fields`).

It owns the names of extensions (`use`, `name`) and what the framework does with them (a weight, a time-out). The other
fields of an extension are its own: they are declared in the class's `Settings` and checked by `latentac.resolution`.
"""

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentac.errors import ConfigError, Problem

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Extension(Section):
    """A row of a table, or a class of your own. use: the row's name, or `module:Class`.

    All further fields are the extension's own settings (`own`). `latentac config fields` lists them for every row.
    """

    model_config = ConfigDict(extra="allow")

    use: str

    @property
    def own(self) -> dict[str, Any]:
        """The extension's own settings, as they were given."""
        return dict(self.model_extra or {})

    def with_own(self, own: Mapping[str, Any]) -> Self:
        """The same extension with `own` as its settings."""
        framework = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**framework, **own})


class Named(Extension):
    """An extension of which there may be several. name: what reports, metrics and requests call it; by default the
    row's name, or the class's."""

    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _named_after_use(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and not fields.get("name") and isinstance(fields.get("use"), str):
            return {**fields, "name": fields["use"].rpartition(":")[2]}
        return fields


class Backbone(Extension):
    """The pretrained diffusion model. source: `builtin:<name>`, a diffusers folder, or a hub id."""

    use: str = "unet"
    source: str
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Kernel(Extension):
    """The sampler: how one denoising step is drawn. num_steps: denoising steps per picture, K."""

    use: str = "ddim"
    num_steps: Annotated[int, Field(ge=2, le=1000)] = 10


class Prompts(Section):
    """source: `builtin:shapes`, or a JSON file {"train": [{"text", "category"}], "held_out": [...]}."""

    source: str


class Reward(Named):
    """One reward.

    weight: its share in what is trained on; a reward of weight 0 is measured and not trained on.
    timeout_seconds: bound of one call. retries: further attempts after an error that the reward's class declares
        transient (`transient_errors`); the waits between them start at one second and double.
    """

    weight: NonNegative = 1.0
    timeout_seconds: Rate = 300.0
    retries: Annotated[int, Field(ge=0, le=20)] = 3


class Policy(Section):
    """The actor. ema_decay: of the average of its weights that is published; 0 publishes the last ones."""

    adaptation: Literal["full", "lora"] = "full"
    lora_rank: Positive = 32
    lora_alpha: Positive = 64
    learning_rate: Rate = 6e-5
    warmup_updates: Annotated[int, Field(ge=0)] = 20
    weight_decay: NonNegative = 1e-4
    gradient_clip: Rate = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Critic(Section):
    """One value head per reward on a body that reads latents.

    body: what the heads read, an extension: `frozen_taps` (the policy's own forward), `lora` or `copy` (a backbone of
        its own); to compare with, `pixel` (the decoded guess of the picture) and `latent_cnn` (shares nothing).
    hidden: units of the MLP between the body's summary and the heads. shared_head: one head for all rewards.
    num_passes: over each iteration's states, each of `updates_per_pass` updates. replay_images: so many of the newest
        scored pictures are kept, and with each state of a rollout the critic learns from a forward-noised one of
        them; 0 for none. target_clip: bound of the value targets, in standard deviations.
    """

    body: Extension = Extension(use="frozen_taps")
    hidden: Positive = 128
    shared_head: bool = False
    num_passes: Positive = 2
    updates_per_pass: Positive = 4
    replay_images: Annotated[int, Field(ge=0)] = 0
    learning_rate: Rate = 2e-3
    weight_decay: NonNegative = 1e-4
    gradient_clip: Rate = 1.0
    target_clip: Rate = 5.0


class Pretrain(Section):
    """Monte-Carlo regression of the critic on rollouts of the frozen actor. num_images: 0 for none; forward_noised:
    share of the minibatches that are fresh noise on the scored pictures instead of states of the rollouts."""

    num_images: Annotated[int, Field(ge=0)] = 2048
    num_held_out_images: Positive = 256
    num_passes: Positive = 5
    minibatch_states: Positive = 256
    forward_noised: Fraction = 0.0


class Algorithm(Extension):
    """How rewards become advantages, and advantages become a loss: `ppo` (the critic is the baseline), `grpo` (the
    group of a prompt's rollouts is), `ddpo` (the mean of all images is, or of each prompt so far)."""

    use: str = "ppo"


class EarlyStopping(Section):
    """Stop when a reward that is not trained on stops rising, and publish the weights of its best iteration.

    The mean of `reward` over the last `window` iterations is watched: training ends when it has not risen by
    `min_delta` above its best for `patience` iterations.
    """

    reward: str
    window: Positive = 5
    patience: Positive = 10
    min_delta: NonNegative = 0.0


class Guard(Section):
    """When training has diverged: an update that is not finite, or an iteration whose mean KL a step, in nats, or whose
    clip share is beyond its bound. The run then goes back to its last checkpoint once, at `rate_factor` times the
    actor's learning rate, and a second time it fails."""

    max_kl: Rate = 1.0
    max_clip_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.5


class Train(Section):
    """block_images: the unit of work. Blocks are dealt to the workers; their number changes no result."""

    num_iterations: Positive = 30
    images_per_iteration: Positive = 256
    updates_per_iteration: Positive = 4
    block_images: Positive = 32
    num_workers: Positive = 2
    max_restarts: Annotated[int, Field(ge=0)] = 3
    checkpoint_every: Positive = 2
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    guard: Guard = Guard()
    early_stopping: EarlyStopping | None = None


class Evaluation(Section):
    """num_images: of each policy, one a held-out prompt. Diversity and latency are measured on `pictures_per_prompt`
    pictures of the first `num_diversity_prompts` of these prompts."""

    num_images: Annotated[int, Field(ge=8)] = 1024
    num_gallery_prompts: Positive = 12
    num_bootstrap: Annotated[int, Field(ge=100)] = 2000
    num_diversity_prompts: Annotated[int, Field(ge=2)] = 32
    pictures_per_prompt: Annotated[int, Field(ge=2)] = 4


class Steering(Section):
    """The ways to steer that the benchmark compares and the endpoint offers.

    methods: extensions of the steering table, each with its strength and the arms that the benchmark tries.
    num_images: pictures per arm.
    """

    methods: list[Named] = []
    num_images: Annotated[int, Field(ge=8)] = 256


class Gate(Section):
    """When a trained policy is promoted. `reward` is the one that it is for; bounds on it are in its unit. Every `low`
    and `high` is an end of a 95 % interval, and a number that is missing or not finite holds.

    min_gain, min_lower_bound: of the gain over base and of its low end.
    max_loss_fraction: by how much of base's mean any other reward may fall.
    floors: reward name -> what the low end of the trained policy's mean must reach.
    max_incumbent_loss: how far below 0 the low end of trained - incumbent may lie; must_beat_incumbent: not at all.
    unfit_incumbent: what to do where the model in production cannot be compared; `replace` promotes without.
    min_diversity_kept: the low end of the share of diversity that is kept, against base and against the incumbent.
    max_latency_ratio: the high end of the seconds a picture over those of base, and over those of the incumbent.
    """

    reward: str
    min_gain: Number = 0.05
    min_lower_bound: Number = 0.0
    max_loss_fraction: NonNegative = 0.5
    floors: dict[str, Number] = {}
    max_incumbent_loss: NonNegative = 0.05
    must_beat_incumbent: bool = False
    unfit_incumbent: Literal["hold", "replace"] = "hold"
    min_diversity_kept: NonNegative = 0.7
    max_latency_ratio: Rate = 1.25


class Serving(Section):
    """The endpoint, and what one request may ask of it: `max_images` is over all its instances.

    include_base: the untouched denoiser is exported too, to compare with; with a large one it doubles the folder.
    batch_rows: rollouts that go through the denoiser together. A batch that is not full is filled up, so that a
        picture's bytes do not depend on who shares it: more rows give more pictures a second, and each alone takes
        longer.
    batch_wait_seconds: how long a picture waits for others to share a batch.
    max_queued_images: pictures that may wait; beyond that requests are answered 429.
    request_seconds: the longest that a request may take, waiting included.
    """

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    ready_seconds: Rate = 120.0
    max_images: Positive = 8
    max_steps: Annotated[int, Field(ge=2, le=1000)] = 100
    max_particles: Positive = 32
    max_prompt_characters: Positive = 1000
    max_guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 20.0
    include_base: bool = True
    batch_rows: Positive = 4
    batch_wait_seconds: NonNegative = 0.005
    max_queued_images: Positive = 64
    request_seconds: Rate = 300.0


class Tracker(Named):
    """Where numbers and pictures of the training go beside TensorBoard: `mlflow`, `wandb`."""


class Config(Section):
    """A run, completely: two equal configurations on one machine give bitwise equal results."""

    recipe: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    backbone: Backbone
    kernel: Kernel = Kernel()
    prompts: Prompts
    rewards: Annotated[list[Reward], Field(min_length=1)]
    policy: Policy = Policy()
    critic: Critic = Critic()
    pretrain: Pretrain = Pretrain()
    algorithm: Algorithm = Algorithm()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    steering: Steering = Steering()
    gate: Gate
    serving: Serving = Serving()
    tracking: list[Tracker] = []

    @property
    def reward_names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.rewards)

    @property
    def main_reward(self) -> int:
        """The column of the first reward that is trained on."""
        return next(index for index, reward in enumerate(self.rewards) if reward.weight > 0)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, hex."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def resolve(fields: Mapping[str, Any]) -> Config:
    """Validate nested dictionaries into a Config. Raises ConfigError with all problems of the framework's fields.

    The settings of extensions are checked by `latentac.resolution`, which imports them.
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
                broken.add(problem.path)
                problems.append(problem)
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


def suggestion(name: str, known: Sequence[str]) -> str:
    """`Did you mean "x"? ` when `name` resembles one of `known`, and then what is known."""
    close = difflib.get_close_matches(name, known, n=1)
    guess = f'Did you mean "{close[0]}"? ' if close else ""
    return f"{guess}Known: {', '.join(known)}."


def _problem(detail: Any) -> Problem:
    location = [str(part) for part in detail["loc"]]
    path, kind = ".".join(location), detail["type"]
    if kind == "extra_forbidden":
        return Problem(path, detail["input"], "unknown field", suggestion(location[-1], _fields_beside(location)))
    if kind == "missing":
        return Problem(path, None, "is required", f"Add it to the file, or --set {path}=...")
    return Problem(path, detail["input"], detail["msg"][0].lower() + detail["msg"][1:], "Correct the value.")


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


def _impossible(config: Config, broken: set[str]) -> list[Problem]:
    """Combinations of valid fields that cannot run, but for those of a field in `broken`."""
    problems = []

    def refuse(condition: bool, path: str, value: object, problem: str, remedy: str, *reads: str) -> None:
        unsure = any(found == read or found.startswith(f"{read}.") for read in (path, *reads) for found in broken)
        if condition and not unsure:
            problems.append(Problem(path, value, problem, remedy))

    train, kernel, names = config.train, config.kernel, config.reward_names
    for index, reward in enumerate(config.rewards):
        refuse(
            not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", reward.name),
            f"rewards.{index}.name",
            reward.name,
            "cannot name a reward in metrics, reports and requests",
            "Use up to 64 letters, digits, '_', '-' and '.'.",
            f"rewards.{index}.use",
        )
    for path, listed in (("rewards", list(names)), ("steering.methods", [one.name for one in config.steering.methods])):
        twice = sorted({name for name in listed if listed.count(name) > 1})
        refuse(
            bool(twice),
            path,
            listed,
            f"{', '.join(twice)} is the name of two entries",
            "Give each a name of its own, for example name: second.",
        )
    stopping = train.early_stopping
    watched = [reward.name for reward in config.rewards if reward.weight == 0]
    refuse(
        stopping is not None and stopping.reward not in watched,
        "train.early_stopping.reward",
        stopping.reward if stopping else None,
        "is not a watched reward of this run: one that is trained on rises to the end",
        f"Choose one with weight 0 (now: {', '.join(watched) or 'none'}).",
        "rewards",
    )
    refuse(
        train.images_per_iteration % (train.block_images * train.num_workers) != 0,
        "train.images_per_iteration",
        train.images_per_iteration,
        f"cannot be dealt evenly in blocks of {train.block_images} to {train.num_workers} workers",
        f"Use a multiple of {train.block_images * train.num_workers}.",
        "train.block_images",
        "train.num_workers",
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
            f"{name} is none of this run's rewards",
            f"Choose one of {', '.join(names)}.",
            "rewards",
        )
    return problems

"""One strict, frozen configuration a run: every field is checked, every problem is told at once.

A configuration is a recipe, then a file, then `--set path=value`, merged in that order (`latentac.fields`) and
validated together.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentac.errors import ConfigError, Problem

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Backbone(Section):
    """The pretrained diffusion model. source: `builtin:<name>`, a diffusers folder, or a hub id."""

    name: str = "unet"
    source: str
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Kernel(Section):
    """The sampler step. noise: eta of DDIM, the noise level of the flow kernels; 0 is deterministic."""

    name: Literal["ddim", "flow_sde", "dance_sde", "cps"] = "ddim"
    noise: Fraction = 1.0
    num_steps: Annotated[int, Field(ge=2, le=1000)] = 10


class Prompts(Section):
    """source: `builtin:shapes`, or a JSON file {"train": [{"text", "category"}], "held_out": [...]}."""

    source: str


class Reward(Section):
    """One reward: a name of the table or `module:Class`. A weight of 0 is watched, not trained on."""

    name: str
    weight: NonNegative = 1.0


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
    """A value head a reward on a body.

    body: frozen_taps (the policy's own forward), lora or copy (a backbone of its own), or to compare with: pixel (the
        decoded guess of the picture), latent_cnn (shares nothing); or `module:Class`.
    width: of a branch; num_queries: learnable summary tokens a feature map, with 0 the head reads no places, only
        each channel's mean and spread: cheaper, and better after a few thousand pictures; grid: cells a side that a
        map keeps;
    dropout: of maps and summaries while learning; text_dropout: of what is read of each word; body_learning_rate: of
        the backbone in lora and copy.
    num_passes: over each iteration's states, each of `updates_per_pass` updates. replay_images: so many of the newest
        scored pictures are remembered, and with each state of a rollout the critic learns from a forward-noised one of
        them; 0 for none.
    """

    body: str = "frozen_taps"
    width: Positive = 64
    num_heads: Positive = 4
    num_queries: Annotated[int, Field(ge=0)] = 4
    grid: Positive = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    text_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.6
    time_conditioning: bool = True
    text_conditioning: bool = True
    shared_head: bool = False
    lora_rank: Positive = 32
    lora_alpha: Positive = 64
    num_passes: Positive = 2
    updates_per_pass: Positive = 4
    replay_images: Annotated[int, Field(ge=0)] = 0
    learning_rate: Rate = 2e-3
    body_learning_rate: Rate = 1e-4
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


class Algorithm(Section):
    """How rewards become advantages, and advantages a loss.

    name: ppo (the critic is the baseline), grpo (a group of `group_size` rollouts of a prompt is), ddpo (the mean of
        all images is, or of each prompt so far), or `module:Class`.
    ratio: `likelihood`, or `guard`, the log-ratio of GRPO-Guard, whose mean is 0 at every noise level.
    log_prob_scale: `mean` divides the log-prob by the latent dimensions, so that `clip` is a bound per dimension.
    trust_region: `clip` of PPO, or `divergence`: the mask of Flow-DPPO beyond `divergence_bound`, nats per dimension.
    gae_lambda: of the advantages; below 1 the critic's later values stand for what comes after a step, so its credit is
        not drowned by what later steps did. value_lambda: the same for the critic's own targets, 1 is the reward.
    whitening: of advantages over all steps together, or of each step for itself.
    combination: of several rewards: `by_head` whitens each one's advantages before the weighted sum, `sum` only after.
    value_guidance: how far the actor's means are drawn uphill on the critic, in std^2 times the gradient of its values,
        which are in standard deviations of each reward; 0 leaves the critic a baseline.
    prediction_kl: weight of mean (prediction - prediction of the base)^2; 0 keeps no reference.
    """

    name: str = "ppo"
    group_size: Positive = 1
    baseline: Literal["batch", "prompt"] = "batch"
    prompt_min_count: Positive = 4
    ratio: Literal["likelihood", "guard"] = "likelihood"
    log_prob_scale: Literal["mean", "sum"] = "mean"
    trust_region: Literal["clip", "divergence"] = "clip"
    clip: Rate = 8e-4
    divergence_bound: Rate = 1e-4
    discount: Fraction = 1.0
    gae_lambda: Fraction = 1.0
    value_lambda: Fraction = 1.0
    whitening: Literal["global", "per_step"] = "global"
    combination: Literal["by_head", "sum"] = "by_head"
    advantage_clip: Rate = 10.0
    value_guidance: NonNegative = 0.0
    prediction_kl: NonNegative = 0.0


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


class Strengths(Section):
    """How much a reward of weight 1 counts for each method, in standard deviations of that reward."""

    value_gradient: Rate = 20.0
    best_of_n: Rate = 1.0
    resampling: Rate = 5.0
    twisted: Rate = 10.0
    svdd: Rate = 1.0

    def of(self, method: str) -> float:
        """The strength of a row of `STEERING`."""
        return float(getattr(self, method))


class Schedule(Section):
    """When steering acts, and how: at the steps k of K with start <= k / K < stop.

    normalised: the gradient gives the direction alone, and a strength is the length of the step, in standard deviations
        of the transition.
    potential: of resampling: `diff` weighs each step by exp of the value's rise, `max` by that of its highest so far.
    tempering: values count ((k + 1) / n)^tempering at the k-th of n steered steps; 0 is fully from the first one on.
    resample_below: particles are resampled where their effective sample size is below this share of their number.
    """

    start: Fraction = 0.3
    stop: Fraction = 0.8
    normalised: bool = False
    potential: Literal["diff", "max"] = "diff"
    tempering: NonNegative = 0.0
    resample_below: Fraction = 0.7


class Steering(Section):
    """Strengths and schedule of each way to steer, and the benchmark's arms.

    gradient_strengths: of `value_gradient`, each an arm with one candidate; candidates: of the arms of every method.
    """

    strengths: Strengths = Strengths()
    schedule: Schedule = Schedule()
    num_images: Annotated[int, Field(ge=8)] = 256
    gradient_strengths: list[NonNegative] = [0.0, 10.0, 20.0, 30.0]
    candidates: list[Positive] = [2, 4, 8]


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


class Tracking(BaseModel):
    """Where numbers and pictures of the training go beside TensorBoard. use: a row of `TRACKERS` or `module:Class`; its
    own settings stand beside it."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    use: str


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
    tracking: list[Tracking] = []

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
    """Validate nested dictionaries into a Config. Raises ConfigError with every problem at once."""
    try:
        config = Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError([_problem(detail) for detail in error.errors(include_url=False)]) from None
    problems = _impossible(config)
    if problems:
        raise ConfigError(problems)
    return config


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
        if name.isdigit():
            continue
        annotation = section.model_fields[name].annotation
        section = next((a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")), annotation)
    return list(section.model_fields)


def _impossible(config: Config) -> list[Problem]:
    """Combinations of valid fields that cannot run."""
    problems = []

    def refuse(condition: bool, path: str, value: object, problem: str, remedy: str) -> None:
        if condition:
            problems.append(Problem(path, value, problem, remedy))

    algorithm, train, kernel = config.algorithm, config.train, config.kernel
    refuse(
        kernel.noise == 0,
        "kernel.noise",
        kernel.noise,
        f"makes the {kernel.name} kernel deterministic, and {algorithm.name} needs the density of each step",
        "Set kernel.noise above 0, for example 1.0.",
    )
    refuse(
        algorithm.name == "grpo" and algorithm.group_size < 2,
        "algorithm.group_size",
        algorithm.group_size,
        "grpo compares the rollouts of one prompt and needs at least 2",
        "Set algorithm.group_size=4, or algorithm.name=ppo.",
    )
    refuse(
        algorithm.value_guidance > 0 and algorithm.name in {"ddpo", "grpo"},
        "algorithm.value_guidance",
        algorithm.value_guidance,
        f"{algorithm.name} has no critic whose gradient could guide the actor",
        "Set algorithm.name=ppo, or algorithm.value_guidance=0.",
    )
    schedule = config.steering.schedule
    refuse(
        schedule.start >= schedule.stop,
        "steering.schedule.start",
        schedule.start,
        f"is not before steering.schedule.stop = {schedule.stop:g}, so steering would never act",
        "Use for example 0 and 1.",
    )
    stopping = train.early_stopping
    watched = [reward.name for reward in config.rewards if reward.weight == 0]
    refuse(
        stopping is not None and stopping.reward not in watched,
        "train.early_stopping.reward",
        stopping.reward if stopping else None,
        "is not a watched reward of this run: one that is trained on rises to the end",
        f"Choose one with weight 0 (now: {', '.join(watched) or 'none'}).",
    )
    refuse(
        train.block_images % algorithm.group_size != 0,
        "train.block_images",
        train.block_images,
        f"is no multiple of algorithm.group_size = {algorithm.group_size}",
        "Make a block hold whole groups.",
    )
    refuse(
        train.images_per_iteration % (train.block_images * train.num_workers) != 0,
        "train.images_per_iteration",
        train.images_per_iteration,
        f"cannot be dealt evenly in blocks of {train.block_images} to {train.num_workers} workers",
        f"Use a multiple of {train.block_images * train.num_workers}.",
    )
    rows = train.block_images * (kernel.num_steps - 1)
    refuse(
        train.updates_per_iteration > rows,
        "train.updates_per_iteration",
        train.updates_per_iteration,
        f"is more than the {rows} transitions of a block",
        "Use fewer updates or larger blocks.",
    )
    refuse(
        all(reward.weight == 0 for reward in config.rewards),
        "rewards",
        list(config.reward_names),
        "no reward has a weight above 0, so there is nothing to learn",
        "Give one a weight, for example weight: 1.0.",
    )
    refuse(
        len(set(config.reward_names)) != len(config.rewards),
        "rewards",
        list(config.reward_names),
        "a reward is listed twice",
        "List each once and use its weight.",
    )
    refuse(
        config.gate.reward not in config.reward_names,
        "gate.reward",
        config.gate.reward,
        "is none of this run's rewards",
        f"Choose one of {', '.join(config.reward_names)}.",
    )
    for name in config.gate.floors:
        refuse(
            name not in config.reward_names,
            f"gate.floors.{name}",
            config.gate.floors[name],
            f"{name} is none of this run's rewards",
            f"Choose one of {', '.join(config.reward_names)}.",
        )
    refuse(
        config.critic.width % config.critic.num_heads != 0,
        "critic.width",
        config.critic.width,
        f"is no multiple of critic.num_heads = {config.critic.num_heads}",
        "Use for example 128 and 4.",
    )
    return problems

"""The configuration of a run: strict and frozen. Every field is checked, and all problems are reported together.

A configuration is a recipe, then a file, then `--set path=value`, merged in that order (`latentac.config.fields`).

It owns the names of extensions (`use`, `name`) and what the framework does with them (a weight, a time-out). The other
fields of an extension are declared in the class's `Settings` and checked by `latentac.runs.resolution`.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentac.config.learning import Algorithm, Critic, Policy, Pretrain, Train
from latentac.config.sections import (
    Characters,
    Extension,
    Named,
    NonNegative,
    Number,
    Particles,
    Pictures,
    Positive,
    Rate,
    Rows,
    Seconds,
    Section,
    Wait,
)
from latentac.system.names import Name, as_name


class Backbone(Extension):
    """The pretrained diffusion model."""

    use: str = "unet"
    """`unet` (StableDiffusionPipeline), `dit` (StableDiffusion3Pipeline), or `module:Class`."""
    source: str
    """`builtin:<name>`, a diffusers folder, or a hub id: `builtin:shapes-unet`, `/models/sd15`."""
    revision: str = ""
    """A commit, which pins it, a tag or a branch of a hub id; empty for its main branch: `v1.0`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU where there is one."""


class Kernel(Extension):
    """The sampler: how one denoising step is drawn."""

    use: str = "ddim"
    """`ddim` for variance-preserving models; `flow_sde`, `dance_sde`, `cps` for flow models; or `module:Class`."""
    num_steps: Annotated[int, Field(ge=2, le=1000)] = 10
    """Denoising steps per picture, K."""


class Prompts(Section):
    """What pictures are asked for."""

    source: str
    """`builtin:shapes`, a file (JSON, JSONL, CSV, plain text), or a folder with train.* and held_out.*."""
    train: str = ""
    """A file of training prompts. With `held_out` it takes the place of `source`."""
    held_out: str = ""
    """A file of held-out prompts."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Where there is one list only, this share of its texts is held out: those whose hash with `split_seed` is
    smallest. It is the same on every machine and for every seed of a run."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides which texts are held out."""
    on_truncation: Literal["refuse", "warn"] = "refuse"
    """What `prepare` does where a prompt has more tokens than the text encoder reads."""


class Reward(Named):
    """What a picture is worth for a prompt."""

    use: str
    """A row of the rewards' table, or `module:Class`."""
    weight: NonNegative = 1.0
    """Its share in what is trained on. A reward of weight 0 is measured and not trained on."""
    timeout_seconds: Seconds = 300.0
    """Bound of one call, in seconds. A call that takes longer ends the run with the reward's name."""
    retries: Annotated[int, Field(ge=0, le=20)] = 3
    """Further attempts after an error that the class declares transient; the waits start at 1 s and double."""


class Evaluation(Section):
    """What is measured on held-out prompts."""

    num_images: Annotated[int, Field(ge=8)] = 1024
    """Pictures of each policy, one per held-out prompt."""
    num_gallery_prompts: Positive = 12
    """Prompts whose pictures the report shows."""
    num_bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of each bootstrap interval."""
    num_diversity_prompts: Annotated[int, Field(ge=2)] = 32
    """Prompts on which diversity and latency are measured."""
    pictures_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Pictures of each of these prompts."""


class Steering(Section):
    """The ways to steer that the benchmark compares and the endpoint offers."""

    methods: list[Named] = []
    """Of the steering table: `value_gradient`, `best_of_n`, `resampling`, `twisted`, `svdd`, or `module:Class`."""
    num_images: Annotated[int, Field(ge=8)] = 256
    """Pictures per arm of the benchmark."""


class Gate(Section):
    """When a trained policy is promoted. Every low and high end is that of a 95 % interval. A number that is missing or
    not finite holds the run."""

    reward: str
    """The reward that the policy is for. Bounds on it are in its unit."""
    min_gain: Number = 0.05
    """Smallest mean gain over the base."""
    min_lower_bound: Number = 0.0
    """Smallest low end of the gain over the base."""
    max_loss_fraction: NonNegative = 0.5
    """By how much of the base's mean any other reward may fall."""
    floors: dict[str, Number] = {}
    """Reward name -> what the low end of the trained policy's mean must reach: `{jpeg_compressibility: -1.2}`."""
    max_incumbent_loss: NonNegative = 0.05
    """How far below 0 the low end of trained minus incumbent may lie."""
    must_beat_incumbent: bool = False
    """Require the low end of trained minus incumbent to be above 0."""
    unfit_incumbent: Literal["hold", "replace"] = "hold"
    """What to do where the model in production cannot be compared; `replace` promotes without the comparison."""
    min_diversity_kept: NonNegative = 0.7
    """Smallest low end of the share of diversity that is kept, against the base and against the incumbent."""
    max_latency_ratio: Rate = 1.25
    """Largest high end of the ratio of the seconds per picture, to the base and to the incumbent."""


class Limits(Section):
    """What one request to the endpoint may ask for."""

    max_images: Pictures = 8
    """Pictures per request, over all its prompts."""
    max_steps: Annotated[int, Field(ge=2, le=1000)] = 100
    """Denoising steps per picture."""
    max_particles: Particles = 32
    """Rollouts per picture."""
    max_prompt_characters: Characters = 1000
    """Characters per prompt."""
    max_guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 20.0
    """Scale of classifier-free guidance."""
    allow_truncation: bool = False
    """Draw a prompt of more tokens than the text encoder reads by its first ones, and say so in the answer; by default
    it is refused."""


class Batching(Section):
    """How requests to the endpoint share the denoiser."""

    batch_rows: Rows = 4
    """Rollouts that go through the denoiser together. A batch that is not full is filled up, so that a picture's bytes
    do not depend on who shares it: more rows give more pictures per second, and each alone takes longer."""
    batch_wait_seconds: Wait = 0.005
    """How long a picture waits for others to share a batch, in seconds."""
    max_queued_images: Pictures = 64
    """Pictures that may wait; beyond that requests are answered 429."""
    request_seconds: Seconds = 300.0
    """The longest that a request may take, waiting included, in seconds."""


class Serving(Batching, Limits):
    """The endpoint, and what one request may ask of it."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the proof that `deploy` makes; 0 for any free one."""
    ready_seconds: Seconds = 120.0
    """How long a server may take until it is ready, in seconds."""
    include_base: bool = True
    """Export the untouched denoiser too, to compare with. With a large one it doubles the folder."""


class Tracker(Named):
    """Where numbers and pictures of the training go beside TensorBoard: `mlflow`, `wandb`."""


class Card(Section):
    """What the model card says and no run can know. What is left empty the card calls unknown, or has a default for."""

    licence: str = ""
    """Of the trained weights, as the hub writes it, for example apache-2.0; that of the base may bind it."""
    base_model: str = ""
    """The base's id on the hub, where `backbone.source` is none."""
    datasets: list[str] = []
    """Ids on the hub of what was learned from, the base's data included."""
    data: str = ""
    """What the base was trained on, and where the prompts are from; Markdown."""
    intended_use: str = ""
    """What the model is for, and what it is not for; Markdown."""
    limits: str = ""
    """What is known to go wrong; Markdown."""


class Config(Section):
    """A run, completely: two equal configurations on one machine give bitwise equal results.

    project: whose production model a new one is held against and replaces (default: the configuration's name).
    """

    recipe: str
    """Name of the recipe that the configuration began with."""
    project: Name
    """Whose production model a new one is held against and replaces; by default the configuration's name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random draw of the run follows from it."""
    backbone: Backbone
    """The pretrained diffusion model."""
    kernel: Kernel = Kernel()
    """The sampler."""
    prompts: Prompts
    """What pictures are asked for."""
    rewards: Annotated[list[Reward], Field(min_length=1)]
    """What a picture is worth: one entry per reward."""
    policy: Policy = Policy()
    """The actor."""
    critic: Critic = Critic()
    """The value heads and what they read."""
    pretrain: Pretrain = Pretrain()
    """Value pretraining."""
    algorithm: Algorithm = Algorithm()
    """Advantages and loss."""
    train: Train = Train()
    """Iterations, updates, workers, checkpoints."""
    evaluation: Evaluation = Evaluation()
    """Measurements on held-out prompts."""
    steering: Steering = Steering()
    """Ways to steer."""
    gate: Gate
    """Bounds of a promotion."""
    serving: Serving = Serving()
    """The endpoint."""
    tracking: list[Tracker] = []
    """Where numbers and pictures of the training go beside TensorBoard."""
    card: Card = Card()
    """What the model card says and no run can know."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping) and "project" not in fields:
            return {**fields, "project": as_name(str(fields.get("recipe", "")))}
        return fields

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


def suggestion(name: str, known: Sequence[str]) -> str:
    """`Did you mean "x"? ` when `name` resembles one of `known`, and then what is known."""
    close = difflib.get_close_matches(name, known, n=1)
    guess = f'Did you mean "{close[0]}"? ' if close else ""
    return f"{guess}Known: {', '.join(known)}."

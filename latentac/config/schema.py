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
    Images,
    Named,
    NonNegative,
    Number,
    Particles,
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
    """`unet` (StableDiffusionPipeline), `sdxl` (StableDiffusionXLPipeline), `dit` (StableDiffusion3Pipeline), `flux`
    (FluxPipeline), `zimage` (ZImagePipeline), or `module:Class`."""
    source: str
    """`builtin:<name>`, a diffusers folder, an address of `latentac mirror`, or a hub id: `builtin:shapes-unet`,
    `/models/sd15`."""
    revision: str = ""
    """Revision on the hub: a commit, a tag, or a branch. Only a commit pins the model. Empty means the main branch.
    Example: `v1.0`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` uses a GPU if there is one."""


class Kernel(Extension):
    """The sampler: how one denoising step is drawn."""

    use: str = "ddim"
    """`ddim` for variance-preserving models; `flow_sde`, `dance_sde`, `cps` for flow models; or `module:Class`."""
    num_steps: Annotated[int, Field(ge=2, le=1000)] = 10
    """Denoising steps per image, K."""


class Prompts(Section):
    """The prompts that images are made for."""

    source: str
    """`builtin:shapes`, `builtin:words`, `builtin:animals`, a file (JSON, JSONL, CSV, plain text), or a folder with
    train.* and held_out.*; a file or folder also by its address of `latentac mirror`."""
    train: str = ""
    """A file of training prompts. `train` and `held_out` together replace `source`."""
    held_out: str = ""
    """A file of held-out prompts."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """If there is only one list, this share of its texts is held out: those with the smallest hash of text and
    `split_seed`. The split is the same on every machine and for every seed of a run."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides which texts are held out."""
    on_truncation: Literal["refuse", "warn"] = "refuse"
    """What `prepare` does if a prompt has more tokens than the text encoder reads."""


class Reward(Named):
    """A function of image and prompt that is to be maximised."""

    use: str
    """A row of the rewards' table, or `module:Class`."""
    weight: NonNegative = 1.0
    """Its weight in training. A reward of weight 0 and without `floor` is measured, but not trained on."""
    bounds: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None
    """`[low, high]`: advantages and critic see the reward within these bounds. Reports show it as it was measured."""
    floor: Number | None = None
    """The mean reward below which it gains weight: a constraint on training, with a Lagrange multiplier that is added
    to `weight`. In the reward's unit."""
    multiplier_rate: Rate = 0.2
    """How much the multiplier of `floor` changes per iteration in which the mean misses the floor by one standard
    deviation of the reward. Larger misses count as one."""
    multiplier_max: Rate = 10.0
    """Largest multiplier of `floor`."""
    timeout_seconds: Seconds = 300.0
    """Time limit of one call, in seconds. A slower call ends the run with an error that names the reward."""
    retries: Annotated[int, Field(ge=0, le=20)] = 3
    """Further attempts after an error that the class declares transient. The first wait is 1 s; each further one is
    twice as long."""
    processes: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that score, for each process that makes images; they share its batches. 0 scores in the process
    itself. If one crashes, it is started again. If a call exceeds `timeout_seconds`, its process is killed."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """How many processes are started again after crashes, for each process that makes images. No batch is given to
    more than three."""
    cached_scores: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    """How many scores are kept in memory, the newest; 0 keeps none. For a reward that gives equal images, prompts, and
    metadata equal numbers."""
    scores_folder: str = ""
    """A folder whose file `scores.sqlite` keeps all scores, also for other runs. It needs `cached_scores`."""


class Evaluation(Section):
    """What is measured on held-out prompts."""

    num_images: Annotated[int, Field(ge=8)] = 1024
    """Images of each policy, one per held-out prompt."""
    num_gallery_prompts: Positive = 12
    """Prompts whose images the report shows."""
    num_bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Number of resamples for each bootstrap interval."""
    num_diversity_prompts: Annotated[int, Field(ge=2)] = 32
    """Prompts on which diversity and latency are measured."""
    images_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Images per prompt for these measurements."""


class Steering(Section):
    """The steering methods that the benchmark compares and the endpoint offers."""

    methods: list[Named] = []
    """Steering methods: `value_gradient`, `best_of_n`, `resampling`, `twisted`, `svdd`, or `module:Class`."""
    num_images: Annotated[int, Field(ge=8)] = 256
    """Images per arm of the benchmark."""


class Gate(Section):
    """When a trained policy is promoted. Lower and upper bounds are those of a 95 % interval. A number that is missing
    or not finite holds the model."""

    reward: str
    """The reward that decides. Its bounds are in its unit."""
    min_gain: Number = 0.05
    """Smallest allowed mean gain over the base."""
    min_lower_bound: Number = 0.0
    """Smallest allowed lower bound of the gain over the base."""
    max_loss_fraction: NonNegative = 0.5
    """Largest allowed loss of any other reward, as a share of the base's mean."""
    floors: dict[str, Number] = {}
    """Reward name -> smallest allowed lower bound of the trained policy's mean: `{jpeg_compressibility: -1.2}`."""
    max_incumbent_loss: NonNegative = 0.05
    """How far below 0 the lower bound of "trained minus incumbent" may be."""
    must_beat_incumbent: bool = False
    """Require the lower bound of "trained minus incumbent" to be above 0."""
    unfit_incumbent: Literal["hold", "replace"] = "hold"
    """What to do if the model in production cannot be compared; `replace` promotes without the comparison."""
    min_diversity_kept: NonNegative = 0.7
    """Smallest allowed lower bound of the share of diversity that is kept, against the base and the incumbent."""
    max_latency_ratio: Rate = 1.25
    """Largest allowed upper bound of the ratio of seconds per image, to the base and to the incumbent."""


class Limits(Section):
    """Limits of one request to the endpoint."""

    max_images: Images = 8
    """Images per request, over all its prompts."""
    max_steps: Annotated[int, Field(ge=2, le=1000)] = 100
    """Denoising steps per image."""
    max_particles: Particles = 32
    """Rollouts per image."""
    max_prompt_characters: Characters = 1000
    """Characters per prompt."""
    max_guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 20.0
    """Largest guidance scale of classifier-free guidance."""
    allow_truncation: bool = False
    """Accept a prompt that has more tokens than the text encoder reads: use its first tokens, and say so in the answer.
    By default, such a prompt is refused."""


class Batching(Section):
    """How requests to the endpoint share the denoiser."""

    batch_rows: Rows = 4
    """Rollouts that go through the denoiser together. A batch that is not full is padded, so that the bytes of an image
    do not depend on other requests. More rows give more images per second, but a single image takes longer."""
    batch_wait_seconds: Wait = 0.005
    """How long an image waits for others to share its batch, in seconds."""
    max_queued_images: Images = 64
    """Images that may wait. Beyond that, requests are answered with 429."""
    request_seconds: Seconds = 300.0
    """Longest time that a request may take, including its wait, in seconds."""


class Serving(Batching, Limits):
    """The endpoint, and the limits of a request to it."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the server that `deploy` starts to check the model; 0 for any free port."""
    ready_seconds: Seconds = 120.0
    """How long a server may take to become ready, in seconds."""
    include_base: bool = True
    """Also offer the base denoiser, for comparison. With a large model this doubles the size of a merged export. With
    `export.weights: adapter` it costs neither space nor memory, and if it is false, the endpoint merges the adapter."""


class Export(Section):
    """What `deploy` publishes as the model."""

    weights: Literal["merged", "adapter"] = "merged"
    """`merged`: a whole pipeline. `adapter`: only the LoRA adapter, with the base by reference and hash; it needs
    `policy.adaptation: lora`. The endpoint then keeps one copy of the base in memory, also for requests to the base."""


class Tracker(Named):
    """Where training metrics and images go in addition to TensorBoard: `mlflow`, `wandb`."""


class Card(Section):
    """What the model card says but a run cannot know. For an empty field the card says "unknown" or uses a default."""

    licence: str = ""
    """Licence of the trained weights in the hub's notation, for example apache-2.0. The licence of the base may
    restrict it."""
    base_model: str = ""
    """The base's id on the hub, if `backbone.source` is not a hub id."""
    datasets: list[str] = []
    """Hub ids of the training data, including the base's."""
    data: str = ""
    """What the base was trained on, and where the prompts come from; Markdown."""
    intended_use: str = ""
    """What the model is for, and what it is not for; Markdown."""
    limits: str = ""
    """Known failures; Markdown."""


class Config(Section):
    """The complete configuration of a run. Two equal configurations give bitwise equal results on one machine.

    project: the name under which a model is in production; a new model is compared with it and replaces it (default:
    the configuration's name).
    """

    recipe: str
    """Name of the recipe that the configuration began with."""
    project: Name
    """The name under which a model is in production. A new model is compared with it and replaces it. Default: the
    configuration's name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """All random draws of the run follow from it."""
    backbone: Backbone
    """The pretrained diffusion model."""
    kernel: Kernel = Kernel()
    """The sampler."""
    prompts: Prompts
    """The prompts that images are made for."""
    rewards: Annotated[list[Reward], Field(min_length=1)]
    """The rewards, one entry each."""
    policy: Policy = Policy()
    """The policy."""
    critic: Critic = Critic()
    """The value heads and the network below them."""
    pretrain: Pretrain = Pretrain()
    """Value pretraining."""
    algorithm: Algorithm = Algorithm()
    """Advantages and loss."""
    train: Train = Train()
    """Iterations, updates, workers, checkpoints."""
    evaluation: Evaluation = Evaluation()
    """Measurements on held-out prompts."""
    steering: Steering = Steering()
    """Steering methods."""
    gate: Gate
    """Bounds for promotion."""
    serving: Serving = Serving()
    """The endpoint."""
    export: Export = Export()
    """What is published as the model."""
    tracking: list[Tracker] = []
    """Where training metrics and images go in addition to TensorBoard."""
    card: Card = Card()
    """What the model card says but a run cannot know."""

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
    def watched_rewards(self) -> tuple[str, ...]:
        """The rewards that are measured but not trained on."""
        return tuple(one.name for one in self.rewards if one.weight == 0 and one.floor is None)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, hex."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def suggestion(name: str, known: Sequence[str]) -> str:
    """`Did you mean "x"? ` when `name` resembles one of `known`, and then what is known."""
    close = difflib.get_close_matches(name, known, n=1)
    guess = f'Did you mean "{close[0]}"? ' if close else ""
    return f"{guess}Known: {', '.join(known)}."

"""The shapes of the JSON files that steps publish and others read."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from latentac.store.shape import (
    _MOST_IMAGES,
    _MOST_REWARDS,
    ByReward,
    Count,
    Finite,
    Interval,
    Label,
    Number,
    Scored,
    Shape,
    Speed,
    Steps,
    Texts,
    Whole,
    one_per_image,
)


class _Reward(Shape):
    use: Label
    name: Label | None = None
    weight: Number = 1.0


class _GateSettings(Shape):
    reward: Label


class _Used(Shape):
    use: str = ""


class _Backbone(_Used):
    source: str


class _PromptSettings(Shape):
    source: str = ""


class _Card(Shape):
    licence: str | None = None
    datasets: Texts | None = None
    base_model: str | None = None
    data: str | None = None
    intended_use: str | None = None
    limits: str | None = None


class Settings(Shape):
    """config.json, as far as a page shows it: of any version. `latentac.config.validation` checks what steps use."""

    recipe: str
    seed: Whole
    gate: _GateSettings
    backbone: _Backbone
    rewards: Annotated[list[_Reward], Field(min_length=1, max_length=_MOST_REWARDS)]
    prompts: _PromptSettings | None = None
    policy: dict[str, Any] | None = None
    kernel: dict[str, Any] | None = None
    algorithm: _Used | None = None
    card: _Card | None = None
    project: str = ""


class Environment(Shape):
    """environment.json."""

    commit: str | None = None
    machine: dict[str, str | Number | bool | None] | None = None
    versions: dict[str, str | None] | None = None


class _Prompt(Shape):
    text: str


class Prompts(Shape):
    """prompts.json, as a comparison reads it."""

    held_out: list[_Prompt | str]


class _Method(Shape):
    summary: str
    needs_gradient: bool
    strength: Annotated[Finite, Field(gt=0)]
    particles: Annotated[int, Field(gt=0, le=1024)]


class Extensions(Shape):
    """extensions.json."""

    units: dict[str, str]
    methods: dict[str, _Method]
    code: dict[str, str] = {}


class _Truncated(Shape):
    held_out: list[Count]


class Lengths(Shape):
    """lengths.json."""

    truncated: _Truncated


class Metrics(Shape):
    """metrics.json of `pretrain-value`."""

    explained_variance: Steps | None = None


class Iteration(Shape):
    """A row of history.json."""

    iteration: Count | None = None
    images: Count | None = None
    reward_mean: Number | None = None
    rewards: Annotated[dict[Label, Number | None], Field(max_length=_MOST_REWARDS)] | None = None
    kl: Number | None = None
    clip_share: Number | None = None
    explained_variance: Steps | None = None
    seconds: Number | None = None
    speed: Speed | None = None


class _Production(Shape):
    version: str | None = None
    sha256: str | None = None
    problem: str | None = None


class _Contrast(Shape):
    """Of diversity or latency: an interval for each arm, and for what is held against each other arm."""

    base: Interval | None = None
    trained: Interval | None = None
    incumbent: Interval | None = None
    difference: dict[str, Interval | None] | None = None
    kept: dict[str, Interval | None] | None = None
    ratio: dict[str, Interval | None] | None = None
    block_images: Count | None = None


class _CriticMeasured(Shape):
    explained_variance: Steps | None = None


class Evaluation(Shape):
    """evaluation.json. The incumbent is measured by every reward that base is."""

    base: ByReward
    trained: ByReward
    difference: ByReward
    incumbent: ByReward | None = None
    incumbent_difference: ByReward | None = None
    held_out_gap: ByReward | None = None
    units: dict[str, Label | None] = {}
    production: _Production | None = None
    diversity: _Contrast | None = None
    latency: _Contrast | None = None
    definitions: dict[str, str] | None = None
    categories: dict[str, dict[str, Number | None]] = {}
    critic: _CriticMeasured = _CriticMeasured()

    @model_validator(mode="after")
    def _of_the_same_rewards(self) -> Self:
        for name in ("incumbent", "incumbent_difference"):
            rows = getattr(self, name)
            if rows is not None and (missing := self.base.keys() - rows.keys()):
                raise ValueError(f"{name} lacks the reward {min(missing)!r}, which base has")
        return self


class Scores(Shape):
    """scores.json: a score of each image, by arm and reward."""

    prompts: Annotated[Texts, Field(min_length=1, max_length=_MOST_IMAGES)]
    noise: Any
    rewards: dict[str, Scored]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        one_per_image(self.rewards, len(self.prompts))
        return self


def _sides(given: Any) -> Any:
    """Older versions knew squares only, and wrote one number."""
    return [given, given] if isinstance(given, int) else given


Sides = Annotated[
    list[Annotated[int, Field(gt=0, le=2**14)]], Field(min_length=2, max_length=2), BeforeValidator(_sides)
]


class Gallery(Shape):
    """gallery.json: what a contact sheet shows."""

    prompts: Annotated[Texts, Field(min_length=1, max_length=10_000)]
    seeds: list[str | Whole]
    image_size: Sides
    columns: Annotated[int, Field(gt=0, le=10_000)]
    rewards: dict[str, Scored] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(self.seeds) != len(self.prompts):
            raise ValueError(f"it has {len(self.seeds)} seeds for {len(self.prompts)} prompts")
        one_per_image(self.rewards or {}, len(self.prompts))
        return self


class Steered(Shape):
    """A row of steering.json."""

    method: Label
    reward: Label
    strength: Finite
    particles: Annotated[int, Field(gt=0, lt=2**31)]
    nfe: Annotated[Finite, Field(ge=0, le=1e12)]
    mean: Number
    low: Number | None = None
    high: Number | None = None
    n: Count | None = None
    seconds: Number | None = None
    diversity: Number | None = None


class _Check(Shape):
    name: str
    value: Number | str | None
    relation: str
    bound: Number | str | None
    passed: bool


class _Override(Shape):
    field: str
    old: Any
    new: Any


class _Former(Shape):
    decision: Literal["promote", "hold"]
    reasons: Texts
    decided: str
    overrides: list[_Override]
    by: str | None


class Decision(Shape):
    """gate.json."""

    decision: Literal["promote", "hold"]
    reasons: Texts
    checks: list[_Check]
    production: str | None = None
    overrides: list[_Override] | None = None
    former: list[_Former] | None = None
    by: str | None = None


class _Forced(Shape):
    by: str | None
    reasons: Texts


class Deployment(Shape):
    """deployment.json."""

    version: str
    project: str | None = None
    forced: _Forced | None = None
    image_sha256: str | None = None
    seconds: Number | None = None
    endpoint: str | None = None
    request: str | dict[str, Any] | None = None


class Timings(Shape):
    """timings.json: seconds as the driver saw them."""

    steps: dict[str, Annotated[Finite, Field(ge=0)]] = {}
    total: Annotated[Finite, Field(ge=0)] = 0.0


class Failure(Shape):
    """error.json: the error that ended a step of a run on this machine."""

    task: Label
    exit_code: Annotated[int, Field(ge=0, le=255)]
    message: str


class Fetched(Shape):
    """backbone.json, as far as an export says it: the commit that a hub id was resolved to."""

    commit: Label | None = None


class Latest(Shape):
    """The pointer LATEST of a run's checkpoints."""

    key: str


class Progress(Shape):
    """progress.json of a checkpoint."""

    history: list[Iteration]
    recoveries: list[dict[str, Any]]
    version: Literal[1] = 1


SHAPES: dict[str, Any] = {
    "backbone.json": Fetched,
    "config.json": Settings,
    "deployment.json": Deployment,
    "error.json": Failure,
    "environment.json": Environment,
    "evaluation.json": Evaluation,
    "extensions.json": Extensions,
    "gallery.json": Gallery,
    "gate.json": Decision,
    "history.json": Annotated[list[Iteration], Field(max_length=100_000)],
    "LATEST": Latest,
    "lengths.json": Lengths,
    "metrics.json": Metrics,
    "progress.json": Progress,
    "prompts.json": Prompts,
    "scores.json": Scores,
    "steering.json": Annotated[list[Steered], Field(max_length=1_000)],
    "timings.json": Timings,
}
"""Name of a file, wherever it lies -> what it holds."""

"""The JSON files that steps publish and others read: the shape of each, checked before anything is made of it.

A run's artifacts may be somebody else's. Their hashes say that they are whole, not what is in them. So a file is read
through `parse` or `read` alone: what does not have its shape is one IntegrityError that names file, field and value.
A shape has what is used of a file. Further fields are ignored, and those of later versions have defaults, so what
earlier versions published is read too.
"""

import math
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from latentac.errors import IntegrityError
from latentac.reading import read_bytes, record

_LARGEST = 1e100
_MOST_STEPS, _MOST_REWARDS, _MOST_PICTURES = 10_000, 256, 200_000
_MOST_SHOWN = 80


def _bounded(value: float) -> float:
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError(f"Input should be at most {_LARGEST:g} either way")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("Input should be a finite number")
    return _bounded(value)


Number = Annotated[float, AfterValidator(_bounded)]
"""NaN and infinity too: whoever shows numbers turns those into null, with a note."""
Finite = Annotated[float, AfterValidator(_finite)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Whole = Annotated[int, Field(gt=-(2**63), lt=2**64)]
Steps = Annotated[list[Number | None], Field(max_length=_MOST_STEPS)]
Texts = list[str]
Label = Annotated[str, Field(max_length=500)]
"""What stands beside a curve or in a legend, whose layout takes longer the longer its words are: a name, a unit."""


class Shape(BaseModel):
    """Fields of a JSON object, each of its very type."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Interval(Shape):
    """Of a mean, a ratio or a median."""

    mean: Number | None = None
    ratio: Number | None = None
    median: Number | None = None
    low: Number | None
    high: Number | None
    n: Count | None


ByReward = Annotated[dict[Label, Interval], Field(max_length=_MOST_REWARDS)]
Scored = Annotated[
    dict[str, Annotated[list[Finite], Field(max_length=_MOST_PICTURES)]], Field(max_length=_MOST_REWARDS)
]


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
    """config.json, as far as a page shows it: of any version. `latentac.validation` checks what a step runs by."""

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


def _one_a_picture(rewards: dict[str, Scored], count: int) -> None:
    for arm, rows in rewards.items():
        for reward, scores in rows.items():
            if len(scores) != count:
                raise ValueError(f"rewards.{arm}.{reward} has {len(scores)} scores for {count} pictures")


class Scores(Shape):
    """scores.json: a score of each picture, by arm and reward."""

    prompts: Annotated[Texts, Field(min_length=1, max_length=_MOST_PICTURES)]
    noise: Any
    rewards: dict[str, Scored]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        _one_a_picture(self.rewards, len(self.prompts))
        return self


class Gallery(Shape):
    """gallery.json: what a contact sheet shows."""

    prompts: Annotated[Texts, Field(min_length=1, max_length=10_000)]
    seeds: list[str | Whole]
    image_size: Annotated[int, Field(gt=0, le=2**14)]
    columns: Annotated[int, Field(gt=0, le=10_000)]
    rewards: dict[str, Scored] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if len(self.seeds) != len(self.prompts):
            raise ValueError(f"it has {len(self.seeds)} seeds for {len(self.prompts)} prompts")
        _one_a_picture(self.rewards or {}, len(self.prompts))
        return self


class Steered(Shape):
    """A row of steering.json."""

    method: Label
    reward: Label
    strength: Finite
    candidates: Annotated[int, Field(gt=0, lt=2**31)]
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


class Verdict(Shape):
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
    picture_sha256: str | None = None
    seconds: Number | None = None
    endpoint: str | None = None
    request: str | dict[str, Any] | None = None


class Timings(Shape):
    """timings.json: seconds as the driver saw them."""

    stages: dict[str, Annotated[Finite, Field(ge=0)]] = {}
    total: Annotated[Finite, Field(ge=0)] = 0.0


class Latest(Shape):
    """The pointer LATEST of a run's checkpoints."""

    key: str


class Progress(Shape):
    """progress.json of a checkpoint."""

    history: list[Iteration]
    recoveries: list[dict[str, Any]]


SHAPES: dict[str, Any] = {
    "config.json": Settings,
    "deployment.json": Deployment,
    "environment.json": Environment,
    "evaluation.json": Evaluation,
    "extensions.json": Extensions,
    "gallery.json": Gallery,
    "gate.json": Verdict,
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

_ADAPTERS = {name: TypeAdapter[Any](shape) for name, shape in SHAPES.items()}
_AGAIN = "Run the step that writes it again, with this version of latentac"


def parse(raw: str | bytes, where: str, remedy: str = _AGAIN) -> Any:
    """The JSON of a file, as it is written, if it has its shape. where: the file's place, which ends in its name.

    Raises IntegrityError that names it, the field and its value.
    """
    return checked(record(raw, where), where, remedy)


def read(file: Path, where: str = "", remedy: str = _AGAIN) -> Any:
    """`parse` of a regular file of bounded size. where: its place for messages, if that is another than its path."""
    where = where or str(file)
    try:
        return parse(read_bytes(file), where, remedy)
    except ValueError as error:
        raise IntegrityError(where, str(error), remedy) from None


def checked(content: Any, where: str, remedy: str = _AGAIN) -> Any:
    """`content`, if it has the shape of the file at `where`. Raises IntegrityError."""
    try:
        _ADAPTERS[where.rpartition("/")[2]].validate_python(content, strict=True)
    except ValidationError as error:
        raise IntegrityError(where, problem_of(error), remedy) from None
    return content


def metric(manifest: Any, name: str, kind: type) -> Any:
    """What a manifest's metrics say under `name`. Raises IntegrityError where that is nothing of this kind."""
    value = manifest.metrics.get(name)
    if type(value) is not kind:
        where = f"{manifest.key}/manifest.json"
        raise IntegrityError(where, f"metrics.{name} is {_shown(value)}, and must be of type {kind.__name__}", _AGAIN)
    return value


def problem_of(error: ValidationError) -> str:
    """The first thing that is wrong: its field, its value, and what that must be."""
    first = error.errors(include_url=False)[0]
    field = ".".join(_cut(str(part)) for part in first["loc"])
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if first["type"] == "missing":
        return f"it has no field {field}"
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # of fields that do not fit each other
        return f"{field}: {message}" if field else message
    message = message.replace("Input should", "must")
    return f"{field or 'its content'} is {_shown(first['input'])}, and {message}"


def _shown(value: Any) -> str:
    return _cut(reprlib.repr(value))  # not repr: the value may be the whole file


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."

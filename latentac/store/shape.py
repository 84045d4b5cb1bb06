"""What shapes of JSON files are made of: bounded numbers, texts, and intervals."""

import math
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_LARGEST = 1e100


_MOST_STEPS, _MOST_REWARDS, _MOST_IMAGES = 10_000, 256, 200_000


def _bounded(value: float) -> float:
    if math.isfinite(value) and abs(value) > _LARGEST:
        raise ValueError(f"Input should be at most {_LARGEST:g} in absolute value")
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


Scored = Annotated[dict[str, Annotated[list[Finite], Field(max_length=_MOST_IMAGES)]], Field(max_length=_MOST_REWARDS)]


def one_per_image(rewards: dict[str, Scored], count: int) -> None:
    for arm, rows in rewards.items():
        for reward, scores in rows.items():
            if len(scores) != count:
                raise ValueError(f"rewards.{arm}.{reward} has {len(scores)} scores for {count} images")


class Speed(Shape):
    """Of an iteration. phases: seconds of each worker."""

    images_per_second: Number | None = None
    straggler: Number | None = None
    moved_bytes: Number | None = None
    tflops: Number | None = None
    peak_share: Number | None = None
    phases: Annotated[dict[Label, Annotated[list[Number], Field(max_length=10_000)]], Field(max_length=16)] = {}

    @model_validator(mode="after")
    def _of_the_same_workers(self) -> Self:
        if len({len(each) for each in self.phases.values()}) > 1:
            raise ValueError("phases: each has a number per worker")
        return self

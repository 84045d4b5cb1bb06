"""What a caller may ask for. Everything wrong with a request is told at once, each with its path and remedy."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import from_json

from latentac.config.schema import Limits, Number, Section, suggestion
from latentac.serving.exported import Exported
from latentac.system.errors import ConfigError, Problem
from latentac.system.names import PLAIN
from latentac.worlds.promptfiles import text_problem


def _whole(value: object) -> object:
    """JSON has one kind of number: 2.0 is a whole one. Above 2^53 a double stands for several: it is left as it is, for
    the form to refuse, because the caller may mean another than the one that would be drawn."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else value


WHOLE = BeforeValidator(_whole)

Root = TypeVar("Root", bound=Section)

_PROMPT = "Write what the picture shall show."
_OBJECT = "Send an object of the documented fields."
_ELSEWHERE = {
    "n": ("count",),
    "count": ("n",),
    "num_images": ("count", "n"),
    "num_images_per_prompt": ("count", "n"),
    "num_inference_steps": ("num_steps",),
    "steps": ("num_steps",),
    "cfg_scale": ("guidance_scale",),
    "width": ("size",),
    "height": ("size",),
    "text": ("prompt",),
    "inputs": ("instances",),
    "data": ("instances",),
}
"""What other programs call a field -> ours, of which the first that the form has is the remedy."""
POLICIES = ("trained", "base")
"""Whose weights denoise: those that were trained, or the untouched ones, where they were exported."""
MOST_PROBLEMS = 20
"""Told of one request; a longer list helps nobody."""
MAX_WEIGHT = 100.0
"""A weight is a number of standard deviations; far above this the latents leave everything the decoder has seen."""


class Optionals(Section):
    """A section in which null is the same as a field that is left out: what many clients send for what is not set."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        known = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in fields.items() if value is not None or name not in known}


class Request(Optionals):
    """One prompt's pictures. The descriptions are the remedies that a caller reads."""

    prompt: Annotated[str, Field(min_length=1, description=_PROMPT)]
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Use a whole number from 0 to 2^63 - 1."), WHOLE] = 0
    count: Annotated[int, Field(ge=1, description="Use a whole number of pictures, at least 1."), WHOLE] = 1
    num_steps: Annotated[int | None, Field(ge=2, description="Use at least 2 steps, or leave it out."), WHOLE] = None
    size: Annotated[str | None, Field(description="Use the model's own size, or leave it out.")] = None
    guidance_scale: Annotated[Number, Field(ge=1, description="Use a number from 1, which is no guidance.")] = 1.0
    policy: Annotated[str, Field(description=f"Use one of {', '.join(POLICIES)}.")] = POLICIES[0]
    method: Annotated[str | None, Field(description="Use one of the model's methods, none, or leave it out.")] = None
    steering: Annotated[
        dict[str, Number] | None, Field(description="Give a finite number for each reward's name, or leave it out.")
    ] = None
    particles: Annotated[
        int | None, Field(ge=1, description="Use a whole number, at least 1, or leave it out."), WHOLE
    ] = None


class Body(Section):
    """KServe's V1 protocol: a list of requests, answered in order."""

    instances: Annotated[list[Request], Field(min_length=1, description='Send {"instances": [{"prompt": "..."}]}.')]


def most_values(limits: Limits) -> int:
    """Of the JSON of a request: far more than its fields need. Whatever is told of a value takes time, and other
    callers wait for it."""
    return 2_000 + 50 * limits.max_images


def decoded(body: bytes, most: int) -> Any:
    """The JSON of a body, after a byte order mark if there is one. Raises ConfigError where it is none, has more than
    `most` values, or holds a number that JSON has not."""
    try:
        found = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise ConfigError([Problem("body", shortened(body), f"is not JSON: {error}", _OBJECT)]) from None
    if _values(found, most) > most:
        raise ConfigError([Problem("body", None, f"has more than {most} values", "Send several requests.")])
    path = _infinite(found)
    if path is not None:
        told = "is beyond the numbers that a computer holds"
        raise ConfigError([Problem(path or "body", "1e309 or more", told, "Use a smaller number.")])
    return found


def _values(found: Any, most: int) -> int:
    """How many values there are in decoded JSON; counted up to `most`."""
    count, pending = 1, [found]
    while pending and count <= most:
        value = pending.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(inner)
        pending += itertools.islice(inner, most)
    return count


def _infinite(value: Any, path: str = "") -> str | None:
    """The path of a number like 1e400, which JSON can write and no answer can repeat; None where there is none."""
    if isinstance(value, float):
        return path if math.isinf(value) else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_infinite(inner, f"{path}.{shortened(str(name))}".lstrip(".")) for name, inner in items)
    return next((each for each in found if each is not None), None)


def parse(body: object, exported: Exported) -> list[Request]:
    """The requests of a V1 body, decoded JSON. Raises ConfigError with every problem."""
    given, most = body.get("instances") if isinstance(body, dict) else None, exported.limits.max_images
    listed = given if isinstance(given, list) else []
    at_most(most, len(listed))  # first: a long list of wrong ones would be told at length
    limits = [problem for index, fields in enumerate(listed) for problem in beyond(fields, exported, index)]
    requests = validated(Body, body, limits).instances
    at_most(most, sum(request.count for request in requests))
    return requests


def at_most(most: int, images: int) -> None:
    """Raises ConfigError for more than `most` pictures in one request."""
    if images > most:
        told = f"is the number of pictures asked for, above the limit of {most}"
        raise ConfigError([Problem("instances", images, told, "Send several requests.")])


def parse_one(body: object, exported: Exported) -> Request:
    """One request from decoded JSON. Raises ConfigError with every problem."""
    return validated(Request, body, beyond(body, exported))


def validated(root: type[Root], fields: object, limits: Sequence[Problem] = ()) -> Root:
    """`fields` as a `root`. Raises ConfigError with the problems of its form and those in `limits` together."""
    try:
        valid = root.model_validate(fields)
    except ValidationError as error:
        form = [_problem(detail, root) for detail in error.errors(include_url=False)[:MOST_PROBLEMS]]
        raise ConfigError([*form, *limits]) from None
    if limits:
        raise ConfigError(limits)
    return valid


def beyond(fields: object, exported: Exported, instance: int | None = None) -> list[Problem]:
    """What is well-formed in a request, but not for this model; the rest is left to the form."""
    if not isinstance(fields, dict):
        return []
    limits, problems = exported.limits, []
    at = "" if instance is None else f"instances.{instance}."
    for name, most in (
        ("count", limits.max_images),
        ("num_steps", limits.max_steps),
        ("particles", limits.max_particles),
        ("guidance_scale", limits.max_guidance_scale),
    ):
        value = fields.get(name)
        if isinstance(value, (int, float)) and value > most:
            told = shortened(value)
            problems.append(Problem(f"{at}{name}", told, "is above this model's limit", f"Use at most {most:g}."))
    prompt, most = fields.get("prompt"), limits.max_prompt_characters
    if isinstance(prompt, str) and prompt and (told := text_problem(prompt, most)):
        remedy = f"Use at most {most}." if len(prompt) > most else _PROMPT
        problems.append(Problem(f"{at}prompt", shortened(prompt), told, remedy))
    method, particles = fields.get("method"), fields.get("particles")
    if method == PLAIN and isinstance(particles, (int, float)) and particles > 1:
        told, remedy = 'does nothing with method "none"', "Choose a method that steers, or leave it out."
        problems.append(Problem(f"{at}particles", shortened(particles), told, remedy))
    for name, known, told in (
        ("method", [*exported.methods, PLAIN], "this model has no such steering method"),
        ("policy", exported.policies, "this model has no such policy"),
        ("size", [exported.size_name], "this model draws no such size"),
    ):
        value = fields.get(name)
        if isinstance(value, str) and value not in known:
            problems.append(Problem(f"{at}{name}", shortened(value), told, suggestion(shortened(value), known)))
    weights = fields.get("steering")
    if isinstance(weights, dict):
        problems += _weight_problems(weights, method == PLAIN, [reward.name for reward in exported.rewards], at)
    return problems


def _weight_problems(weights: Mapping[str, Any], unsteered: bool, known: Sequence[str], at: str) -> list[Problem]:
    problems = []
    for name, weight in weights.items():
        path, number = f"{at}steering.{shortened(name)}", isinstance(weight, (int, float))
        if name not in known:
            remedy = suggestion(shortened(name), known)
            problems.append(Problem(path, shortened(weight), "the critic has no head for this reward", remedy))
        elif number and abs(weight) > MAX_WEIGHT:
            remedy = f"Use a number of standard deviations from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}."
            problems.append(Problem(path, weight, "is too strong", remedy))
        elif number and weight and unsteered:
            remedy = "Choose a method that steers, or leave the weights out."
            problems.append(Problem(path, weight, 'does nothing with method "none"', remedy))
    return problems


def _problem(detail: Mapping[str, Any], root: type[Section]) -> Problem:
    """One of pydantic's findings about a `root`, in our words."""
    path = ".".join(shortened(str(part)) for part in detail["loc"]) or "body"
    section, field = _place(root, detail["loc"])
    remedy = str(field.description) if field is not None and field.description else _OBJECT
    if detail["type"] == "extra_forbidden":
        known, name = [each.alias or name for name, each in section.model_fields.items()], shortened(detail["loc"][-1])
        ours = next((other for other in _ELSEWHERE.get(name, ()) if other in known), None)
        remedy = f'Use "{ours}". Known: {", ".join(known)}.' if ours else suggestion(name, known)
        if "parameters" in detail["loc"] and name in Request.model_fields:
            remedy = "Send it as an input of its own."
        return Problem(path, shortened(detail["input"]), "unknown field", remedy)
    if detail["type"] == "missing":
        return Problem(path, None, "is required", remedy)
    message = "is no JSON object" if detail["type"] == "model_type" else detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(path, shortened(detail["input"]), message, remedy)


def _place(root: type[Section], location: Sequence[str | int]) -> tuple[type[BaseModel], FieldInfo | None]:
    """The innermost section that holds `location`, and the innermost field that has a description on the way."""
    section: type[BaseModel] = root
    found: FieldInfo | None = None
    inner: list[type[BaseModel]] = []
    for part in location:
        if isinstance(part, int):
            continue
        section = inner[0] if inner else section
        field = next((each for name, each in section.model_fields.items() if part == (each.alias or name)), None)
        found = field if field is not None and field.description else found
        inner = list(_sections(field.annotation)) if field is not None else []
    return section, found


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def shortened(value: Any) -> Any:
    """`value` as it is told in a message: at most 80 characters, so that an error is never larger than its cause."""
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:80]}..." if len(text) > 80 else value

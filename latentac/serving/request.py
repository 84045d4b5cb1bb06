"""What a caller may ask for. Everything wrong with a request is told at once, each with its path and remedy."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import from_json

from latentac.config import Number, Section, suggestion
from latentac.errors import ConfigError, Problem
from latentac.serving.exported import Exported

Root = TypeVar("Root", bound=Section)

# The rows of `steering.STEERING`, told here too because that package imports torch and a client does without.
METHODS = ("value_gradient", "best_of_n", "resampling", "twisted", "svdd", "none")
MAX_WEIGHT = 100.0
"""A weight is a number of standard deviations; far above this the latents leave everything the decoder has seen."""


class Request(Section):
    """One prompt's pictures. The descriptions are the remedies that a caller reads."""

    prompt: Annotated[str, Field(min_length=1, description="Write what the picture shall show.")]
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Use a whole number from 0 to 2^63 - 1.")] = 0
    count: Annotated[int, Field(ge=1, description="Use a whole number of pictures, at least 1.")] = 1
    num_steps: Annotated[int | None, Field(ge=2, description="Use at least 2 steps, or leave it out.")] = None
    method: Annotated[str, Field(description=f"Use one of {', '.join(METHODS)}.")] = METHODS[0]
    steering: Annotated[
        dict[str, Number] | None, Field(description="Give a finite number for each reward's name, or leave it out.")
    ] = None
    candidates: Annotated[int, Field(ge=1, description="Use a whole number, at least 1.")] = 4


class Body(Section):
    """KServe's V1 protocol: a list of requests, answered in order."""

    instances: Annotated[list[Request], Field(min_length=1, description='Send {"instances": [{"prompt": "..."}]}.')]


_FIELDS = {**Body.model_fields, **Request.model_fields}


def parse(body: object, exported: Exported) -> list[Request]:
    """The requests of a V1 body: decoded JSON, or its bytes. Raises ConfigError with every problem."""
    if isinstance(body, bytes):
        try:
            body = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ConfigError([Problem("body", shortened(body), f"is not JSON: {error}", _remedy([]))]) from None
    given = body.get("instances") if isinstance(body, dict) else None
    limits = []
    for index, fields in enumerate(given if isinstance(given, list) else []):
        limits += _beyond(fields, exported, f"instances.{index}.")
    requests = _validated(Body, body, limits).instances
    total, most = sum(request.count for request in requests), exported.limits.max_images
    if total > most:
        told = f"is the number of pictures asked for, above the limit of {most}"
        raise ConfigError([Problem("instances", total, told, "Send several requests.")])
    return requests


def checked(exported: Exported, **fields: Any) -> Request:
    """One request from its fields. Raises ConfigError with every problem."""
    return _validated(Request, fields, _beyond(fields, exported, ""))


def _validated(root: type[Root], fields: object, limits: Sequence[Problem]) -> Root:
    """`fields` as a `root`. Raises ConfigError with the problems of its form and those in `limits` together."""
    try:
        valid = root.model_validate(fields)
    except ValidationError as error:
        form = [_problem(detail, root) for detail in error.errors(include_url=False)]
        raise ConfigError([*form, *limits]) from None
    if limits:
        raise ConfigError(limits)
    return valid


def _beyond(fields: object, exported: Exported, at: str) -> list[Problem]:
    """What is well-formed in a request, but not for this model; the rest is left to the form. `at`: prefix of paths."""
    if not isinstance(fields, dict):
        return []
    limits, problems = exported.limits, []
    for name, most in (
        ("count", limits.max_images),
        ("num_steps", limits.max_steps),
        ("candidates", limits.max_candidates),
    ):
        value = fields.get(name)
        if isinstance(value, int) and value > most:
            problems.append(Problem(f"{at}{name}", value, "is above this model's limit", f"Use at most {most}."))
    prompt, most = fields.get("prompt"), limits.max_prompt_characters
    if isinstance(prompt, str) and len(prompt) > most:
        told = f"has {len(prompt)} characters"
        problems.append(Problem(f"{at}prompt", shortened(prompt), told, f"Use at most {most}."))
    method = fields.get("method")
    if isinstance(method, str) and method not in METHODS:
        remedy = suggestion(shortened(method), METHODS)
        problems.append(Problem(f"{at}method", shortened(method), "no such steering method", remedy))
    weights = fields.get("steering")
    if isinstance(weights, dict):
        problems += _weight_problems(weights, method == "none", [reward.name for reward in exported.rewards], at)
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
    location = [shortened(str(part)) for part in detail["loc"]]
    path = ".".join(location) or "body"
    if detail["type"] == "extra_forbidden":
        fields = root.model_fields if len(location) == 1 else Request.model_fields
        return Problem(path, shortened(detail["input"]), "unknown field", suggestion(location[-1], list(fields)))
    if detail["type"] == "missing":
        return Problem(path, None, "is required", _remedy(location))
    message = "is no JSON object" if detail["type"] == "model_type" else detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(path, shortened(detail["input"]), message, _remedy(location))


def _remedy(location: Sequence[str]) -> str:
    """The description of the innermost field in `location`."""
    named = [_FIELDS[part] for part in location if part in _FIELDS]
    return str((named[-1] if named else _FIELDS["instances"]).description)


def shortened(value: Any) -> Any:
    """`value` as it is told in a message: at most 80 characters, so that an error is never larger than its cause."""
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:80]}..." if len(text) > 80 else value

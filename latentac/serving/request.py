"""What a caller may ask for. Everything wrong with a request is reported at once, each with its path and remedy."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, from_json

from latentac.config.schema import Limits, suggestion
from latentac.config.sections import Number, Section
from latentac.system.errors import ConfigError, Problem
from latentac.system.names import PLAIN


def _whole(value: object) -> object:
    """JSON has one kind of number: 2.0 is a whole one. From 2^53 on a double stands for several: it is left as it is,
    for the form to refuse, because the caller may mean another than the one that would be drawn."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


WHOLE = BeforeValidator(_whole)

Root = TypeVar("Root", bound=Section)
Json = dict[str, Any]

PROMPT_REMEDY = "Write what the image shall show."
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
"""Problems reported for one request; a longer list helps nobody."""
_NO_OBJECT = ("model_type", "model_attributes_type")
REFUSED = "refused"
"""Type of an error of ours in pydantic's list; its context has the words: see `refused`."""
UNUSED = f'does nothing with method "{PLAIN}"'
_UNSTEERED: Json = {
    "if": {"properties": {"method": {"const": PLAIN}}, "required": ["method"]},
    "then": {
        "properties": {
            "steering": {"type": ["object", "null"], "additionalProperties": {"const": 0}},
            "particles": {"type": ["integer", "null"], "maximum": 1},
        }
    },
}
"""As JSON schema: weights and particles that would do nothing are refused."""


class Optionals(Section):
    """A section in which null is the same as a field that is left out: what many clients send for what is not set."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in schema["properties"].items():
            if name in schema.get("required", ()) or "anyOf" in field or field.get("type") == "null":
                continue
            about = {key: field[key] for key in ("default", "description", "title") if key in field}
            form = {key: value for key, value in field.items() if key not in about}
            schema["properties"][name] = {"anyOf": [form, {"type": "null"}], **about}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        known = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in fields.items() if value is not None or name not in known}


class Request(Optionals):
    """One prompt's images. The descriptions are the remedies that a caller reads."""

    # Of any model: `forms.request_model` adds the limits of one.

    model_config = ConfigDict(json_schema_extra=_UNSTEERED)

    prompt: Annotated[str, Field(min_length=1, description=PROMPT_REMEDY)]
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Use a whole number from 0 to 2^63 - 1."), WHOLE] = 0
    count: Annotated[int, Field(ge=1, description="Use a whole number of images, at least 1."), WHOLE] = 1
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

    @field_validator("particles")
    @classmethod
    def _are_used(cls, particles: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("method") == PLAIN and (particles or 0) > 1:
            raise refused(UNUSED, "Choose a method that steers, or leave it out.")
        return particles


class Body(Section):
    """KServe's V1 protocol: a list of requests, answered in order."""

    instances: Annotated[list[Request], Field(min_length=1, description='Send {"instances": [{"prompt": "..."}]}.')]


def most_values(limits: Limits) -> int:
    """Of the JSON of a request: far more than its fields need. Reporting a value takes time, and other
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
        problem = "is beyond the numbers that a computer holds"
        raise ConfigError([Problem(path or "body", "1e309 or more", problem, "Use a smaller number.")])
    return found


def _values(found: Any, most: int) -> int:
    """How many values there are in decoded JSON; counted up to `most`."""
    count, pending = 1, [found]
    while pending and count <= most:
        value = pending.pop()
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(inner)
        pending += inner
    return count


def _infinite(value: Any, path: str = "") -> str | None:
    """The path of a number like 1e400, which JSON can write and no answer can repeat; None where there is none."""
    if isinstance(value, float):
        return path if math.isinf(value) else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_infinite(inner, f"{path}.{shortened(str(name))}".lstrip(".")) for name, inner in items)
    return next((each for each in found if each is not None), None)


def at_most(most: int, images: int) -> None:
    """Raises ConfigError for more than `most` images in one request."""
    if problem := too_many(most, images):
        raise ConfigError([problem])


def too_many(most: int, images: int) -> Problem | None:
    """What is wrong with a request for more than `most` images."""
    problem = f"is the number of images asked for, above the limit of {most}"
    return Problem("instances", images, problem, "Send several requests.") if images > most else None


def refused(problem: str, remedy: str, **value: Any) -> PydanticCustomError:
    """For a validator to raise: what is wrong, what to do, and the value to show where that is not the field's own."""
    return PydanticCustomError(REFUSED, "{problem}", {"problem": problem, "remedy": remedy, **value})


def validated(root: type[Root], fields: object) -> Root:
    """`fields` as a `root`. Raises ConfigError with every problem."""
    try:
        return root.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(problems_of(error.errors(include_url=False), root)) from None


def problems_of(details: Sequence[Mapping[str, Any]], root: type[Section]) -> list[Problem]:
    """The first of pydantic's findings about a `root`, in our words."""
    return [_problem(detail, root) for detail in details[:MOST_PROBLEMS]]


def _problem(detail: Mapping[str, Any], root: type[Section]) -> Problem:
    path = ".".join(shortened(str(part)) for part in detail["loc"]) or "body"
    if detail["type"] == REFUSED:
        context = detail["ctx"]
        return Problem(path, shortened(context.get("value", detail["input"])), context["problem"], context["remedy"])
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
    message = "is no JSON object" if detail["type"] in _NO_OBJECT else detail["msg"][0].lower() + detail["msg"][1:]
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
    """`value` as a message shows it: at most 80 characters, so that an error is never larger than its cause."""
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    text = value if isinstance(value, str) else repr(value)
    return f"{text[:80]}..." if len(text) > 80 else value

"""The request of each protocol as a pydantic model with the limits of one exported model. That model validates, and the
OpenAPI document, the options and the page show its schema, so a limit is written nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    create_model,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from latentac.config.schema import suggestion
from latentac.config.sections import Number
from latentac.serving.exported import Exported
from latentac.serving.openai import ImagesRequest
from latentac.serving.request import (
    PROMPT_REMEDY,
    UNUSED,
    Body,
    Json,
    Request,
    refused,
    shortened,
    too_many,
)
from latentac.system.names import PLAIN
from latentac.worlds.prompttext import PATTERN, text_problem

MAX_WEIGHT = 100.0
"""A weight is a number of standard deviations; far above this the latents leave everything the decoder has seen."""

AnyRequest = TypeVar("AnyRequest", bound=Request)


@dataclass(frozen=True)
class Forms:
    """The pydantic models for one exported model: request, of a single request; body, of KServe's V1 protocol, into
    which V2 requests are converted; images, of OpenAI's `images/generations`."""

    request: type[Request]
    body: type[Body]
    images: type[ImagesRequest]


def forms_of(exported: Exported) -> Forms:
    """All forms, with the limits of `exported`."""
    request = request_model(exported, Request)
    return Forms(request, _body_model(request, exported.limits.max_images), request_model(exported, ImagesRequest))


def request_model(exported: Exported, base: type[AnyRequest]) -> type[AnyRequest]:
    """`base` with the limits of an exported model."""
    limits = exported.limits
    narrower: Mapping[str, Any] = {
        "prompt": _text(limits.max_prompt_characters),
        "count": _at_most(limits.max_images),
        "num_steps": _at_most(limits.max_steps),
        "size": _one_of([exported.size_name], "this model draws no such size"),
        "guidance_scale": _at_most(limits.max_guidance_scale),
        "policy": _one_of(exported.policies, "this model has no such policy"),
        "method": _one_of([*exported.methods, PLAIN], "this model has no such steering method"),
        "steering": _Heads([reward.name for reward in exported.rewards]),
        "particles": _at_most(limits.max_particles),
    }
    fields: dict[str, Any] = {}
    for name, limit in narrower.items():
        field = base.model_fields[name]
        kind = dict[str, Annotated[Number, _WEIGHT]] | None if name == "steering" else field.annotation
        default = exported.guidance_scale if name == "guidance_scale" else field.default
        fields[name] = Annotated[kind, field, limit], ... if field.is_required() else default
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, **fields)


def _body_model(request: type[Request], most: int) -> type[Body]:
    """A body of at most `most` images over all its requests."""

    def rows(
        given: Any,
    ) -> Any:  # before the requests themselves: many wrong ones would give a long report
        return _few(given, len(given)) if isinstance(given, list) else given

    def in_all(given: list[Request]) -> list[Request]:
        return _few(given, sum(one.count for one in given))

    def _few(given: Any, images: int) -> Any:
        if problem := too_many(most, images):
            raise refused(problem.problem, problem.remedy, value=images)
        return given

    requests: Any = list[request]  # type: ignore[valid-type]
    extra = Field(json_schema_extra={"maxItems": most})
    field = Body.model_fields["instances"]
    listed = Annotated[requests, field, BeforeValidator(rows), AfterValidator(in_all), extra]
    return create_model(Body.__name__, __base__=Body, __doc__=Body.__doc__, instances=(listed, ...))


@dataclass(frozen=True, eq=False)
class _Limit:
    """What is allowed of a field that has the right type. wrong: says what is wrong with a value and what to do, or
    None; schema: the same as JSON schema."""

    wrong: Callable[[Any], tuple[str, str] | None]
    schema: Json

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        schema = handler(core)
        schema.get("anyOf", [schema])[0].update(self.schema)  # the first of its kinds, where it may be null as well
        return schema

    def _checked(self, value: Any) -> Any:
        if value is not None and (problem := self.wrong(value)):
            raise refused(*problem)
        return value


def _at_most(most: float) -> _Limit:
    problem = "is above this model's limit", f"Use at most {most:g}."
    return _Limit(lambda value: problem if value > most else None, {"maximum": most})


def _one_of(known: Sequence[str], problem: str) -> _Limit:
    def wrong(value: str) -> tuple[str, str] | None:
        return None if value in known else (problem, suggestion(shortened(value), known))

    return _Limit(wrong, {"enum": list(known)})


def _text(most: int) -> _Limit:
    def wrong(prompt: str) -> tuple[str, str] | None:
        problem = text_problem(prompt, most)
        return (problem, f"Use at most {most}." if len(prompt) > most else PROMPT_REMEDY) if problem else None

    return _Limit(wrong, {"maxLength": most, "pattern": PATTERN})


_STRONG = "is too strong", f"Use a number of standard deviations from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}."
_WEIGHT = _Limit(
    lambda weight: _STRONG if abs(weight) > MAX_WEIGHT else None, {"minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT}
)


@dataclass(frozen=True, eq=False)
class _Heads:
    """Weights of known rewards alone, and none that does nothing."""

    names: Sequence[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_wrap_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        schema = handler(core)
        weights = schema["anyOf"][0]
        weights |= {"properties": dict.fromkeys(self.names, weights["additionalProperties"])}
        weights["additionalProperties"] = False
        return schema

    def _checked(self, weights: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Of each weight one problem: an unknown reward, else a wrong number, else one that does nothing."""
        found: dict[tuple[int | str, ...], InitErrorDetails] = {}

        def add(error: PydanticCustomError, value: Any, *place: int | str) -> None:
            found.setdefault(place, {"type": error, "loc": place, "input": value})

        given, valid = weights if isinstance(weights, dict) else {}, None
        for name in [each for each in given if each not in self.names]:
            remedy = suggestion(shortened(str(name)), self.names)
            add(refused("the critic has no head for this reward", remedy), given[name], name)
        try:
            valid = handler(weights)
        except ValidationError as error:
            for each in error.errors(include_url=False):
                add(PydanticCustomError(each["type"], each["msg"], each.get("ctx")), each["input"], *each["loc"])
        for name in given if info.data.get("method") == PLAIN else ():
            if isinstance(given[name], (int, float)) and given[name]:
                add(refused(UNUSED, "Choose a method that steers, or leave the weights out."), given[name], name)
        if found:
            raise ValidationError.from_exception_data("steering", list(found.values()))
        return valid

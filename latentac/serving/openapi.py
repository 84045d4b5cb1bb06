"""The OpenAPI document: the routes, schemas and errors that this server has, with this model's own limits in them."""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from kserve.protocol.rest.v2_datamodels import InferenceResponse
from pydantic import BaseModel

import latentac
from latentac.config.sections import Section
from latentac.serving.exported import Exported
from latentac.serving.openai import ImagesRequest
from latentac.serving.request import MAX_WEIGHT, Body, Request
from latentac.serving.tensors import BINARY_HEADER, DATATYPES, INPUTS, OUTPUTS, InferenceRequest
from latentac.system.names import PLAIN
from latentac.worlds.prompttext import PATTERN

_REF = "#/components/schemas/{model}"

Json = dict[str, Any]


class Told(Section):
    """One thing that is wrong with a request."""

    field: str
    value: Any
    problem: str
    remedy: str


class Refusal(Section):
    """Why there is no picture: in words, and each problem by its field."""

    error: str
    problems: list[Told]


class OpenAIError(Section):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIRefusal(Section):
    """As `Refusal`, in the form that OpenAI's clients read."""

    error: OpenAIError
    problems: list[Told]


class KServeError(Section):
    """KServe's own."""

    error: str


class Metadata(Section):
    """How pictures were made. values: reward name -> a list a picture -> the critic's value at each step, in the
    reward's own unit; nfe: function evaluations a picture, a backward counted as 2; steering: the weights used; tokens:
    of the prompt; truncated: whether they are more than the model reads."""

    seed: int
    num_steps: int
    guidance_scale: float
    policy: str
    method: str
    particles: int
    steering: dict[str, float]
    nfe: int
    tokens: int
    truncated: bool
    values: dict[str, list[list[float]]]
    version: str


class Prediction(Metadata):
    """images: PNG, base64."""

    images: list[str]


class Predictions(Section):
    """One an instance, in order."""

    predictions: list[Prediction]


class ImageData(Section):
    b64_json: str


class Images(Section):
    """OpenAI's form of an answer; latentac: the rest, with the seed that gives these pictures again."""

    created: int
    background: str
    output_format: str
    size: str
    data: list[ImageData]
    latentac: Metadata


_OWN: dict[str, tuple[type[BaseModel], type[BaseModel] | str, type[BaseModel]]] = {
    "/v1/models/{model_name}:predict": (Body, Predictions, Refusal),
    "/v2/models/{model_name}/infer": (InferenceRequest, InferenceResponse, Refusal),
    "/v2/models/{model_name}/versions/{model_version}/infer": (InferenceRequest, InferenceResponse, Refusal),
    "/v1/images/generations": (ImagesRequest, Images, OpenAIRefusal),
    "/v1/images/stream": (Request, "text/event-stream", Refusal),
}
"""Path of a POST -> its body, its answer (a schema or a media type), its refusal."""

_REFUSALS = {
    "400": "The body is no JSON, or is damaged, or a header is given twice",
    "401": "The token is missing, or is another one",
    "403": "The server has no such name, or may not be used by this website",
    "404": "No such model, or no such version",
    "408": "The body did not arrive",
    "413": "The body is too long",
    "415": "The body has a form or a compression that is not read here",
    "422": "A field is wrong, or above this model's limits",
    "429": "The queue is full; Retry-After says for how long",
    "431": "The headers are too long",
    "500": "The server failed",
    "503": "Not drawn within the time that a request may take",
}
_NOT_READY: dict[str, type[BaseModel]] = {"503": KServeError}
_KSERVE: dict[str, dict[str, type[BaseModel]]] = {
    "/v1/models": {},
    "/v1/models/{model_name}": {"404": OpenAIRefusal, **_NOT_READY},
    "/v2": {},
    "/v2/health/live": {},
    "/v2/health/ready": _NOT_READY,
    "/v2/models": {},
    "/v2/models/{model_name}": {"404": Refusal},
    "/v2/models/{model_name}/versions/{model_version}": {"404": Refusal},
    "/v2/models/{model_name}/versions/{model_version}/ready": {"404": Refusal, **_NOT_READY},
    "/v2/models/{model_name}/ready": {"404": Refusal, **_NOT_READY},
    "/metrics": {},
}
"""Path of a GET of KServe's -> its errors."""


_EVENT: Json = {
    "type": "object",
    "description": "Each event. data is JSON: of `step` the step and each reward's value, of `picture` a prediction",
    "properties": {
        "event": {"enum": ["queued", "step", "picture", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}


_LENGTH: Json = {
    "name": BINARY_HEADER,
    "in": "header",
    "required": False,
    "description": "Bytes of the JSON, where tensors follow it as bytes, as in KServe's extension binary_tensor_data",
    "schema": {"type": "integer", "minimum": 0},
}
_BYTES: Json = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
"""JSON, and behind it the outputs for which binary data were asked for."""
_COMPRESSED = "The body may be compressed: Content-Encoding gzip or deflate"

_UNSTEERED: Json = {
    "if": {"properties": {"method": {"const": "none"}}, "required": ["method"]},
    "then": {
        "properties": {
            "steering": {"type": ["object", "null"], "additionalProperties": {"const": 0}},
            "particles": {"type": ["integer", "null"], "maximum": 1},
        }
    },
}
"""Weights and particles that would do nothing are refused."""


def document(app: FastAPI, exported: Exported, name: str) -> Json:
    """The whole document, for the routes that `app` has."""
    found = get_openapi(
        title="latentac", version=latentac.__version__, routes=app.routes, summary="Pictures, steered by a critic"
    )
    schemas: Json = {}
    for path, (asked, answered, refused) in _OWN.items():
        operation = found["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(asked)}}}
        operation["description"] = _COMPRESSED
        given = {"text/event-stream": {"schema": _EVENT}}
        operation["responses"] = {
            "200": _response("The pictures", _ref(answered))
            if not isinstance(answered, str)
            else {"description": "Events: queued, step, picture, error", "content": given},
            **_errors(_REFUSALS, refused),
        }
        for model in (asked, refused, *([] if isinstance(answered, str) else [answered])):
            schemas |= _schemas(model)
    for path, errors in _KSERVE.items():
        responses = found["paths"][path]["get"]["responses"]
        responses.pop("422", None)
        for code, answer in errors.items():
            responses |= _errors({code: {"404": _REFUSALS["404"], "503": "Not ready"}[code]}, answer)
    found["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {
        kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")
    }
    options = _response("Methods, rewards, defaults and limits", {"type": "object"})
    found["paths"]["/v1/images/options"]["get"]["responses"] = {"200": options}
    values = {"model_name": name, "model_version": exported.version}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                parameter["schema"] = {"type": "string", "examples": [values[parameter["name"]]]}
        if path.endswith("/infer"):
            operations["post"]["parameters"].append(_LENGTH)
            operations["post"]["responses"]["200"]["content"] |= _BYTES
    found.setdefault("components", {}).setdefault("schemas", {}).update(schemas | _schemas(KServeError))
    found["components"]["schemas"].pop("HTTPValidationError", None)
    found["components"]["schemas"].pop("ValidationError", None)
    _name_tensors(found["components"]["schemas"])
    for form in ("Request", "ImagesRequest"):
        schema = found["components"]["schemas"][form]
        _limit(schema["properties"], exported)
        _allow_null(schema)
        schema |= _UNSTEERED
    found["components"]["schemas"]["Body"]["properties"]["instances"]["maxItems"] = exported.limits.max_images
    return found


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=model.__name__)}


def _response(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(codes: dict[str, str], model: type[BaseModel]) -> Json:
    return {code: _response(told, _ref(model)) for code, told in codes.items()}


def _schemas(model: type[BaseModel]) -> Json:
    """The model's schema and those that it names, each under its name."""
    mode: Any = "validation" if model in _bodies() else "serialization"
    schema = model.model_json_schema(ref_template=_REF, mode=mode)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _bodies() -> Iterable[type[BaseModel]]:
    return [asked for asked, _, _ in _OWN.values()]


def _name_tensors(schemas: Json) -> None:
    """What KServe's general form of a V2 request is filled with here."""
    inputs, outputs = schemas["RequestInput"]["properties"], schemas["RequestOutput"]["properties"]
    inputs["name"]["enum"], outputs["name"]["enum"] = list(INPUTS), list(OUTPUTS)
    inputs["datatype"]["enum"] = DATATYPES
    inputs["shape"] |= {"maxItems": 2, "items": {"type": "integer", "minimum": 1}}
    inputs["shape"]["description"] = "[number of elements]: that of the prompts, or 1 for all of them"
    prompt = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["two red squares"]}
    schemas["InferenceRequest"]["example"] = {"inputs": [prompt], "outputs": [{"name": "image"}]}


def _limit(properties: Json, exported: Exported) -> None:
    """What this model allows, in the schema of a request's fields."""
    limits = exported.limits
    _narrow(properties["prompt"], maxLength=limits.max_prompt_characters, pattern=PATTERN)
    _narrow(properties["n" if "n" in properties else "count"], maximum=limits.max_images)
    _narrow(properties["num_steps"], maximum=limits.max_steps)
    _narrow(properties["particles"], maximum=limits.max_particles)
    _narrow(properties["guidance_scale"], maximum=limits.max_guidance_scale)
    _narrow(properties["size"], enum=[exported.size_name, *(["auto"] if "n" in properties else [])])
    _narrow(properties["policy"], enum=list(exported.policies))
    _narrow(properties["method"], enum=[*exported.methods, PLAIN])
    weight = {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT}
    heads = {reward.name: weight for reward in exported.rewards}
    properties["steering"]["anyOf"][0] = {"type": "object", "properties": heads, "additionalProperties": False}


def _allow_null(schema: Json) -> None:
    """What may be left out may be null."""
    properties = schema["properties"]
    for name in properties.keys() - set(schema["required"]):
        if "anyOf" in properties[name] or properties[name].get("type") == "null":
            continue
        about = {key: value for key, value in properties[name].items() if key in ("default", "description", "title")}
        form = {key: value for key, value in properties[name].items() if key not in about}
        properties[name] = {"anyOf": [form, {"type": "null"}], **about}


def _narrow(schema: Json, **bounds: Any) -> None:
    """Add `bounds` to a field's schema; to the first of its kinds where it may be null as well."""
    schema.get("anyOf", [schema])[0].update(bounds)

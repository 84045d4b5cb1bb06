"""The OpenAPI document: the routes, schemas and errors that this server has, with this model's own limits in them."""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from kserve.protocol.rest.v2_datamodels import InferenceResponse
from pydantic import BaseModel

import latentac
from latentac.config.sections import Section
from latentac.serving.request import Json
from latentac.serving.tensors import BINARY_HEADER

_REF = "#/components/schemas/{model}"


class ProblemBody(Section):
    """One thing that is wrong with a request."""

    field: str
    value: Any
    problem: str
    remedy: str


class Refusal(Section):
    """Why there is no image: in words, and each problem by its field."""

    error: str
    problems: list[ProblemBody]


class OpenAIError(Section):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIRefusal(Section):
    """As `Refusal`, in the form that OpenAI's clients read."""

    error: OpenAIError
    problems: list[ProblemBody]


class KServeError(Section):
    """KServe's own."""

    error: str


class Metadata(Section):
    """How images were made. values: reward name -> a list per image -> the critic's value at each step, in the
    reward's own unit; nfe: function evaluations per image, a backward counted as 2; steering: the weights used; tokens:
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
    """OpenAI's form of an answer; latentac: the rest, with the seed that gives these images again."""

    created: int
    background: str
    output_format: str
    size: str
    data: list[ImageData]
    latentac: Metadata


_INFER = InferenceResponse, Refusal
_OWN: dict[str, tuple[type[BaseModel] | str, type[BaseModel]]] = {
    "/v1/models/{model_name}:predict": (Predictions, Refusal),
    "/v2/models/{model_name}/infer": _INFER,
    "/v2/models/{model_name}/versions/{model_version}/infer": _INFER,
    "/v1/images/generations": (Images, OpenAIRefusal),
    "/v1/images/stream": ("text/event-stream", Refusal),
}
"""Path of a POST -> its answer (a schema or a media type), its error answer. FastAPI documents its body."""

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
    "503": "Not generated within the time that a request may take",
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
    "description": "Each event. data is JSON: of `step` the step and each reward's value, of `image` a prediction",
    "properties": {
        "event": {"enum": ["queued", "step", "image", "error"]},
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


def document(app: FastAPI, name: str, version: str) -> Json:
    """The whole document, for the routes that `app` has. name, version: of the model that is served."""
    found = get_openapi(
        title="latentac", version=latentac.__version__, routes=app.routes, summary="Images, steered by a critic"
    )
    schemas: Json = {}
    # FastAPI's own copy of these schemas drops defaults of null and turns whole numbers into floats.
    for form in (route.body_field for route in app.routes if isinstance(route, APIRoute)):
        schemas |= _schemas(form.field_info.annotation, "validation") if form else {}
    for path, (answered, refused) in _OWN.items():
        operation = found["paths"][path]["post"]
        operation["description"] = _COMPRESSED
        given = {"text/event-stream": {"schema": _EVENT}}
        operation["responses"] = {
            "200": _response("The images", _ref(answered))
            if not isinstance(answered, str)
            else {"description": "Events: queued, step, image, error", "content": given},
            **_errors(_REFUSALS, refused),
        }
        schemas |= _schemas(refused)
        schemas |= {} if isinstance(answered, str) else _schemas(answered)
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
    values = {"model_name": name, "model_version": version}
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
    return found


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=model.__name__)}


def _response(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _errors(codes: dict[str, str], model: type[BaseModel]) -> Json:
    return {code: _response(meaning, _ref(model)) for code, meaning in codes.items()}


def _schemas(model: Any, mode: Literal["validation", "serialization"] = "serialization") -> Json:
    """The model's schema and those that it names, each under its name."""
    schema = model.model_json_schema(ref_template=_REF, mode=mode)
    return {**schema.pop("$defs", {}), model.__name__: schema}

"""KServe's V2 protocol: a request's fields as named tensors, its pictures as BYTES."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.protocol.rest.v2_datamodels import InferenceRequest
from pydantic import ValidationError

from latentac.config import suggestion
from latentac.errors import ConfigError, Problem
from latentac.serving.request import decoded, shortened

INPUTS = {
    "prompt": "BYTES",
    "seed": "INT64",
    "count": "INT64",
    "num_steps": "INT64",
    "size": "BYTES",
    "guidance_scale": "FP32",
    "policy": "BYTES",
    "method": "BYTES",
    "steering": "BYTES",
    "particles": "INT64",
}
"""Name of an input -> its datatype. `steering` is the text of a JSON object."""

OUTPUTS = {"image": "BYTES", "metadata": "BYTES"}
"""image: a PNG in base64 a picture, those of a prompt one after another; metadata: JSON a prompt."""

_ALIKE = {"FP32": ("FP32", "FP64"), "INT64": ("INT64", "INT32", "UINT64", "UINT32")}


def described(tensors: Mapping[str, str]) -> list[dict[str, Any]]:
    """As KServe's metadata lists them; -1 is any number."""
    return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in tensors.items()]


def infer_request(body: object, name: str) -> InferRequest:
    """KServe's own record of decoded JSON. Raises ConfigError with every problem."""
    try:
        request = InferenceRequest.model_validate(body)
    except ValidationError as error:
        found = []
        for detail in error.errors(include_url=False)[:20]:
            path = ".".join(shortened(str(part)) for part in detail["loc"]) or "body"
            told = detail["msg"][0].lower() + detail["msg"][1:]
            found.append(Problem(path, shortened(detail["input"]), told, "Send KServe's V2 form of a request."))
        raise ConfigError(found) from None
    problems = [
        Problem(f"outputs.{i}.name", shortened(one.name), "no such output", suggestion(shortened(one.name), [*OUTPUTS]))
        for i, one in enumerate(request.outputs or [])
        if one.name not in OUTPUTS
    ]
    if problems:
        raise ConfigError(problems[:20])
    inputs = [InferInput(one.name, one.shape, one.datatype, one.data) for one in request.inputs]
    wanted = [InferOutput(one.name, [], OUTPUTS[one.name]) for one in request.outputs or []]
    return InferRequest(name, inputs, request.id or "", request_outputs=wanted or None)


def instances(request: InferRequest) -> dict[str, Any]:
    """The V1 form of a V2 request. An input of one element holds for every prompt. Raises ConfigError."""
    problems = [problem for place, one in enumerate(request.inputs) if (problem := _misfit(place, one))]
    names = [one.name for one in request.inputs]
    if len(set(names)) < len(names):
        problems.append(Problem("inputs", shortened(names), "an input is given twice", "Give each once."))
    if "prompt" not in names:
        problems.append(Problem("inputs", shortened(names), "has no input `prompt`", "Send one, of BYTES."))
    if problems:
        raise ConfigError(problems[:20])
    columns = {one.name: one.data for one in request.inputs}
    rows = len(columns["prompt"])
    for name, data in columns.items():
        if len(data) not in (1, rows):
            told = f"is the number of elements, beside {rows} prompts"
            problems.append(Problem(f"inputs.{name}", len(data), told, f"Use 1 or {rows}."))
    if problems:
        raise ConfigError(problems)
    return {
        "instances": [
            {name: _value(name, data[row if len(data) > 1 else 0]) for name, data in columns.items()}
            for row in range(rows)
        ]
    }


def _misfit(place: int, one: InferInput) -> Problem | None:
    at, datatype = f"inputs.{place}", INPUTS.get(one.name)
    if datatype is None:
        return Problem(f"{at}.name", shortened(one.name), "no such input", suggestion(shortened(one.name), [*INPUTS]))
    if one.datatype not in _ALIKE.get(datatype, (datatype,)):
        return Problem(f"{at}.datatype", shortened(one.datatype), f"is not that of {one.name}", f"Use {datatype}.")
    if min(one.shape, default=0) < 1 or math.prod(one.shape[:8]) != len(one.data) or len(one.shape) > 2:
        told = f"does not fit {len(one.data)} elements"
        return Problem(f"{at}.shape", shortened(one.shape), told, "Use [number of elements].")
    return None


def _value(name: str, value: object) -> object:
    """What is no JSON object's text is left as it is, for the form to refuse."""
    if name != "steering" or not isinstance(value, str):
        return value
    try:
        return decoded(value.encode(errors="replace"))
    except ConfigError:
        return value


def infer_response(request: InferRequest, name: str, predictions: Sequence[dict[str, Any]]) -> InferResponse:
    """The predictions as tensors; those that the request names, or all."""
    images = [image for prediction in predictions for image in prediction["images"]]
    metadata = [
        json.dumps({key: value for key, value in prediction.items() if key != "images"}) for prediction in predictions
    ]
    outputs = [
        InferOutput("image", [len(images)], OUTPUTS["image"], images),
        InferOutput("metadata", [len(metadata)], OUTPUTS["metadata"], metadata),
    ]
    wanted = {one.name for one in request.request_outputs or outputs}
    version = predictions[0]["version"]
    return InferResponse(request.id, name, [one for one in outputs if one.name in wanted], model_version=version)

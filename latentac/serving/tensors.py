"""KServe's V2 protocol: a request's fields as named tensors, its images as BYTES. A tensor's elements stand in the
JSON, or as bytes behind it: the extension `binary_tensor_data`, which clients use by default."""

import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from kserve import InferInput, InferRequest, InferResponse
from kserve.protocol.infer_type import InferOutput, RequestedOutput
from kserve.utils.numpy_codec import to_np_dtype
from pydantic import ConfigDict, Field

from latentac.config.schema import Limits, suggestion
from latentac.config.sections import Section
from latentac.serving.request import (
    MOST_PROBLEMS,
    WHOLE,
    Json,
    Request,
    at_most,
    decoded,
    most_values,
    shortened,
    validated,
)
from latentac.system.errors import ConfigError, Problem

_DATATYPES = {"string": "BYTES", "integer": "INT64", "number": "FP32", "object": "BYTES"}
_FIELDS = Request.model_json_schema()["properties"]
INPUTS = {name: _DATATYPES[field.get("anyOf", [field])[0]["type"]] for name, field in _FIELDS.items()}
"""Name of an input -> its datatype: each field of a request. `steering` is the text of a JSON object."""

OUTPUTS = {"image": "BYTES", "metadata": "BYTES"}
"""image: a PNG in base64 per image, those of a prompt one after another; metadata: JSON per prompt."""

EXTENSIONS = ["binary_tensor_data"]
"""Of the protocol, those that are here."""

BINARY_HEADER = "Inference-Header-Content-Length"
"""Says how long the JSON is that bytes follow."""

_INTEGERS = tuple(f"{sign}INT{bits}" for sign in ("", "U") for bits in (64, 32, 16, 8))
_ALIKE = {"FP32": ("FP32", "FP64", "FP16", *_INTEGERS), "INT64": _INTEGERS}
"""Datatype of an input -> those that hold the same numbers."""

DATATYPES = sorted({"BYTES", *_ALIKE["FP32"]})

_SHAPE: Json = {
    "maxItems": 2,
    "items": {"type": "integer", "minimum": 1},
    "description": "[number of elements]: that of the prompts, or 1 for all of them",
}

_EXAMPLE: Json = {
    "inputs": [{"name": "prompt", "datatype": INPUTS["prompt"], "shape": [1], "data": ["two red squares"]}],
    "outputs": [{"name": "image"}],
}

_LENGTH = struct.Struct("<I")


class InputParameters(Section):
    """binary_data_size: bytes behind the JSON that are this tensor's; those of all inputs stand there in their order.
    content_type: a hint of some clients, which changes nothing here."""

    binary_data_size: Annotated[int | None, Field(ge=0, description="Use the number of the tensor's bytes."), WHOLE] = (
        None
    )
    content_type: Annotated[str | None, Field(description="Use a text, or leave it out.")] = None


class OutputParameters(Section):
    """binary_data: whether the output comes as bytes behind the JSON; unless it is said, as the request's own
    parameter `binary_data_output` says."""

    binary_data: Annotated[bool | None, Field(description="Use true or false, or leave it out.")] = None
    content_type: Annotated[str | None, Field(description="Use a text, or leave it out.")] = None


class RequestParameters(Section):
    """binary_data_output: whether outputs come as bytes behind the JSON. The others are hints of clients; requests are
    drawn in the order of their arrival, whatever they say."""

    binary_data_output: Annotated[bool | None, Field(description="Use true or false, or leave it out.")] = None
    content_type: Annotated[str | None, Field(description="Use a text, or leave it out.")] = None
    priority: Annotated[int | None, Field(description="Use a whole number, or leave it out."), WHOLE] = None
    timeout: Annotated[int | None, Field(description="Use a whole number, or leave it out."), WHOLE] = None


class RequestInput(Section):
    """data: the elements, flat or nested as `shape` says; left out where they are bytes behind the JSON."""

    name: Annotated[str, Field(description="Use the name of an input.", json_schema_extra={"enum": [*INPUTS]})]
    shape: Annotated[
        list[Annotated[int, WHOLE]], Field(description="Use [number of elements].", json_schema_extra=_SHAPE)
    ]
    datatype: Annotated[str, Field(description="Use the input's datatype.", json_schema_extra={"enum": [*DATATYPES]})]
    parameters: Annotated[
        InputParameters | None, Field(description="Send binary_data_size, or leave them out; fields are inputs.")
    ] = None
    data: Annotated[list[Any] | None, Field(description="Send the list of elements.")] = None


class RequestOutput(Section):
    name: Annotated[str, Field(description="Use the name of an output.", json_schema_extra={"enum": [*OUTPUTS]})]
    parameters: Annotated[OutputParameters | None, Field(description="Send binary_data, or leave them out.")] = None


class InferenceRequest(Section):
    """The V2 form of a request. model_name: sent by KServe's client, and not read: the address has it."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})

    id: Annotated[str | None, Field(description="Use a text, or leave it out.")] = None
    model_name: Annotated[str | None, Field(description="Use a text, or leave it out.")] = None
    parameters: Annotated[
        RequestParameters | None, Field(description="Send binary_data_output, or leave them out; fields are inputs.")
    ] = None
    inputs: Annotated[list[RequestInput], Field(description="Send a list of KServe's V2 inputs.")]
    outputs: Annotated[list[RequestOutput] | None, Field(description="Name outputs, or leave it out for all.")] = None


def described(tensors: Mapping[str, str]) -> list[dict[str, Any]]:
    """As KServe's metadata lists them; -1 is any number."""
    return [{"name": name, "datatype": datatype, "shape": [-1]} for name, datatype in tensors.items()]


def infer_request(body: object, name: str, binary: bytes = b"") -> InferRequest:
    """KServe's own record of decoded JSON and the bytes behind it. Raises ConfigError with every problem."""
    request = validated(InferenceRequest, body)
    problems = [
        Problem(f"outputs.{i}.name", shortened(one.name), "no such output", suggestion(shortened(one.name), [*OUTPUTS]))
        for i, one in enumerate(request.outputs or [])
        if one.name not in OUTPUTS
    ]
    problems += [problem for place, one in enumerate(request.inputs) if (problem := _misfit(place, one))]
    if problems:
        raise ConfigError(problems[:MOST_PROBLEMS])
    inputs = [
        InferInput(one.name, [len(data)], one.datatype.upper(), data)
        for one, data in zip(request.inputs, _elements(request.inputs, binary), strict=True)
    ]
    by_default = bool(request.parameters and request.parameters.binary_data_output)
    wanted = {one.name: one.parameters and one.parameters.binary_data for one in request.outputs or []}
    outputs = [
        RequestedOutput(name, {"binary_data": by_default if chosen is None else chosen})
        for name, chosen in (wanted or dict.fromkeys(OUTPUTS)).items()
    ]
    return InferRequest(name, inputs, request.id or "", request_outputs=outputs)


def _misfit(place: int, one: RequestInput) -> Problem | None:
    at, datatype = f"inputs.{place}", INPUTS.get(one.name)
    if datatype is None:
        return Problem(f"{at}.name", shortened(one.name), "no such input", suggestion(shortened(one.name), [*INPUTS]))
    if one.datatype.upper() not in _ALIKE.get(datatype, (datatype,)):
        return Problem(f"{at}.datatype", shortened(one.datatype), f"is not that of {one.name}", f"Use {datatype}.")
    return None


def _elements(inputs: Sequence[RequestInput], binary: bytes) -> list[list[Any]]:
    """The elements of each input, flat. Raises ConfigError with every problem."""
    found: list[list[Any]] = []
    problems: list[Problem] = []
    start = 0
    for place, one in enumerate(inputs):
        size = one.parameters.binary_data_size if one.parameters else None
        try:
            if size is None:
                data = _flat(f"inputs.{place}", one)
            else:
                data = _unpacked(f"inputs.{place}", one, binary[start : start + size], size)
            if min(one.shape, default=1) < 1 or math.prod(one.shape[:8]) != len(data) or len(one.shape) > 2:
                problem = f"does not fit {len(data)} elements"
                problems.append(
                    Problem(f"inputs.{place}.shape", shortened(one.shape), problem, "Use [number of elements].")
                )
            found.append(data)
        except ConfigError as error:
            problems += error.problems
        start += size or 0
    if start < len(binary):
        remedy = f"Give each input's binary_data_size, and the length of the JSON in the header {BINARY_HEADER}."
        problems.append(Problem("body", len(binary) - start, "bytes belong to no input", remedy))
    if problems:
        raise ConfigError(problems[:MOST_PROBLEMS])
    return found


def _flat(at: str, one: RequestInput) -> list[Any]:
    """Data that stand in the JSON."""
    if one.data is None:
        remedy = "Send the list of elements, or bytes and their binary_data_size."
        raise ConfigError([Problem(f"{at}.data", None, "is required", remedy)])
    nested = len(one.shape) > 1 and bool(one.data) and all(isinstance(row, list) for row in one.data)
    return list(itertools.chain.from_iterable(one.data)) if nested else one.data


def _unpacked(at: str, one: RequestInput, content: bytes, size: int) -> list[Any]:
    """Data that stand behind the JSON: little-endian numbers, or each text after its length in four bytes."""
    if one.data is not None:
        problem = "is given twice: in the JSON, and as bytes behind it"
        raise ConfigError([Problem(f"{at}.data", shortened(one.data), problem, "Leave out one of them.")])
    place = f"{at}.parameters.binary_data_size"
    if len(content) < size:
        remedy = f"Send all bytes, and the length of the JSON in the header {BINARY_HEADER}."
        raise ConfigError([Problem(place, size, f"bytes are not there, but {len(content)}", remedy)])
    if one.datatype.upper() == "BYTES":
        return _texts(at, content)
    dtype = np.dtype(to_np_dtype(one.datatype.upper())).newbyteorder("<")
    if size % dtype.itemsize:
        problem, remedy = f"is not a multiple of {dtype.itemsize}", f"Use {dtype.itemsize} bytes an element."
        raise ConfigError([Problem(place, size, problem, remedy)])
    data = np.frombuffer(content, dtype)
    if not np.isfinite(data).all():
        raise ConfigError([Problem(f"{at}.data", None, "has an element that is not a finite number", "Use numbers.")])
    elements: list[Any] = data.tolist()
    return elements


def _texts(at: str, content: bytes) -> list[str]:
    found: list[str] = []
    start = 0
    while start < len(content):
        begin = start + _LENGTH.size
        end = begin + _LENGTH.unpack_from(content, start)[0] if begin <= len(content) else begin
        if end > len(content):
            remedy = "Send each text after its length in four bytes, the lowest first."
            raise ConfigError([Problem(f"{at}.data", len(found), "is the element that the bytes end in", remedy)])
        try:
            found.append(content[begin:end].decode())
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8: {error.reason}"
            raise ConfigError([Problem(f"{at}.data", shortened(content[begin:end]), problem, "Use UTF-8.")]) from None
        start = end
    return found


def instances(request: InferRequest, limits: Limits) -> dict[str, Any]:
    """The V1 form of a V2 request. An input of one element holds for every prompt. Raises ConfigError."""
    names = [one.name for one in request.inputs]
    problems = []
    if len(set(names)) < len(names):
        problems.append(Problem("inputs", shortened(names), "an input is given twice", "Give each once."))
    if "prompt" not in names:
        problems.append(Problem("inputs", shortened(names), "has no input `prompt`", "Send one, of BYTES."))
    if problems:
        raise ConfigError(problems)
    columns = {one.name: one.data for one in request.inputs}
    rows = len(columns["prompt"])
    at_most(limits.max_images, rows)  # first: a long column would be read at length
    for name, data in columns.items():
        if len(data) not in (1, rows):
            problem = f"is the number of elements, beside {rows} prompts"
            problems.append(Problem(f"inputs.{name}", len(data), problem, f"Use 1 or {rows}."))
    if problems:
        raise ConfigError(problems)
    columns = {name: [_value(name, one, most_values(limits)) for one in data] for name, data in columns.items()}
    return {
        "instances": [
            {name: data[row if len(data) > 1 else 0] for name, data in columns.items()} for row in range(rows)
        ]
    }


def _value(name: str, value: object, most: int) -> object:
    """What is no JSON object's text is left as it is, for the form to refuse."""
    if name != "steering" or not isinstance(value, str):
        return value
    try:
        return decoded(value.encode(errors="replace"), most)
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
    wanted = request.request_outputs
    version = predictions[0]["version"]
    return InferResponse(request.id, name, outputs, model_version=version, requested_outputs=wanted)

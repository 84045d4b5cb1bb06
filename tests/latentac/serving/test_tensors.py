"""What costs much, or is no tensor, is refused before it is looked at: V2 requests without a server."""

import time
from typing import Any

import pytest

from latentac.config.schema import Limits
from latentac.serving.request import MOST_PROBLEMS, most_values
from latentac.serving.tensors import infer_request, instances
from latentac.system.errors import ConfigError

LIMITS = Limits(max_images=4)


def one(name: str = "prompt", **fields: Any) -> dict[str, Any]:
    return {"name": name, "shape": [1], "datatype": "BYTES", "data": ["a"], **fields}


def test_an_output_that_is_none_is_reported() -> None:
    """With its place and the name that was meant."""
    body = {"inputs": [one()], "outputs": [{"name": "metadata"}, {"name": "imag"}]}
    with pytest.raises(ConfigError, match=r"outputs\.1\.name = 'imag': no such output\..*\"image\""):
        infer_request(body, "latentac")


@pytest.mark.parametrize("wrong", [one("nothing"), one(shape=[7])], ids=["names", "shapes"])
def test_of_many_wrong_inputs_few_are_reported(wrong: dict[str, Any]) -> None:
    """An answer is never much longer than a line."""
    with pytest.raises(ConfigError) as caught:
        infer_request({"inputs": [wrong] * 1000}, "latentac")
    assert len(caught.value.problems) <= MOST_PROBLEMS


def test_a_shape_of_many_sides_is_not_multiplied() -> None:
    """Its product would have millions of digits."""
    began = time.process_time()
    with pytest.raises(ConfigError, match="does not fit 1 elements"):
        infer_request({"inputs": [one(shape=[2**62] * 100_000)]}, "latentac")
    assert time.process_time() - began < 2


def test_more_prompts_than_are_made_are_refused_before_their_other_inputs_are_read() -> None:
    """Each text of `steering` would be read as JSON."""
    rows = LIMITS.max_images + 1
    inputs = [one(shape=[rows], data=["a"] * rows), one("steering", shape=[rows], data=["{}"] * rows)]
    with pytest.raises(ConfigError, match=rf"{rows}"):
        instances(infer_request({"inputs": inputs}, "latentac"), LIMITS)


@pytest.mark.parametrize(
    "text", ["[{}]".format("1," * 10**6 + "1"), '{"a": "\ud800"', "["], ids=["long", "half", "cut"]
)
def test_steering_that_is_not_read_stays_a_text(text: str) -> None:
    """For the form to refuse, as any other value of a wrong type."""
    assert len(text) < 20 or most_values(LIMITS) < 10**6
    request = infer_request({"inputs": [one(), one("steering", data=[text])]}, "latentac")
    (found,) = instances(request, LIMITS)["instances"]
    assert found["steering"] == text


def sized(size: object, **fields: Any) -> dict[str, Any]:
    """A prompt whose data stand behind the JSON."""
    left = {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    return {**left, **fields}


def number(name: str, datatype: str, size: int) -> dict[str, Any]:
    return sized(size, name=name, datatype=datatype)


TEXT = b"\x01\0\0\0a"
WRONG: dict[str, tuple[list[dict[str, Any]], bytes, str]] = {
    "no such input": ([one("promt")], b"", r"inputs\.0\.name = 'promt': no such input\..*\"prompt\""),
    "another datatype": ([one(datatype="INT64", data=[1])], b"", r"inputs\.0\.datatype = 'INT64': .*Use BYTES\."),
    "a wider datatype": ([one("seed", datatype="FP32", data=[1.0])], b"", r"is not that of seed\. Use INT64\."),
    "an unknown datatype": ([one(datatype="X" * 10_000)], b"", r"inputs\.0\.datatype = 'X"),
    "no side": ([one(shape=[0], data=[])], b"", r"inputs\.0\.shape = \[0\]: does not fit 0 elements"),
    "sides below zero": ([one(shape=[-1, -1])], b"", r"shape = \[-1, -1\]: does not fit 1 elements"),
    "another number": ([one(shape=[2])], b"", r"shape = \[2\]: does not fit 1 elements"),
    "three sides": ([one(shape=[1, 1, 1])], b"", r"shape = \[1, 1, 1\]: does not fit 1 elements"),
    "nothing": ([sized(None)], b"", r"inputs\.0\.data = None: is required"),
    "data twice": ([sized(5, data=["a"])], TEXT, r"inputs\.0\.data = .*is given twice"),
    "too few bytes": ([sized(5)], TEXT[:4], r"binary_data_size = 5: bytes are not there, but 4"),
    "no bytes": ([sized(2**62)], TEXT, r"bytes are not there, but 5"),
    "bytes below zero": ([sized(-1)], b"", r"inputs\.0\.parameters\.binary_data_size = -1"),
    "too many bytes": ([sized(5)], TEXT + b"b", r"body = 1: bytes belong to no input"),
    "half a number": ([one(), number("seed", "INT64", 7)], b"\0" * 7, r"binary_data_size = 7: is not a multiple of 8"),
    "not a number": ([one(), number("guidance_scale", "FP16", 2)], b"\0\x7e", r"not a finite number"),
    "no end": ([one(), number("guidance_scale", "FP32", 4)], b"\0\0\x80\x7f", r"not a finite number"),
    "a text that goes on": ([sized(8)], b"\xff\xff\xff\xffabcd", r"data = 0: is the element that the bytes end in"),
    "half a length": ([sized(7)], TEXT + b"\1\0", r"data = 1: is the element that the bytes end in"),
    "not UTF-8": ([sized(5)], b"\x01\0\0\0\xff", r"inputs\.0\.data = .*is not UTF-8"),
    "an input twice": ([one(), one()], b"", r"inputs = \['prompt', 'prompt'\]: an input is given twice"),
    "no prompt": ([one("seed", datatype="INT64", data=[1])], b"", r"has no input `prompt`"),
    "columns": ([one(), one("seed", datatype="INT64", shape=[2], data=[1, 2])], b"", r"inputs\.seed = 2: .*Use 1 or 1"),
}
"""Inputs, the bytes behind the JSON, and what is said of them."""


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_tensor_is_reported_with_its_place(wrong: str) -> None:
    """And shortly: what it is, and what to send."""
    inputs, binary, message = WRONG[wrong]
    with pytest.raises(ConfigError, match=message) as caught:
        instances(infer_request({"inputs": inputs}, "latentac", binary), LIMITS)
    assert all(problem.remedy for problem in caught.value.problems)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("inputs", "binary", "expected"),
    [
        ([sized(5)], TEXT, {"prompt": "a"}),
        ([sized(5), number("seed", "UINT8", 1)], TEXT + b"\x07", {"prompt": "a", "seed": 7}),
        ([number("seed", "INT16", 2), sized(5)], b"\x01\x02" + TEXT, {"prompt": "a", "seed": 0x0201}),
        ([one(shape=[1, 1], data=[["a"]])], b"", {"prompt": "a"}),
        ([one(shape=[1], data=[["a"]])], b"", {"prompt": ["a"]}),  # for the form to refuse
        ([one(shape=[], data=["a"])], b"", {"prompt": "a"}),
        ([one(datatype="bytes")], b"", {"prompt": "a"}),
    ],
)
def test_a_tensor_is_read_as_its_shape_and_its_bytes_say(
    inputs: list[dict[str, Any]], binary: bytes, expected: dict[str, Any]
) -> None:
    """The bytes of each input follow those of the one before."""
    request = infer_request({"inputs": inputs}, "latentac", binary)
    assert instances(request, LIMITS)["instances"] == [expected]

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


def test_an_output_that_is_none_is_told() -> None:
    """With its place and the name that was meant."""
    body = {"inputs": [one()], "outputs": [{"name": "metadata"}, {"name": "imag"}]}
    with pytest.raises(ConfigError, match=r"outputs\.1\.name = 'imag': no such output\..*\"image\""):
        infer_request(body, "latentac")


@pytest.mark.parametrize("wrong", [one("nothing"), one(shape=[7])], ids=["names", "shapes"])
def test_of_many_wrong_inputs_few_are_told(wrong: dict[str, Any]) -> None:
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

"""What a caller may ask for, and what they read when it is wrong."""

import json
from typing import Any

import pytest

from latentac.config import Config, Extension, Kernel, Named
from latentac.errors import ConfigError
from latentac.serving.exported import Batching, Exported, Head, Limits, Method
from latentac.serving.request import Request, decoded, parse, parse_images, parse_one


def method(name: str, strength: float) -> Method:
    """A row of the steering table, as a model offers it."""
    return Method(extension=Named(use=name), summary="", needs_gradient=False, strength=strength, particles=4)


EXPORTED = Exported(
    version="v",
    run="r",
    backbone=Extension(use="unet"),
    kernel=Kernel(),
    size=(32, 32),
    policies=["trained"],
    rewards=[Head(name=name, weight=1.0, unit="") for name in ("shapes_verifier", "jpeg_compressibility")],
    examples=[],
    methods={"best_of_n": method("best_of_n", 2.0), "resampling": method("resampling", 20.0)},
    default_method="resampling",
    limits=Limits(max_images=8, max_prompt_characters=100),
    batching=Batching(),
)


def told(body: object) -> list[str]:
    """The problems of a body, one line each."""
    with pytest.raises(ConfigError) as caught:
        parse(body, EXPORTED)
    return str(caught.value).splitlines()


def test_defaults_and_all_fields() -> None:
    """A prompt is enough; the body's JSON is read as it was written."""
    full = {"prompt": "b", "seed": 2**63 - 1, "count": 7, "num_steps": 2, "method": "best_of_n", "particles": 32}
    full |= {"steering": {"jpeg_compressibility": -1}, "size": "32x32", "guidance_scale": 4.5, "policy": "trained"}
    body = {"instances": [{"prompt": "a"}, full]}
    requests = parse(body, EXPORTED)
    assert requests == parse(decoded(json.dumps(body).encode()), EXPORTED)
    assert requests[0] == Request(prompt="a")
    assert requests[1].model_dump() == full


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({"promt": "a"}, "instances.0.prompt = None: is required. Write what the picture shall show."),
        ({"prompt": ""}, "instances.0.prompt = '': string should have at least 1 character."),
        ({"prompt": "x" * 101}, "has 101 characters. Use at most 100."),
        ({"prompt": "a", "promt": "a"}, "instances.0.promt = 'a': unknown field. Did you mean \"prompt\"?"),
        ({"prompt": "a", "seed": -1}, "instances.0.seed = -1: input should be greater than or equal to 0."),
        ({"prompt": "a", "seed": 2**63}, "Use a whole number from 0 to 2^63 - 1."),
        ({"prompt": "a", "seed": "1"}, "instances.0.seed = '1': input should be a valid integer."),
        ({"prompt": "a", "count": 9}, "instances.0.count = 9: is above this model's limit. Use at most 8."),
        ({"prompt": "a", "count": True}, "instances.0.count = True: input should be a valid integer."),
        ({"prompt": "a", "num_steps": 1}, "Use at least 2 steps, or leave it out."),
        ({"prompt": "a", "num_steps": 101}, "instances.0.num_steps = 101: is above this model's limit."),
        ({"prompt": "a", "particles": 33}, "instances.0.particles = 33: is above this model's limit."),
        ({"prompt": "a", "method": "best_of"}, 'no such steering method. Did you mean "best_of_n"?'),
        ({"prompt": "a", "steering": {"jpeg": 1}}, "instances.0.steering.jpeg = 1: the critic has no head"),
        (
            {"prompt": "a", "steering": {"shapes_verifier": 1e9}},
            "Use a number of standard deviations from -100 to 100.",
        ),
        ({"prompt": "a", "steering": {"shapes_verifier": "x"}}, "instances.0.steering.shapes_verifier = 'x': input"),
        ({"prompt": "a", "method": "none", "steering": {"shapes_verifier": 1}}, 'does nothing with method "none"'),
        (
            {"prompt": "a", "guidance_scale": 21},
            "instances.0.guidance_scale = 21: is above this model's limit. Use at most 20.",
        ),
        ({"prompt": "a", "guidance_scale": 0.5}, "Use a number from 1, which is no guidance."),
        ({"prompt": "a", "size": "64x64"}, "instances.0.size = '64x64': this model draws no such size. Known: 32x32."),
        (
            {"prompt": "a", "policy": "base"},
            "instances.0.policy = 'base': this model has no such policy. Known: trained.",
        ),
        ("a", "instances.0 = 'a': is no JSON object."),
    ],
)
def test_a_bad_field_is_told_with_path_value_and_remedy(instance: Any, message: str) -> None:
    """One line a problem, which says where, what, and what to do."""
    assert any(message in line for line in told({"instances": [instance]})), told({"instances": [instance]})


def test_every_problem_is_told_at_once() -> None:
    """Of all instances, whether a field is malformed or only above a limit."""
    first = {"prompt": "a", "seed": -1, "count": 9, "method": "x", "steering": {"y": 1}}
    assert len(told({"instances": [first, {"prompt": "a", "particles": 0}]})) == 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([1], "body = [1]: is no JSON object. Send"),
        ({"instances": []}, "instances = []: list should have at least 1 item"),
        ({"instances": {"prompt": "a"}}, "instances = {'prompt': 'a'}: input should be a valid list."),
        ({"prompt": "a"}, "prompt = 'a': unknown field."),
        ({"instances": [{"prompt": "a", "count": 5}] * 2}, "instances = 10: is the number of pictures asked for"),
        ({"instances": [3] * 9}, "instances = 9: is the number of pictures asked for"),
    ],
)
def test_a_bad_body_is_told(body: object, message: str) -> None:
    """The frame around the requests is held to the same."""
    assert any(message in line for line in told(body)), told(body)


@pytest.mark.parametrize(
    "body", [b'{"instances": [', b"\xff", b"", b'{"a": NaN}', b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 9999]
)
def test_what_is_not_json_is_told(body: bytes) -> None:
    """So are numbers that JSON does not have, and what is nested without end."""
    with pytest.raises(ConfigError, match="is not JSON"):
        decoded(body)


def test_openais_form_is_the_same_request() -> None:
    """`n` is our `count`, and problems are told by its name; what belongs to nobody is refused."""
    asked = parse_images({"prompt": "a", "n": 2, "size": "32x32", "response_format": "b64_json", "seed": 3}, EXPORTED)
    assert (
        asked.model_dump(include=set(Request.model_fields))
        == Request(prompt="a", count=2, size="32x32", seed=3).model_dump()
    )
    with pytest.raises(ConfigError) as caught:
        parse_images({"prompt": "a", "n": 9, "quality": "hd", "response_format": "url"}, EXPORTED)
    assert {problem.path for problem in caught.value.problems} == {"n", "quality", "response_format"}


def test_one_request_is_read_alone() -> None:
    """Its problems have no number."""
    assert parse_one({"prompt": "a"}, EXPORTED) == Request(prompt="a")
    with pytest.raises(ConfigError, match=r"^count = 9: is above this model's limit"):
        parse_one({"prompt": "a", "count": 9}, EXPORTED)


def test_an_error_is_never_much_larger_than_a_line() -> None:
    """Whatever is sent, it is quoted at most in part."""
    long = "x" * 100_000
    body = {"instances": [{"prompt": long, long: 1, "seed": long, "steering": {long: long}, "method": long}]}
    assert all(len(line) < 600 for line in told(body))


def test_the_default_weights_follow_the_rewards(config: Config) -> None:
    """The trained reward's head at its method's strength, a watched one's at 0."""
    rewards = [Head(name="a", weight=0.5, unit=""), Head(name="b", weight=0.0, unit="")]
    assert EXPORTED.model_copy(update={"rewards": rewards}).default_weights("best_of_n") == {"a": 1.0, "b": 0.0}
    assert EXPORTED.default_weights("resampling")["shapes_verifier"] == 20.0

"""What a caller may ask for, and what they read when it is wrong."""

import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from latentac.config.schema import Batching, Config, Kernel, Limits
from latentac.config.sections import Extension, Named
from latentac.serving import request
from latentac.serving.exported import Exported, Head, Method
from latentac.serving.forms import forms_of
from latentac.serving.openai import ImagesRequest
from latentac.serving.request import Request, decoded, most_values, validated
from latentac.serving.tensors import infer_request, instances
from latentac.system.errors import ConfigError


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
FORMS = forms_of(EXPORTED)


def parse(body: object) -> list[Request]:
    """The requests of a V1 body."""
    return validated(FORMS.body, body).instances


def parse_one(body: object) -> Request:
    return validated(FORMS.request, body)


def parse_images(body: object) -> ImagesRequest:
    return validated(FORMS.images, body)


def answered(body: object) -> list[str]:
    """The problems of a body, one line each."""
    with pytest.raises(ConfigError) as caught:
        parse(body)
    return str(caught.value).splitlines()


def test_defaults_and_all_fields() -> None:
    """A prompt is enough; the body's JSON is read as it was written."""
    full = {"prompt": "b", "seed": 2**63 - 1, "count": 7, "num_steps": 2, "method": "best_of_n", "particles": 32}
    full |= {"steering": {"jpeg_compressibility": -1}, "size": "32x32", "guidance_scale": 4.5, "policy": "trained"}
    body = {"instances": [{"prompt": "a"}, full]}
    requests = parse(body)
    assert requests == parse(decoded(json.dumps(body).encode(), 1000))
    assert requests[0] == FORMS.request(prompt="a")
    assert requests[1].model_dump() == full


@pytest.mark.parametrize(
    ("instance", "message"),
    [
        ({"promt": "a"}, "instances.0.prompt = None: is required. Write what the image shall show."),
        ({"prompt": ""}, "instances.0.prompt = '': string should have at least 1 character."),
        ({"prompt": "x" * 101}, "has 101 characters, above 100. Use at most 100."),
        ({"prompt": "a", "promt": "a"}, "instances.0.promt = 'a': unknown field. Did you mean \"prompt\"?"),
        ({"prompt": "a", "seed": -1}, "instances.0.seed = -1: input should be greater than or equal to 0."),
        ({"prompt": "a", "seed": 2**63}, "Use a whole number from 0 to 2^63 - 1."),
        ({"prompt": "a", "seed": "1"}, "instances.0.seed = '1': input should be a valid integer."),
        (
            {"prompt": "a", "seed": 2.0**53},  # what 2^53 + 1 is, too
            "instances.0.seed = 9007199254740992.0: input should be a valid integer.",
        ),
        ({"prompt": "a", "seed": 1.5}, "instances.0.seed = 1.5: input should be a valid integer."),
        ({"prompt": "a", "count": 9}, "instances.0.count = 9: is above this model's limit. Use at most 8."),
        ({"prompt": "a", "count": 0}, "instances.0.count = 0: input should be greater than or equal to 1."),
        ({"prompt": "a", "guidance_scale": math.nan}, "instances.0.guidance_scale = nan: "),
        ({"prompt": "a", "steering": {"shapes_verifier": math.nan}}, "instances.0.steering.shapes_verifier = nan: "),
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
        ({"prompt": "a", "method": "none", "particles": 2}, "instances.0.particles = 2: does nothing with method"),
        ({"prompt": " \t"}, "is nothing but white space. Write what the image shall show."),
        ({"prompt": "a\x1bb"}, "has a control character (U+001B) at character 2"),
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
def test_a_bad_field_is_reported_with_path_value_and_remedy(instance: Any, message: str) -> None:
    """One line a problem, which says where, what, and what to do."""
    assert any(message in line for line in answered({"instances": [instance]})), answered({"instances": [instance]})


def test_every_problem_is_reported_at_once() -> None:
    """Of all instances, whether a field is malformed or only above a limit."""
    first = {"prompt": "a", "seed": -1, "count": 9, "method": "x", "steering": {"y": 1}}
    assert len(answered({"instances": [first, {"prompt": "a", "particles": 0}]})) == 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([1], "body = [1]: is no JSON object. Send"),
        ({"instances": []}, "instances = []: list should have at least 1 item"),
        ({"instances": {"prompt": "a"}}, "instances = {'prompt': 'a'}: input should be a valid list."),
        ({"prompt": "a"}, "prompt = 'a': unknown field."),
        ({"inputs": [{"prompt": "a"}]}, "inputs = [{'prompt': 'a'}]: unknown field. Use \"instances\"."),
        ({"instances": [{"prompt": "a", "count": 5}] * 2}, "instances = 10: is the number of images asked for"),
        ({"instances": [3] * 9}, "instances = 9: is the number of images asked for"),
    ],
)
def test_a_bad_body_is_reported(body: object, message: str) -> None:
    """The frame around the requests is held to the same."""
    assert any(message in line for line in answered(body)), answered(body)


def test_a_byte_order_mark_is_no_mistake() -> None:
    """Some editors put it before a file's text."""
    assert decoded(b'\xef\xbb\xbf{"a": 1}', 10) == {"a": 1}


@pytest.mark.parametrize(
    "body", [b'{"instances": [', b"\xff", b"", b'{"a": NaN}', b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 9999]
)
def test_what_is_not_json_is_reported(body: bytes) -> None:
    """So are numbers that JSON does not have, and what is nested without end."""
    with pytest.raises(ConfigError, match="is not JSON"):
        decoded(body, 10)


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"1e999", "body"),
        (b"-1e400", "body"),
        (b'{"a": 1E+309}', "a"),
        (b'{"a": [1, [2, {"b": 1e999}]]}', "a.1.1.b"),
    ],
)
def test_a_number_beyond_those_of_a_computer_is_reported_with_its_path(body: bytes, path: str) -> None:
    """JSON can write it, and no answer can repeat it."""
    with pytest.raises(ConfigError, match=rf"^{path} = '1e309 or more': is beyond the numbers"):
        decoded(body, 10)


def test_openais_form_is_the_same_request() -> None:
    """`n` is our `count`, and problems are told by its name; what would change the answer is refused."""
    asked = parse_images({"prompt": "a", "n": 2, "size": "32x32", "response_format": "b64_json", "seed": 3})
    assert (
        asked.model_dump(include=set(Request.model_fields))
        == FORMS.request(prompt="a", count=2, size="32x32", seed=3).model_dump()
    )
    with pytest.raises(ConfigError) as caught:
        parse_images({"prompt": "a", "n": 9, "output_format": "webp", "response_format": "url"})
    assert {problem.path for problem in caught.value.problems} == {"n", "output_format", "response_format"}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("quality", [None, "auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"]),
        ("style", [None, "vivid", "natural"]),
        ("background", [None, "auto", "opaque"]),
        ("moderation", [None, "auto", "low"]),
        ("output_format", [None, "png"]),
        ("output_compression", [None, 100, 100.0]),
        ("partial_images", [None, 0]),
        ("stream", [None, False]),
        ("response_format", [None, "b64_json"]),
        ("size", [None, "auto", "32x32"]),
        ("n", [None, 1]),
        ("model", [None]),
        ("user", [None, "", "somebody"]),
        ("safety_identifier", [None, "somebody"]),
        *((name, [None]) for name in ("complexity", "svg", "frame_count", "frame_duration_ms")),
        *((name, [None]) for name in ("seed", "num_steps", "guidance_scale", "policy", "method", "steering")),
    ],
)
def test_openais_defaults_are_the_default_image(name: str, values: list[Any]) -> None:
    """What its clients send where a caller has chosen nothing is taken, and changes nothing about the image."""
    ours, default = set(Request.model_fields) - {"seed", "size"}, FORMS.images(prompt="a")
    for value in values:
        asked = parse_images({"prompt": "a", name: value})
        assert asked.model_dump(include=ours) == default.model_dump(include=ours)
        assert asked.size in (None, "32x32")


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("stream", 0, "POST /v1/images/stream answers by events."),
        ("partial_images", False, "POST /v1/images/stream reports each step."),
        ("output_compression", True, "Use 100"),
        ("stream", True, "POST /v1/images/stream answers by events."),
        ("partial_images", 2, "POST /v1/images/stream reports each step."),
        ("response_format", "url", "Use b64_json"),
        ("background", "transparent", "the images have no transparency."),
        ("output_format", "webp", "Use png"),
        ("output_compression", 50, "Use 100"),
        ("quality", "ultra", "num_steps"),
        ("style", "photo", "say it in the prompt."),
        ("moderation", "high", "judges no prompts."),
        ("size", "1024x1024", "Known: 32x32."),
        ("svg", {"model": "x"}, "PNG files."),
        ("frame_count", 9, "one frame."),
        ("complexity", "high", "num_steps"),
        ("count", 2, 'Use "n".'),
        ("num_images", 2, 'Use "n".'),
    ],
)
def test_what_openais_form_cannot_have_here_is_refused_by_name(name: str, value: Any, remedy: str) -> None:
    """One problem, that field's, with what to do."""
    with pytest.raises(ConfigError) as caught:
        parse_images({"prompt": "a", name: value})
    [problem] = caught.value.problems
    assert (problem.path, remedy in problem.remedy) == (name, True), problem


def test_without_a_seed_openais_form_draws_a_fresh_one_and_the_others_use_0() -> None:
    """Exact in JavaScript, too."""
    seeds = {parse_images({"prompt": "a"}).seed for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) < 2**53
    assert {one.seed for one in parse({"instances": [{"prompt": "a"}, {"prompt": "a", "seed": None}]})} == {0}
    assert parse_one({"prompt": "a", "seed": None}).seed == 0


def test_null_is_the_same_as_a_field_that_is_left_out() -> None:
    """Many clients send null for what is not set; but a prompt must be there."""
    nulls = dict.fromkeys(set(Request.model_fields) - {"prompt"})
    assert parse_one({"prompt": "a", **nulls}) == FORMS.request(prompt="a")
    assert answered({"instances": [{"prompt": None}]})[0].startswith("instances.0.prompt = None: input should be")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("n", 'Use "count".'),
        ("num_images", 'Use "count".'),
        ("num_images_per_prompt", 'Use "count".'),
        ("num_inference_steps", 'Use "num_steps".'),
        ("cfg_scale", 'Use "guidance_scale".'),
        ("width", 'Use "size".'),
    ],
)
def test_another_programs_name_of_a_field_is_refused_with_ours(name: str, remedy: str) -> None:
    """A field has one name; whoever comes from diffusers or OpenAI is told it."""
    [line] = answered({"instances": [{"prompt": "a", name: 2}]})
    assert line.startswith(f"instances.0.{name} = 2: unknown field. {remedy}")


def test_the_readme_and_the_form_have_the_same_fields() -> None:
    """Its table of an instance names each field once, and no other."""
    text = (Path(request.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text.partition("| Field |")[2].partition("\n\n")[0], re.MULTILINE)
    assert rows == list(Request.model_fields)


def test_one_request_is_read_alone() -> None:
    """Its problems have no number."""
    assert parse_one({"prompt": "a"}) == FORMS.request(prompt="a")
    with pytest.raises(ConfigError, match=r"^count = 9: is above this model's limit"):
        parse_one({"prompt": "a", "count": 9})


def test_an_error_is_never_much_larger_than_a_line() -> None:
    """Whatever is sent, it is quoted at most in part."""
    long = "x" * 100_000
    body = {"instances": [{"prompt": long, long: 1, "seed": long, "steering": {long: long}, "method": long}]}
    assert all(len(line) < 600 for line in answered(body))


def test_the_default_weights_follow_the_rewards(config: Config) -> None:
    """The trained reward's head at its method's strength, a watched one's at 0."""
    rewards = [Head(name="a", weight=0.5, unit=""), Head(name="b", weight=0.0, unit="")]
    assert EXPORTED.model_copy(update={"rewards": rewards}).default_weights("best_of_n") == {"a": 1.0, "b": 0.0}
    assert EXPORTED.default_weights("resampling")["shapes_verifier"] == 20.0


@pytest.mark.parametrize(
    "body",
    [
        {f"field{number}": 1 for number in range(2000)},
        {"instances": [{"prompt": "a", "steering": {f"reward{number}": 1 for number in range(2000)}}]},
        {"inputs": [[[number]] for number in range(700)]},
    ],
)
def test_a_body_of_many_values_is_refused_before_they_are_looked_at(body: object) -> None:
    """What is told of each takes time, in which no other caller is answered. The limit grows with the images that one
    request may ask for."""
    with pytest.raises(ConfigError, match="has more than 2000 values"):
        decoded(json.dumps(body).encode(), 2000)
    few, many = (most_values(EXPORTED.limits.model_copy(update={"max_images": most})) for most in (1, 1000))
    assert few < many < 100 * 1000


def test_few_problems_of_many_are_reported() -> None:
    """A longer list helps nobody."""
    with pytest.raises(ConfigError) as caught:
        parse({"instances": [{"prompt": "a", **{f"field{number}": 1 for number in range(1000)}}]})
    assert len(caught.value.problems) == 20


def test_what_holds_for_each_prompt_is_read_once() -> None:
    """The text of `steering` in the V2 form: a long one, for many prompts."""
    most = EXPORTED.limits.max_images
    text = json.dumps({"shapes_verifier": [[]] * (most_values(EXPORTED.limits) - 50)})
    for rows in (most, 40 * most):
        inputs = [
            {"name": "prompt", "shape": [rows], "datatype": "BYTES", "data": ["a"] * rows},
            {"name": "steering", "shape": [1], "datatype": "BYTES", "data": [text]},
        ]
        request = infer_request({"inputs": inputs}, "latentac")
        tracemalloc.start()
        try:
            if rows > most:
                with pytest.raises(ConfigError, match="above the limit"):
                    instances(request, EXPORTED.limits)
            else:
                assert len(instances(request, EXPORTED.limits)["instances"]) == rows
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()

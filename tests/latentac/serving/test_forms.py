"""The forms of a model: what they validate is what their schema says, for every field and each protocol."""

import itertools
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from latentac.config.schema import Limits
from latentac.config.sections import Section
from latentac.serving.forms import forms_of
from latentac.serving.request import validated
from latentac.serving.tensors import INPUTS
from latentac.system.errors import ConfigError
from tests.latentac.serving.test_request import EXPORTED, FORMS

SMALL = EXPORTED.model_copy(
    update={
        "limits": Limits(
            max_images=3,
            max_steps=7,
            max_particles=5,
            max_prompt_characters=4,
            max_guidance_scale=2.5,
            allow_truncation=True,
        ),
        "policies": ["trained", "base"],
        "methods": {"best_of_n": EXPORTED.methods["best_of_n"]},
        "default_method": "best_of_n",
        "size": (16, 48),
    }
)
NUMBERS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 32, 33, 99, 100, 101, -1, -100, -101, 2**53, 2**63 - 1, 2**63, 10**30]
DOUBLES = [0.0, 1.0, 2.0, 3.0, 4.0, 1.5, 2.5, 2.6, 20.0, 20.5, 0.5, 100.0, 100.5, -100.5, -1.0, 1e9, 1e300]
TEXTS = ["", "a", "abcd", "abcde", "a" * 101, " \t", "a\x1bb", "a\rb", "a\r\nb", "\u200b", "1", "none", "auto"]
NAMES = ["trained", "base", "best_of_n", "resampling", "16x48", "48x16", "32x32", "png", "b64_json"]
OTHERS = [None, True, False, [], [1], {}, {"a": 1}]
WEIGHTS = [{"shapes_verifier": value} for value in (0, 1.5, 100, -100, 100.5, -101, 10**400, None, True, "1")]


def accepted(form: type[Section], fields: object) -> bool:
    try:
        validated(form, fields)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", ["request", "images", "body"])
@pytest.mark.parametrize("exported", [EXPORTED, SMALL], ids=["usual", "small"])
def test_a_form_accepts_what_its_schema_says_and_nothing_else(exported: Any, name: str) -> None:
    """Each field with many values, alone and beside method `none`: validation and document cannot differ."""
    form = getattr(forms_of(exported), name)
    schema = jsonschema.Draft202012Validator(form.model_json_schema())
    fields = form.model_json_schema()["properties"] if name != "body" else FORMS.request.model_fields
    wrong, right = [], 0
    values = [*NUMBERS, *DOUBLES, *TEXTS, *NAMES, *OTHERS, *WEIGHTS]
    for field, value, more in itertools.product([*fields, "other"], values, ({}, {"method": "none"})):
        asked: Any = {"prompt": "a", **more, field: value}
        asked = {"instances": [asked]} if name == "body" else asked
        right += accepted(form, asked)
        if schema.is_valid(asked) != accepted(form, asked):
            wrong.append(asked)
    assert wrong == []
    assert right > 100


@pytest.mark.parametrize(
    ("field", "limit", "above"),
    [
        ("count", 3, 4),
        ("num_steps", 7, 8),
        ("particles", 5, 6),
        ("guidance_scale", 2.5, 2.5000001),
        ("prompt", "abcd", "abcde"),
        ("size", "48x16", "16x48"),
        ("policy", "base", "other"),
        ("method", "best_of_n", "resampling"),
    ],
)
def test_a_limit_of_the_exported_model_holds_in_every_protocol(field: str, limit: Any, above: Any) -> None:
    """At the limit it is taken, just above it is refused by the same words."""
    forms, problems = forms_of(SMALL), []
    for form, path in ((forms.request, ""), (forms.body, "instances.0."), (forms.images, "")):
        name = "n" if (form, field) == (forms.images, "count") else field
        for value in (limit, above):
            asked = {"prompt": "a", name: value}
            body = {"instances": [asked]} if path else asked
            if value == limit:
                validated(form, body)
                continue
            with pytest.raises(ConfigError) as caught:
                validated(form, body)
            [problem] = caught.value.problems
            assert problem.path == path + name
            problems.append((problem.problem, problem.remedy))
    assert len(set(problems)) == 1


def test_every_weight_is_reported_once_and_all_of_them() -> None:
    """An unknown reward, a wrong number and a weight that does nothing, beside particles that do nothing."""
    weights = {"jpeg": "x", "shapes_verifier": 101, "jpeg_compressibility": 1}
    with pytest.raises(ConfigError) as caught:
        validated(FORMS.request, {"prompt": "a", "method": "none", "steering": weights, "particles": 2, "seed": -1})
    message = {problem.path: problem.problem for problem in caught.value.problems}
    assert message == {
        "seed": "input should be greater than or equal to 0",
        "steering.jpeg": "the critic has no head for this reward",
        "steering.shapes_verifier": "is too strong",
        "steering.jpeg_compressibility": 'does nothing with method "none"',
        "particles": 'does nothing with method "none"',
    }
    assert len(caught.value.problems) == 5


def test_each_field_is_an_input_of_its_kind() -> None:
    """Of KServe's V2 protocol."""
    assert list(INPUTS) == list(FORMS.request.model_fields)
    numbers = {name for name, kind in INPUTS.items() if kind == "INT64"}
    assert numbers == {"seed", "count", "num_steps", "particles"}
    assert {name for name, kind in INPUTS.items() if kind == "FP32"} == {"guidance_scale"}


@pytest.mark.parametrize("limit", [{"max_guidance_scale": 0.5}, {"max_steps": 1}, {"max_images": 0}])
def test_a_limit_that_would_allow_nothing_is_refused(limit: dict[str, Any]) -> None:
    """A request needs room for its default guidance scale, for two steps and for one image."""
    with pytest.raises(ValidationError):
        Limits.model_validate(limit)

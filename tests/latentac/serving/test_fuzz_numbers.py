"""Numbers as no library writes them, in every numeric field of every operation that the OpenAPI document names."""

import functools
import http.client
import json
import math
import struct
import time
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentac.serving.process import ServerProcess
from latentac.serving.tensors import DATATYPES, INPUTS
from tests.latentac.serving.fuzzing import EXAMPLES, counted, faults, fuzzed
from tests.latentac.serving.test_protocols import ask, events

pytestmark = [pytest.mark.slow, pytest.mark.fuzz, pytest.mark.timeout(3600)]

ANSWER_SECONDS = 10.0
PLAIN = {"prompt": "a red circle", "num_steps": 2}
SLOT = "\ue000"
"""Stands in a body for the text that is made."""

KNOWN = """
1e999 -1e999 1E+400 -1E400 1e-400 5e-324 4.9e-324 2.2250738585072011e-308 1.7976931348623157e308 1.7976931348623159e308
0.1e1 1.0 1e0 10e-1 100e-2 2.0 20E-1 0.00002e5 -0 -0.0 0e999999 0e-999999 1e99999999999 9007199254740993.0
9007199254740993 9.007199254740993e15 9223372036854775807.0 9223372036854774784.0 1e18 1e19 2147483648 4294967296
9223372036854775807 9223372036854775808 18446744073709551616 -9223372036854775808 -9223372036854775809
1.00000000000000000001 0.99999999999999999999
NaN nan -NaN Infinity -Infinity inf -inf +inf 1e 1e+ e1 1.e1 1. .5 -.5 +1 --1 01 00 -01 0x10
0X1 0b1 0o7 1_000 1,000 １ ² ٣ 1f 1.0f 1L 1n true false null True None "" "1" "NaN" "1e999" "Infinity" "0x10" "１" [] {}
[1] [[1]] [1e999] {"a":1} {"a":1e999} [null] 1/2 1 2 \u0661 -
""".split()


def _with_zeros(number: str, zeros: int, form: str) -> str:
    """The same value, written otherwise."""
    return {"fraction": f"{number}.{'0' * zeros}0", "up": f"{number}e0", "down": f"{number}{'0' * zeros}e-{zeros}"}[
        form
    ]


_digits = st.text("0123456789", min_size=1, max_size=25)
_small = st.integers(-3, 105)
_integers = st.one_of(
    _small,
    st.integers(),
    st.builds(lambda power, off: 2**power + off, st.sampled_from([7, 8, 15, 31, 32, 53, 63, 64, 127, 1024]), _small),
).map(str)
_sign = st.sampled_from(["", "-"])
_long = st.builds(lambda sign, digit, most: sign + digit * most, _sign, st.sampled_from("19"), st.integers(20, 5000))
_equal = st.builds(_with_zeros, _small.map(str), st.integers(0, 400), st.sampled_from(["fraction", "up", "down"]))
_floats = st.floats().map(repr)
_grammar = st.tuples(
    st.sampled_from(["", "-", "+", "--", " ", "\t", "\n", "0"]),
    _digits | _digits.map(lambda text: text.translate({48 + digit: 0xFF10 + digit for digit in range(10)})),
    st.sampled_from(["", ".", "..", ","]) | _digits.map(lambda text: f".{text}") | _digits.map(lambda text: f"_{text}"),
    st.sampled_from(["", "e", "E+", "e-"])
    | st.builds(lambda e, n: f"{e}{n}", st.sampled_from(["e", "E", "e+", "e-"]), st.integers(0, 400_000)),
    st.sampled_from(["", " ", "\r\n", "\0", "f", "n", "L", "%", "\u00a0", "\ufeff"]),
).map("".join)
_scalars = st.one_of(st.sampled_from(KNOWN), _equal, _integers, _floats, _grammar, _long)
TEXTS = st.one_of(
    _scalars,
    _scalars,
    _scalars.map(json.dumps),
    st.builds(lambda text, deep: "[" * deep + text + "]" * deep, _scalars, st.integers(1, 300)),
    st.lists(_scalars, max_size=4).map(lambda each: f"[{','.join(each)}]"),
)


@dataclass(frozen=True)
class Place:
    """A number of a request. body: JSON with SLOT where it stands; keys: the way to it; schema: what the document says
    of it, None where other parts of the request decide; inner: it stands in a text that is JSON of its own."""

    path: str
    name: str
    body: str
    keys: tuple[str | int, ...]
    schema: dict[str, Any] | None
    inner: bool = False


def _is_numeric(schema: dict[str, Any]) -> bool:
    return any(form.get("type") in ("integer", "number") for form in schema.get("anyOf", [schema]))


def _placed(path: str, name: str, content: Any, keys: tuple[str | int, ...], schema: Any, **more: Any) -> Place:
    return Place(path, name, json.dumps(content, ensure_ascii=False).replace(f'"{SLOT}"', SLOT), keys, schema, **more)


def _tensors(*more: dict[str, Any], **top: Any) -> dict[str, Any]:
    texts = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a red circle"]}
    return {**top, "inputs": [texts, *more]}


def places(document: dict[str, Any], name: str) -> list[Place]:
    """Every number of every operation; a field that the document gains is found by itself."""
    schemas, found = document["components"]["schemas"], []
    predict, infer = f"/v1/models/{name}:predict", f"/v2/models/{name}/infer"
    forms = (
        (predict, "Request", True),
        ("/v1/images/stream", "Request", False),
        ("/v1/images/generations", "ImagesRequest", False),
    )
    for path, form, listed in forms:
        properties = schemas[form]["properties"]
        fields: dict[str, Any] = {each: {each: SLOT} for each, schema in properties.items() if _is_numeric(schema)}
        answered = {each: properties[each] for each in fields}
        for head, weight in properties["steering"]["anyOf"][0]["properties"].items():
            fields[f"steering.{head}"], answered[f"steering.{head}"] = {"steering": {head: SLOT}}, weight
        for each, value in fields.items():
            content, keys = PLAIN | value, tuple(each.split("."))
            found.append(
                _placed(path, each, {"instances": [content]}, ("instances", 0, *keys), answered[each])
                if listed
                else _placed(path, each, content, keys, answered[each])
            )
    request = schemas["Request"]["properties"]
    for each, datatype in INPUTS.items():
        tensor = {"name": each, "datatype": datatype, "shape": [1], "data": [SLOT]}
        if _is_numeric(request[each]):
            found.append(_placed(infer, f"data of {each}", _tensors(tensor), ("inputs", 1, "data", 0), request[each]))
    weights = {"name": "steering", "datatype": "BYTES", "shape": [1], "data": [SLOT]}
    schema = request["steering"]["anyOf"][0]["properties"]["shapes_verifier"]
    found.append(_placed(infer, "data of steering", _tensors(weights), ("shapes_verifier",), schema, inner=True))
    seed = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [1]}
    one = {"type": "integer", "const": 1}
    found.append(_placed(infer, "shape", _tensors(seed | {"shape": [SLOT]}), ("inputs", 1, "shape", 0), one))
    found.append(_placed(infer, "whole shape", _tensors(seed | {"shape": SLOT}), ("inputs", 1, "shape"), None))
    found.append(_placed(infer, "whole data", _tensors(seed | {"data": SLOT}), ("inputs", 1, "data"), None))
    for form, top in (("InputParameters", False), ("RequestParameters", True)):
        for each, schema in schemas[form]["properties"].items():
            if not _is_numeric(schema):
                continue
            content = _tensors(parameters={each: SLOT}) if top else _tensors(seed | {"parameters": {each: SLOT}})
            way: tuple[str | int, ...] = ("parameters", each) if top else ("inputs", 1, "parameters", each)
            # Beside data in the JSON, a size of bytes is refused whatever it is, but for null.
            found.append(_placed(infer, f"parameter {each}", content, way, {"type": "null"} if not top else schema))
    return found


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond those of the decimal module
        return Decimal("-1E+500000" if text.startswith("-") else "1E+500000") if "-" not in text[1:] else Decimal(0)


class _Double(Decimal):
    """A number that was written with a fraction or an exponent, which most programs read as a double."""


def strict(text: str) -> Any:
    """JSON with exact numbers. Raises ValueError where RFC 8259 knows no such text."""
    return json.loads(text, parse_float=lambda text: _Double(_number(text)), parse_int=_number, parse_constant=_refuse)


def _plain(number: Any, *, rounded: bool) -> Any:
    """A Decimal for jsonschema; rounded: as a program reads it whose numbers are doubles."""
    if not isinstance(number, Decimal):
        return number
    if rounded or not number:
        return float(number)
    return int(number) if number.adjusted() < 6000 and number == number.to_integral_value() else number


def _numbers(value: Any) -> list[Decimal]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, Decimal) else [each for part in inner for each in _numbers(part)]


def _most(number: Decimal) -> int:
    """The largest power of ten that is read: a double's, or that of a whole number of 4,300 digits."""
    return 300 if isinstance(number, _Double) else 4290


def expected(place: Place, content: str) -> set[int]:
    """The statuses that are right for this body."""
    try:
        found: Any = strict(content)
    except (ValueError, RecursionError):
        return {400}
    if content.count("[") > 50 or any(number and number.adjusted() > _most(number) for number in _numbers(found)):
        return {400, 422}  # beyond what is read
    if place.schema is None:
        return {200, 422}
    try:
        value = strict(found["inputs"][1]["data"][0]) if place.inner else found
        value = functools.reduce(lambda inner, key: inner[key], place.keys, value)
    except (ValueError, LookupError, TypeError):
        return {422}
    right = set()
    for rounded in (False, True):
        good = jsonschema.Draft202012Validator(place.schema).is_valid(_plain(value, rounded=rounded))
        right.add(200 if good else 422)
    if isinstance(value, Decimal) and not -(2**53) < value < 2**53:  # abs() overflows for the largest
        right.add(422)  # a double that may stand for several whole numbers
    if place.name.endswith(("shapes_verifier", "jpeg_compressibility", "of steering")):
        right.add(422)  # weights within the limits may still drive an image to infinity
    return right


def answered(place: Place, answer: Any) -> dict[str, Any]:
    """The fields that an image was drawn with, whichever the protocol."""
    if place.path.endswith("stream"):
        name, last = events(answer)[-1]
        return last if name == "image" else {}
    if place.path.endswith("infer"):
        found: dict[str, Any] = json.loads({one["name"]: one for one in answer["outputs"]}["metadata"]["data"][0])
        return found
    found = answer["latentac"] if "latentac" in answer else answer["predictions"][0]
    return found


class Asking:
    """One connection that is kept, as long as the server does."""

    def __init__(self, server: ServerProcess) -> None:
        self._server, self._connection = server, http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
        self.places = places(ask(server, "GET", "/openapi.json")[2], server.name)

    def __call__(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any, Any]:
        """Status, headers, and the JSON or text of the answer."""
        began, opened = time.monotonic(), self._connection.sock is None
        try:
            self._connection.request("POST", path, body, headers)
            answer = self._connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):  # it rested for too long
            self._connection.close()
            opened = True
            self._connection.request("POST", path, body, headers)
            answer = self._connection.getresponse()
        text = answer.read().decode()
        counted("numbers", [answer.status], connections=int(opened))
        assert time.monotonic() - began < ANSWER_SECONDS
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, answer.headers, json.loads(text, parse_constant=_refuse) if is_json else text


@pytest.fixture(scope="module")
def asking(small: ServerProcess) -> Asking:
    return Asking(small)


def assert_refusal(path: str, headers: Any, answer: Any) -> None:
    """In the form of the route, with an id, and no longer than what it is about."""
    assert headers["X-Request-Id"]
    assert headers.get_content_type() == "application/json"
    assert isinstance(answer["error"], dict if path == "/v1/images/generations" else str)
    assert answer["problems"]
    assert len(json.dumps(answer)) < 20_000


@fuzzed(4.0)
@given(data=st.data())
def test_a_number_is_taken_only_as_the_document_has_it(asking: Asking, data: st.DataObject) -> None:
    """However it is written. What is not JSON is a 400, what the document forbids a 422, and what it allows is drawn,
    with the very number that was sent."""
    place, text = data.draw(st.sampled_from(asking.places)), data.draw(TEXTS)
    content = place.body.replace(SLOT, json.dumps(f'{{"shapes_verifier": {text}}}') if place.inner else text)
    body = content.encode(errors="surrogatepass")
    status, headers, answer = asking(place.path, body, {"Content-Type": "application/json"})
    about = (place.path, place.name, text[:200], status)
    assert status in expected(place, content), (*about, answer)
    if status != 200:
        assert_refusal(place.path, headers, answer)
        return
    assert headers["X-Request-Id"]
    field = place.name.removeprefix("data of ")
    drawn = answered(place, answer)
    if field in drawn and place.schema is not None and not place.inner:
        value = functools.reduce(lambda inner, key: inner[key], place.keys, strict(content))
        if value is not None:
            exact = value == value.to_integral_value() and field != "guidance_scale"
            assert drawn[field] == (int(value) if exact else pytest.approx(float(value))), about


def chosen(places: list[Place], text: str) -> list[Place]:
    """Every place where much is to be tried, and for the texts that mean most; else one of each operation, in turns."""
    if EXAMPLES >= 600 or text in ("1.0", "1e999", "NaN"):
        return places
    paths = sorted({place.path for place in places})
    each = [[place for place in places if place.path == path] for path in paths]
    return [of_path[KNOWN.index(text) % len(of_path)] for of_path in each]


@pytest.mark.parametrize("text", KNOWN)
def test_every_number_that_is_known_to_be_odd(asking: Asking, text: str) -> None:
    """By the same rules."""
    for place in chosen(asking.places, text):
        content = place.body.replace(SLOT, json.dumps(f'{{"shapes_verifier": {text}}}') if place.inner else text)
        status, headers, answer = asking(place.path, content.encode(), {"Content-Type": "application/json"})
        assert status in expected(place, content), (place.path, place.name, text, status, answer)
        if status != 200:
            assert_refusal(place.path, headers, answer)


@fuzzed()
@given(data=st.data())
def test_a_number_in_bytes_is_taken_only_as_the_document_has_it(asking: Asking, data: st.DataObject) -> None:
    """Behind the JSON: any datatype, any bytes, any length that is claimed."""
    field = data.draw(st.sampled_from([name for name, datatype in INPUTS.items() if datatype != "BYTES"]))
    datatype = data.draw(st.sampled_from(DATATYPES))
    special = [struct.pack("<d", value) for value in (math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308, 2.0)]
    special += [struct.pack("<f", value) for value in (math.nan, math.inf, 2.0)] + [struct.pack("<q", 2)]
    behind = data.draw(st.sampled_from(special) | st.binary(max_size=24))
    size = data.draw(st.just(len(behind)) | st.integers(-1, 30))
    tensor = {"name": field, "datatype": datatype, "shape": [1], "parameters": {"binary_data_size": size}}
    content = json.dumps(_tensors(tensor)).encode()
    length = data.draw(st.just(str(len(content))) | TEXTS.filter(lambda text: text.isprintable() and text.isascii()))
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": length}
    path = next(place.path for place in asking.places if place.path.endswith("infer"))
    status, told_headers, answer = asking(path, content + behind, headers)
    assert status in (200, 400, 422), (field, datatype, behind, size, length, status)
    if status != 200:
        assert_refusal(path, told_headers, answer)


def test_the_server_has_noticed_no_fault_of_its_own(small: ServerProcess) -> None:
    """After all numbers of this module: no traceback, no error, no answer of the 500s in its log."""
    assert faults(small) == []

"""A body is read within bounds of size, time and memory, and in no other form than the documented ones."""

import asyncio
import functools
import gzip
import tracemalloc
import zlib
from collections.abc import Iterable

import pytest
from fastapi import Request
from starlette.types import Message

from latentac.serving import bodies
from latentac.serving.bodies import binary_of, body_of, json_of
from latentac.serving.refusals import Refused

MOST = 100_000
# The time of compression is part of gzip's header. Test names hold these bytes and must be equal in every worker.
zipped = functools.partial(gzip.compress, mtime=0)
JSON = b'{"prompt": "a"}'


def read(
    *parts: bytes, most: int = MOST, kind: str = "application/json", coding: str = "", more: bool = False
) -> bytes:
    """What is read of a body that arrives in these parts. more: its end never comes."""
    coming = iter([*({"type": "http.request", "body": part, "more_body": True} for part in parts)])

    async def receive() -> Message:
        try:
            return next(coming)
        except StopIteration:
            if more:
                await asyncio.sleep(60)
            return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"content-type", kind.encode("latin-1")), (b"content-encoding", coding.encode())]
    scope = {"type": "http", "method": "POST", "headers": [(name, value) for name, value in headers if value]}
    return asyncio.run(body_of(Request(scope, receive), most))


def refused(*parts: bytes, **options: object) -> tuple[int, str]:
    """Status and field of the refusal."""
    with pytest.raises(Refused) as caught:
        read(*parts, **options)  # type: ignore[arg-type]
    problem = caught.value.problem
    assert len(str(problem.value)) < 100, "an answer is no longer than its cause"
    return caught.value.status, problem.path


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/octet-stream"])
def test_the_documented_content_types_are_read(kind: str) -> None:
    assert read(JSON[:3], JSON[3:], kind=kind) == JSON


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "text/plain; application/json", "multipart/form-data", "application/x-www-form-urlencoded"],
)
def test_what_a_browser_sends_for_any_website_is_not_read(kind: str) -> None:
    """A form and a text need no question before; JSON does."""
    assert refused(JSON, kind=kind) == (415, "Content-Type")
    assert refused(JSON, kind=f"{kind}{'x' * 10_000}") == (415, "Content-Type")


def test_a_body_ends_at_its_bound() -> None:
    """Also where it comes in pieces; no piece after the bound is waited for."""
    assert len(read(b"x" * MOST)) == MOST
    assert refused(b"x" * (MOST + 1)) == (413, "body")
    assert refused(*[b"x" * 1000] * 101, more=True) == (413, "body")


def test_a_body_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    assert refused(JSON, more=True) == (408, "body")


def _deflated(parts: Iterable[bytes]) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(part) for part in parts), packer.flush()])


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "GZIP, identity"])
def test_a_compressed_body_is_read(coding: str) -> None:
    content = zlib.compress(JSON) if coding == "deflate" else zipped(JSON)
    assert read(content, coding=coding) == JSON


@pytest.mark.parametrize(
    ("content", "coding", "expected"),
    [
        (zipped(zipped(JSON)), "gzip, gzip", (415, "Content-Encoding")),
        (JSON, "br", (415, "Content-Encoding")),
        (JSON, "x" * 10_000, (415, "Content-Encoding")),
        (JSON, "gzip", (400, "body")),
        (b"", "gzip", (400, "body")),
        (zipped(JSON)[:-9], "gzip", (400, "body")),
        (zipped(JSON) + b"x", "gzip", (400, "body")),
        (zipped(b"x" * (MOST + 1)), "gzip", (413, "body")),
    ],
)
def test_what_is_no_compressed_body_is_refused(content: bytes, coding: str, expected: tuple[int, str]) -> None:
    assert refused(content, coding=coding) == expected


def test_a_body_that_grows_without_end_fills_no_memory() -> None:
    """200 MB in 200 kB, of which no more than the bound is made."""
    content = _deflated([bytes(2**20)] * 200)
    tracemalloc.start()
    try:
        assert refused(content, coding="deflate", most=1_000_000) == (413, "body")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", ["", "-1", "+1", "1.0", "x", "\u00b2", "\u0661", "16", "9" * 5000])
def test_the_length_of_the_json_is_a_number_within_the_body(length: str) -> None:
    """A short message, whatever was sent."""
    with pytest.raises(Refused) as caught:
        binary_of(JSON, 10, length)
    assert (caught.value.status, caught.value.problem.path) == (400, "Inference-Header-Content-Length")
    assert len(str(caught.value.problem.value)) < 100


def test_the_json_and_what_is_behind_it_are_parted() -> None:
    assert binary_of(JSON + b"abc", 10, str(len(JSON))) == ({"prompt": "a"}, b"abc")
    assert binary_of(JSON, 10, None) == (json_of(JSON, 10), b"")


@pytest.mark.parametrize("body", [b"", b"{", b"1e999", b"[1,2,3,4,5,6,7,8,9,10]"])
def test_what_is_no_json_within_the_bound_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        json_of(body, 10)
    assert caught.value.status == 400

"""The body of an HTTP request: within bounds of size and time, uncompressed, and read as JSON."""

import asyncio
import zlib
from typing import Any

from fastapi import Request as HTTPRequest

from latentac.config.schema import Limits
from latentac.serving.refusals import Refused
from latentac.serving.request import decoded, shortened
from latentac.system.errors import ConfigError, Problem

BODY_SECONDS = 30.0
"""A body that takes longer to arrive is refused."""
_USUAL_BYTES = 1_000_000
_CHARACTER_BYTES = 12  # of one in JSON, at most: two escapes
_KINDS = ("application/json", "application/octet-stream")
"""Content types of a body; the second is KServe's for JSON with binary tensors behind it."""
_CODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""Content-Encoding -> the window bits by which zlib knows the form."""


def most_bytes(limits: Limits) -> int:
    """Of a body, uncompressed: 1 MB, or as much as the prompts of a request may have, with room for their fields."""
    return max(_USUAL_BYTES, limits.max_images * (limits.max_prompt_characters * _CHARACTER_BYTES + 10_000))


async def body_of(http: HTTPRequest, most: int) -> bytes:
    """Uncompressed. Raises Refused where it has more than `most` bytes, does not arrive, or has a form that is not read
    here."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _KINDS:  # the others are what a browser sends for any website without asking this server
        problem = "is not read here" if kind else "is missing"
        raise Refused(415, Problem("Content-Type", shortened(kind), problem, f"Send JSON as {_KINDS[0]}."))
    coding = _coding(http.headers.get("content-encoding", ""))
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise _too_long(size, most)
    except TimeoutError:
        message = Problem("body", size, f"bytes have arrived after {BODY_SECONDS:g} s", "Send the body at once.")
        raise Refused(408, message) from None
    content = b"".join(parts)
    return _uncompressed(content, coding, most) if coding else content


def json_of(body: bytes, most: int) -> Any:
    """Raises Refused where it is no JSON, or has more than `most` values."""
    try:
        return decoded(body, most)
    except ConfigError as error:
        raise Refused(400, error.problems[0]) from None


def binary_of(body: bytes, most: int, length: str | None) -> tuple[Any, bytes]:
    """The JSON of a V2 body, and the binary data behind it. length: its header Inference-Header-Content-Length, the
    bytes of the JSON, which has at most `most` values; without it all is JSON. Raises Refused."""
    if length is None:
        return json_of(body, most), b""
    if not (length.isascii() and length.isdigit() and len(length) < 10 and int(length) <= len(body)):
        problem = f"is not a number of bytes up to {len(body)}, the body's length"
        raise Refused(
            400, Problem("Inference-Header-Content-Length", shortened(length), problem, "Give the length of the JSON.")
        )
    return json_of(body[: int(length)], most), body[int(length) :]


def _coding(header: str) -> str:
    """One that is known, or nothing. Raises Refused."""
    codings = [name for part in header.split(",") if (name := part.strip().lower()) not in ("", "identity")]
    if len(codings) > 1 or (codings and codings[0] not in _CODINGS):
        known = ", ".join(_CODINGS)
        remedy = f"Send it as it is, or use one of {known}."
        raise Refused(415, Problem("Content-Encoding", shortened(header), "is not read here", remedy))
    return codings[0] if codings else ""


def _uncompressed(content: bytes, coding: str, most: int) -> bytes:
    """Never more than a body may have, whatever is behind it. Raises Refused."""
    reader = zlib.decompressobj(_CODINGS[coding])
    try:
        found = reader.decompress(content, most + 1)
    except zlib.error as error:
        raise _damaged(coding, f"is no {coding}: {error}") from None
    if len(found) > most:
        raise _too_long(len(found), most)
    if not reader.eof:
        raise _damaged(coding, "ends before its compressed data do")
    if reader.unused_data:
        raise _damaged(coding, "goes on after its compressed data")
    return found


def _too_long(size: int, most: int) -> Refused:
    return Refused(413, Problem("body", size, "bytes and more are too many", f"Send at most {most}."))


def _damaged(coding: str, problem: str) -> Refused:
    return Refused(400, Problem("body", coding, problem, "Compress it once, and send all of it."))

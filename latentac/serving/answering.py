"""How a request for images is read, validated, logged, and answered, in every protocol.

FastAPI validates a body by the type of its handler's argument `body`. The body is read here, because FastAPI bounds
neither its size nor its time, and takes numbers that JSON does not have.
"""

import asyncio
import functools
import inspect
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from latentac.config.sections import Section
from latentac.serving import observing
from latentac.serving.batching import Busy
from latentac.serving.bodies import binary_of, body_of, most_bytes
from latentac.serving.model import SteeredDiffusion, TooLong
from latentac.serving.observing import Record
from latentac.serving.refusals import Refused, refusal, unknown
from latentac.serving.request import most_values, problems_of
from latentac.serving.tensors import BINARY_HEADER
from latentac.system.errors import ConfigError, Problem

_log = logging.getLogger(__name__)

_PLACES = {"model": "model_name", "version": "model_version"}
"""What an address names -> its part of the path."""

Handler = Callable[..., Awaitable[Response]]


class _Gone(Exception):
    """The caller closed the connection."""


class Read(HTTPRequest):
    """A request whose body has been read: its JSON, and the bytes behind it. record: what is logged of it."""

    def __init__(self, http: HTTPRequest, content: Any, binary: bytes, record: Record) -> None:
        others = [(name, value) for name, value in http.scope["headers"] if name != b"content-type"]
        super().__init__({**http.scope, "headers": [*others, (b"content-type", b"application/json")]}, http.receive)
        self._content, self.binary, self.record = content, binary, record

    async def body(self) -> bytes:
        return b"read"

    async def json(self) -> Any:
        return self._content


class Answering:
    """Routes that read, validate, and answer requests for images of one model. prompts: whether they are logged."""

    def __init__(self, model: SteeredDiffusion, *, prompts: bool) -> None:
        self._model, self._prompts = model, prompts

    def add(self, app: FastAPI, path: str, protocol: str, handler: Handler, form: type[Section]) -> None:
        """A route to `handler`, whose argument `body` is a `form`. Errors are answered in the form of `protocol`."""
        answered = self._answered

        class Route(APIRoute):
            def get_route_handler(self) -> Callable[[HTTPRequest], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()

                async def checked(read: HTTPRequest) -> Response:
                    try:
                        return await handle(read)
                    except RequestValidationError as error:
                        details = [{**each, "loc": each["loc"][1:]} for each in error.errors()]  # without "body"
                        raise ConfigError(problems_of(details, form)) from None

                return functools.partial(answered, protocol, checked)

        app.router.add_api_route(path, _taking(handler, form), methods=["POST"], route_class_override=Route)

    async def _answered(self, protocol: str, handle: Handler, http: HTTPRequest) -> Response:
        """The response of `handle` to the body that was read, or an error answer; both are logged."""
        record = Record(protocol, _request_id(http), self._prompts)
        observing.CURRENT.set(record)
        status = 499
        try:
            exported = self._model.generator.exported
            for what, served in (("model", self._model.name), ("version", exported.version)):
                name = str(http.path_params.get(_PLACES[what], served))
                if name != served:
                    raise unknown(what, name, served)
            content = await body_of(http, most_bytes(exported.limits))
            length = http.headers.get(BINARY_HEADER) if protocol == "v2" else None
            read = Read(http, *binary_of(content, most_values(exported.limits), length), record)
            response = await _unless_gone(http, handle(read))
            status = response.status_code
        except (_Gone, ClientDisconnect):  # the second before the whole body had come
            response = Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - every failure is an answer
            response = refusal_of(error, openai=protocol == "openai")
            status = response.status_code
        finally:
            if protocol != "stream" or status != 200:  # a stream that has begun reports its own end
                record.answered(status)
        response.headers["X-Request-Id"] = record.id
        return response


def _taking(handler: Handler, form: type[Section]) -> Handler:
    """`handler` with the type `form` for its argument `body`, for FastAPI to validate and to document."""

    @functools.wraps(handler)
    async def take(**given: Any) -> Response:
        return await handler(**given)

    declared = inspect.signature(handler).parameters.values()
    parameters = [one.replace(annotation=form) if one.name == "body" else one for one in declared]
    take.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return take


async def _unless_gone(http: HTTPRequest, work: Awaitable[Response]) -> Response:
    """The result of `work`, which is cancelled if the caller goes away. Raises _Gone then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Gone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def refusal_of(error: Exception, *, openai: bool = False) -> JSONResponse:
    """The answer to a request that failed with `error`."""
    headers: dict[str, str] = {}
    match error:
        case ConfigError():
            status, problems = 422, list(error.problems)
        case Refused():
            status, problems = error.status, [error.problem]
        case Busy():
            status, headers = 429, {"Retry-After": str(error.seconds)}
            remedy = f"Ask again in {error.seconds} s."
            problems = [Problem("queue", error.queued, "images wait already, and there is no room for more", remedy)]
        case TooLong():
            status, headers = 503, {"Retry-After": "10"}
            problems = [Problem("request", None, str(error), "Ask for less, or later.")]
        case _:
            _log.error("a request failed", exc_info=error)
            status, problems = 500, [Problem("request", None, "the server failed", "Look at its log.")]
    return refusal(status, problems, headers, openai=openai)


def _request_id(http: HTTPRequest) -> str:
    """The caller's, if it is one that may stand in a header and a log; else a new one."""
    given = http.headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex

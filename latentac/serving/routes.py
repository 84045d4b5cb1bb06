"""The endpoint's own routes: KServe's two ways to ask for pictures, OpenAI's, a stream, and the page that uses it."""

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from latentac.serving import observing
from latentac.serving.batching import Busy, Job
from latentac.serving.bodies import binary_of, body_of, json_of, most_bytes
from latentac.serving.model import SteeredDiffusion, TooLong
from latentac.serving.observing import Record
from latentac.serving.options import options_of
from latentac.serving.refusals import Refused, refusal, unknown
from latentac.serving.request import Request, most_values, validated
from latentac.serving.tensors import BINARY_HEADER, infer_request
from latentac.system.errors import ConfigError, Problem

_ALIVE_SECONDS = 15.0
_PAGE = {"page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_log = logging.getLogger(__name__)

Handle = Callable[[Any, Record], Awaitable[Response]]

_Last = tuple[int, str, dict[str, Any]]
"""Status, name and content of a stream's last event."""


class _Gone(Exception):
    """The caller closed the connection."""


class _Stream(StreamingResponse):
    """Server-sent events: `first`, a "step" for each of `steps` while `drawing` goes on, and its result.

    answered: is told the status at the end: of the result, or 499 where the caller left before it, be it before the
    first event. Nothing is drawn any more then.
    """

    def __init__(
        self,
        first: str,
        drawing: asyncio.Future[_Last],
        steps: asyncio.Queue[dict[str, Any]],
        answered: Callable[[int], None],
    ) -> None:
        super().__init__(self._events(first), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._drawing, self._steps, self._answered = drawing, steps, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            left = self._drawing.cancel() or self._drawing.cancelled()
            self._answered(499 if left else self._drawing.result()[0])

    async def _events(self, first: str) -> AsyncIterator[str]:
        yield first
        while not (self._drawing.done() and self._steps.empty()):
            told = asyncio.ensure_future(self._steps.get())
            either: set[asyncio.Future[Any]] = {told, self._drawing}
            try:
                await asyncio.wait(either, timeout=_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if told.done():
                    yield _event("step", told.result())
                elif told.cancel() and not self._drawing.done():
                    yield ": alive\n\n"
            finally:
                told.cancel()  # the caller may have left while it waited
        _, name, content = self._drawing.result()
        yield _event(name, content)


class Routes:
    """Handlers over one model. prompts: whether they are logged."""

    def __init__(self, model: SteeredDiffusion, *, prompts: bool) -> None:
        self._model, self._prompts = model, prompts

    def register(self, app: FastAPI) -> None:
        """Add the routes."""
        app.add_api_route("/", self.page, methods=["GET"], include_in_schema=False)
        app.add_api_route("/page/{name}", self.part, methods=["GET"], include_in_schema=False)
        app.add_api_route("/v1/images/options", self.options, methods=["GET"])
        app.add_api_route("/v1/images/generations", self.images, methods=["POST"])
        app.add_api_route("/v1/images/stream", self.stream, methods=["POST"])
        app.add_api_route("/v1/models/{model_name}:predict", self.predict, methods=["POST"])
        app.add_api_route("/v2/models/{model_name}/infer", self.infer, methods=["POST"])
        app.add_api_route(
            "/v2/models/{model_name}/versions/{model_version}/infer", self.infer_version, methods=["POST"]
        )

    async def page(self, request: HTTPRequest) -> Response:
        """What a person sees; a program that does not ask for HTML is KServe's V1 client, which asks whether this
        server lives."""
        if "text/html" in request.headers.get("accept", ""):
            return _file("index.html", "text/html")
        return JSONResponse({"status": "alive"}, headers={"Vary": "Accept"})

    async def part(self, name: str) -> Response:
        """What the page loads."""
        if name not in _PAGE:
            raise HTTPException(404)
        return _file(name, _PAGE[name])

    async def options(self) -> Response:
        """What may be asked for, with the defaults."""
        return JSONResponse(options_of(self._model))

    async def predict(self, model_name: str, request: HTTPRequest) -> Response:
        """KServe's V1 protocol."""

        async def handle(body: Any, record: Record) -> Response:
            answer, _ = await self._model(body)
            return JSONResponse(answer)

        return await self._answered(request, "v1", handle, model_name)

    async def infer(self, model_name: str, request: HTTPRequest) -> Response:
        """KServe's V2 protocol, with the tensors' data in the JSON or as bytes behind it."""
        return await self._inferred(request, model_name)

    async def infer_version(self, model_name: str, model_version: str, request: HTTPRequest) -> Response:
        """The same, of one version: there is no other than that which is served."""
        return await self._inferred(request, model_name, model_version)

    async def _inferred(self, request: HTTPRequest, name: str, version: str | None = None) -> Response:
        async def handle(body: tuple[Any, bytes], record: Record) -> Response:
            served = self._model.generator.exported.version
            if version not in (None, served):
                raise unknown("version", version or "", served)
            answer, _ = await self._model(infer_request(body[0], self._model.name, body[1]))
            content, length = answer.to_rest()
            if length is None:
                return JSONResponse(content)
            return Response(content, headers={BINARY_HEADER: str(length)}, media_type="application/octet-stream")

        length = request.headers.get(BINARY_HEADER)
        return await self._answered(request, "v2", handle, name, read=lambda body, most: binary_of(body, most, length))

    async def images(self, request: HTTPRequest) -> Response:
        """OpenAI's `images/generations`."""

        async def handle(body: Any, record: Record) -> Response:
            asked = validated(self._model.generator.forms.images, body)
            if asked.model not in (None, self._model.name):
                raise unknown("model", asked.model or "", self._model.name)
            self._model.generator.check([("prompt", asked)])
            [prediction] = await self._model.finish([asked], self._model.submit([asked]))
            told = {name: value for name, value in prediction.items() if name != "images"}
            data = [{"b64_json": image} for image in prediction["images"]]
            form = {"background": "opaque", "output_format": "png", "size": self._model.generator.exported.size_name}
            return JSONResponse({"created": int(time.time()), **form, "data": data, "latentac": told})

        return await self._answered(request, "openai", handle)

    async def stream(self, request: HTTPRequest) -> Response:
        """One request's pictures, and the critic's values while they are drawn, as server-sent events."""

        async def handle(body: Any, record: Record) -> Response:
            asked = validated(self._model.generator.forms.request, body)
            self._model.generator.check([("prompt", asked)])
            loop, steps = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()

            def tell(index: int, step: int, values: np.ndarray) -> None:
                event = self._step(asked, index, step, values)
                with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
                    loop.call_soon_threadsafe(steps.put_nowait, event)

            jobs = self._model.submit([asked], tell)
            drawing = asyncio.ensure_future(self._finished(asked, jobs))
            queued = _event("queued", {"id": record.id, "ahead": jobs[0].ahead})
            return _Stream(queued, drawing, steps, record.answered)

        return await self._answered(request, "stream", handle)

    async def _finished(self, asked: Request, jobs: Sequence[Job]) -> _Last:
        """What the last event says."""
        try:
            [prediction] = await self._model.finish([asked], jobs)
        except Exception as error:  # noqa: BLE001 - the stream has begun: its last event says what went wrong
            refusal = _refusal(error)
            return refusal.status_code, "error", json.loads(bytes(refusal.body))
        return 200, "picture", prediction

    def _step(self, asked: Request, index: int, step: int, values: np.ndarray) -> dict[str, Any]:
        """Of the particles the one that the weights prefer. values: [N, M]."""
        slot, critic = self._model.generator.slots(asked)[index], self._model.generator.critic
        best = int((values @ (np.array(slot.weights) / critic.std.cpu().numpy())).argmax())
        told = {name: [float(value)] for name, value in zip(critic.reward_names, values[best], strict=True)}
        return {"step": step, "num_steps": slot.kind.num_steps, "pictures": [index], "values": told}

    async def _answered(
        self,
        http: HTTPRequest,
        protocol: str,
        handle: Handle,
        name: str = "",
        read: Callable[[bytes, int], Any] = json_of,
    ) -> Response:
        """The response of `handle` to what is read in the request's body, or a refusal; told to the operator."""
        record = Record(protocol, _request_id(http), self._prompts)
        observing.CURRENT.set(record)
        status = 499
        try:
            if name and name != self._model.name:
                raise unknown("model", name, self._model.name)
            limits = self._model.generator.exported.limits
            body = read(await body_of(http, most_bytes(limits)), most_values(limits))
            response = await _unless_gone(http, handle(body, record))
            status = response.status_code
        except (_Gone, ClientDisconnect):  # the second before the whole body had come
            response = Response(status_code=499)
        except Exception as error:  # noqa: BLE001 - every failure is an answer
            response = _refusal(error, openai=protocol == "openai")
            status = response.status_code
        finally:
            if protocol != "stream" or status != 200:  # a stream that has begun tells its own end
                record.answered(status)
        response.headers["X-Request-Id"] = record.id
        return response


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


def _refusal(error: Exception, *, openai: bool = False) -> JSONResponse:
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
            problems = [Problem("queue", error.queued, "pictures wait already, and there is no room for more", remedy)]
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


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"


def _file(name: str, kind: str) -> Response:
    content = (files("latentac.serving") / "page" / name).read_bytes()
    return Response(content, headers=_HEADERS, media_type=f"{kind}; charset=utf-8")

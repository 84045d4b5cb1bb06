"""The endpoint's own routes: KServe's two ways to ask for images, OpenAI's, a stream, and the page that uses it."""

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from latentac.serving.answering import Answering, Read, refusal_of
from latentac.serving.batching import Job
from latentac.serving.model import SteeredDiffusion
from latentac.serving.openai import ImagesRequest
from latentac.serving.options import options_of
from latentac.serving.refusals import unknown
from latentac.serving.request import Body, Request
from latentac.serving.tensors import BINARY_HEADER, InferenceRequest, infer_request

_ALIVE_SECONDS = 15.0
_PAGE = {"page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_Last = tuple[int, str, dict[str, Any]]
"""Status, name and content of a stream's last event."""


class _Stream(StreamingResponse):
    """Server-sent events: `first`, a "step" for each of `steps` while `drawing` goes on, and its result.

    answered: is called with the status at the end: of the result, or 499 where the caller left before it, even before
    the first event. Nothing is drawn any more then.
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
            step = asyncio.ensure_future(self._steps.get())
            either: set[asyncio.Future[Any]] = {step, self._drawing}
            try:
                await asyncio.wait(either, timeout=_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if step.done():
                    yield _event("step", step.result())
                elif step.cancel() and not self._drawing.done():
                    yield ": alive\n\n"
            finally:
                step.cancel()  # the caller may have left while it waited
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
        answering, forms = Answering(self._model, prompts=self._prompts), self._model.generator.forms
        version = "/v2/models/{model_name}/versions/{model_version}/infer"
        for path, protocol, handler, form in (
            ("/v1/images/generations", "openai", self.images, forms.images),
            ("/v1/images/stream", "stream", self.stream, forms.request),
            ("/v1/models/{model_name}:predict", "v1", self.predict, forms.body),
            ("/v2/models/{model_name}/infer", "v2", self.infer, InferenceRequest),
            (version, "v2", self.infer_version, InferenceRequest),
        ):
            answering.add(app, path, protocol, handler, form)

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
        return Response(self._options, media_type="application/json")

    @functools.cached_property
    def _options(self) -> bytes:
        """The same for each request: a model does not change while it is served."""
        return bytes(JSONResponse(options_of(self._model)).body)

    async def predict(self, body: Body, model_name: str) -> Response:
        """KServe's V1 protocol."""
        answer, _ = await self._model(body)
        return JSONResponse(answer)

    async def infer(self, body: InferenceRequest, request: Read, model_name: str) -> Response:
        """KServe's V2 protocol, with the tensors' data in the JSON or as bytes behind it."""
        answer, _ = await self._model(infer_request(body, self._model.name, request.binary))
        content, length = answer.to_rest()
        if length is None:
            return JSONResponse(content)
        return Response(content, headers={BINARY_HEADER: str(length)}, media_type="application/octet-stream")

    async def infer_version(
        self, body: InferenceRequest, request: Read, model_name: str, model_version: str
    ) -> Response:
        """The same, of one version: there is no other than that which is served."""
        return await self.infer(body, request, model_name)

    async def images(self, body: ImagesRequest) -> Response:
        """OpenAI's `images/generations`."""
        if body.model not in (None, self._model.name):
            raise unknown("model", body.model or "", self._model.name)
        self._model.generator.check([("prompt", body)])
        [prediction] = await self._model.finish([body], self._model.submit([body]))
        answer = {name: value for name, value in prediction.items() if name != "images"}
        data = [{"b64_json": image} for image in prediction["images"]]
        form = {"background": "opaque", "output_format": "png", "size": self._model.generator.exported.size_name}
        return JSONResponse({"created": int(time.time()), **form, "data": data, "latentac": answer})

    async def stream(self, body: Request, request: Read) -> Response:
        """One request's images, and the critic's values while they are drawn, as server-sent events."""
        self._model.generator.check([("prompt", body)])
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()

        def callback(index: int, step: int, values: np.ndarray) -> None:
            event = self._step(body, index, step, values)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
                loop.call_soon_threadsafe(steps.put_nowait, event)

        jobs = self._model.submit([body], callback)
        drawing = asyncio.ensure_future(self._finished(body, jobs))
        queued = _event("queued", {"id": request.record.id, "ahead": jobs[0].ahead})
        return _Stream(queued, drawing, steps, request.record.answered)

    async def _finished(self, asked: Request, jobs: Sequence[Job]) -> _Last:
        """What the last event says."""
        try:
            [prediction] = await self._model.finish([asked], jobs)
        except Exception as error:  # noqa: BLE001 - the stream has begun: its last event says what went wrong
            refusal = refusal_of(error)
            return refusal.status_code, "error", json.loads(bytes(refusal.body))
        return 200, "image", prediction

    def _step(self, asked: Request, index: int, step: int, values: np.ndarray) -> dict[str, Any]:
        """Of the particles the one that the weights prefer. values: [N, M]."""
        slot, critic = self._model.generator.slots(asked)[index], self._model.generator.critic
        best = int((values @ (np.array(slot.weights) / critic.std.cpu().numpy())).argmax())
        answer = {name: [float(value)] for name, value in zip(critic.reward_names, values[best], strict=True)}
        return {"step": step, "num_steps": slot.kind.num_steps, "images": [index], "values": answer}


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"


def _file(name: str, kind: str) -> Response:
    content = (files("latentac.serving") / "page" / name).read_bytes()
    return Response(content, headers=_HEADERS, media_type=f"{kind}; charset=utf-8")

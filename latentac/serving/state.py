"""What is asked about the served model without an image: is it ready, which is it, what does it take. In the forms of
KServe's protocols and OpenAI's, and for what asks with HEAD or a slash too many."""

import difflib
import re
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from fastapi.routing import APIRoute
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.rest.server import metrics_handler
from kserve.protocol.rest.v1_endpoints import V1Endpoints
from kserve.protocol.rest.v2_datamodels import (
    ListModelsResponse,
    ModelMetadataResponse,
    ModelReadyResponse,
    ServerLiveResponse,
    ServerMetadataResponse,
    ServerReadyResponse,
)
from kserve.protocol.rest.v2_endpoints import V2Endpoints
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from latentac.config.sections import Section
from latentac.serving.exported import Exported
from latentac.serving.refusals import is_openai, refusal, unknown
from latentac.serving.request import shortened
from latentac.serving.tensors import EXTENSIONS
from latentac.system.errors import Problem


class ModelState(Section):
    """Of the served model, in KServe's V1 form (`name`, `ready`) and OpenAI's (the others) at once: each client reads
    its own fields. created: when the model was exported, in seconds since 1970."""

    name: str
    ready: bool
    id: str
    object: str = "model"
    created: int
    owned_by: str = "latentac"


class ModelsState(Section):
    """All served models, in KServe's V1 form (`models`) and OpenAI's (`object`, `data`) at once."""

    models: list[str]
    object: str = "list"
    data: list[ModelState]


class State:
    """Handlers over KServe's own, for the model `name`. created: when it was exported, in seconds since 1970."""

    def __init__(self, dataplane: DataPlane, name: str, exported: Exported, created: int) -> None:
        self._first, self._second = V1Endpoints(dataplane), V2Endpoints(dataplane)
        self._name, self._version, self._created = name, exported.version, created

    def register(self, app: FastAPI) -> None:
        """Of KServe's routes those about the model's state; those that ask for images are in `routes`. This server
        explains nothing, has no versions beside each other, and lets nobody load or unload."""
        # KServe's actions stand behind a colon, which the route of a model would take for a part of its name.
        app.add_route("/v1/models/{model_name}:{action}", _action, methods=_OTHER_METHODS)
        second, model = self._second, "/v2/models/{model_name}"
        version = f"{model}/versions/{{model_version}}"
        for path, handler, form in (
            ("/v1/models", self.models, ModelsState),
            ("/v1/models/{model_name}", self.model, ModelState),
            ("/v2", self.server, ServerMetadataResponse),
            ("/v2/health/live", second.live, ServerLiveResponse),
            ("/v2/health/ready", second.ready, ServerReadyResponse),
            ("/v2/models", second.models, ListModelsResponse),
            (model, self.metadata, ModelMetadataResponse),
            (version, self.metadata_of_version, ModelMetadataResponse),
            (f"{model}/ready", self.ready, ModelReadyResponse),
            (f"{version}/ready", self.ready_of_version, ModelReadyResponse),
        ):
            app.add_api_route(path, handler, methods=["GET"], response_model=form)
        app.add_api_route("/metrics", metrics_handler, methods=["GET"])
        app.add_exception_handler(404, _not_here)
        app.add_exception_handler(405, _not_here)
        app.add_middleware(PlainAddresses)

    async def models(self) -> Any:
        """The served models, for KServe's V1 clients and OpenAI's."""
        names = (await self._first.models())["models"]
        return {"models": names, "data": [await self.model(name) for name in names]}

    async def model(self, model_name: str) -> Any:
        """One model and whether it is ready, for KServe's V1 clients and OpenAI's."""
        if other := self._other(model_name, openai=True):
            return other
        answer = await self._first.model_ready(model_name)
        return {**answer, "id": model_name, "created": self._created}

    async def server(self) -> Any:
        """This server, with the extensions of the V2 protocol that it has: not KServe's own, to load and unload."""
        answer: ServerMetadataResponse = await self._second.metadata()
        return answer.model_copy(update={"extensions": EXTENSIONS})

    async def metadata(self, model_name: str) -> Any:
        """The model's inputs and outputs, and its one version."""
        if other := self._other(model_name):
            return other
        answer: ModelMetadataResponse = await self._second.model_metadata(model_name)
        return answer.model_copy(update={"versions": [self._version]})

    async def metadata_of_version(self, model_name: str, model_version: str) -> Any:
        """The same, where the version is the one that is served."""
        return self._other(model_name, model_version) or await self.metadata(model_name)

    async def ready(self, model_name: str) -> Any:
        """Whether the model draws."""
        return self._other(model_name) or await self._second.model_ready(model_name)

    async def ready_of_version(self, model_name: str, model_version: str) -> Any:
        """The same, where the version is the one that is served."""
        return self._other(model_name, model_version) or await self.ready(model_name)

    def _other(self, name: str, version: str | None = None, *, openai: bool = False) -> Response | None:
        """The refusal of a model or a version that is not the one that is served; None for that one."""
        if name != self._name:
            return refusal(404, [unknown("model", name, self._name).problem], openai=openai)
        if version not in (None, self._version):
            return refusal(404, [unknown("version", version or "", self._version).problem])
        return None


class PlainAddresses:
    """HEAD is answered as GET is, of which the server sends the head alone; slashes too many mean nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":  # a copy: the server reads its own, to send no body where HEAD was asked
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "method": method, "path": re.sub("//+", "/", scope["path"]).rstrip("/") or "/"}
        await self._app(scope, receive, send)


_OTHER_METHODS = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "POST"]


async def _action(request: HTTPRequest) -> Response:
    """An action of V1 that is not this server's, or predict asked for with another method than POST."""
    if request.path_params["action"] == "predict":
        raise HTTPException(405, headers={"Allow": "POST"})
    raise HTTPException(404)


async def _not_here(request: HTTPRequest, error: Any) -> Response:
    """No such address, or no such method of it; with the address that is like it, if there is one."""
    known = sorted({route.path for route in request.app.routes if isinstance(route, APIRoute)})
    close = difflib.get_close_matches(request.url.path, known, n=1)
    remedy = f"Did you mean {close[0]}? " if error.status_code == 404 and close else ""
    allowed = (error.headers or {}).get("Allow", "")
    fault = "is not an address of this server" if error.status_code == 404 else f"is asked with {allowed}"
    problem = Problem("address", shortened(request.url.path), fault, f"{remedy}GET /openapi.json lists all.")
    return refusal(error.status_code, [problem], error.headers, openai=is_openai(request.url.path))

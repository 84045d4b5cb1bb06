"""The web application of a served model: its routes, its document, and who may ask."""

from fastapi import FastAPI
from kserve import errors
from kserve.protocol.dataplane import DataPlane
from starlette.middleware.cors import CORSMiddleware

from latentac.serving import openapi
from latentac.serving.access import Access
from latentac.serving.admission import Admission
from latentac.serving.model import SteeredDiffusion
from latentac.serving.routes import Routes
from latentac.serving.state import State

_KSERVE_ERRORS = {
    errors.ModelNotFound: errors.model_not_found_handler,
    errors.ModelNotReady: errors.model_not_ready_handler,
    errors.ServerNotLive: errors.server_not_live_handler,
    errors.ServerNotReady: errors.server_not_ready_handler,
    Exception: errors.generic_exception_handler,
}
"""What KServe's data plane raises about the state of a model -> KServe's answer to it."""


def application(
    dataplane: DataPlane, model: SteeredDiffusion, created: int, access: Access, *, log_prompts: bool
) -> FastAPI:
    """The application of a loaded model. created: when it was exported, in seconds since 1970."""
    generator = model.generator
    app = FastAPI(docs_url=None, redoc_url=None)
    Routes(model, prompts=log_prompts).register(app)
    State(dataplane, model.name, generator.exported, created).register(app)
    document = openapi.document(app, model.name, generator.exported.version)
    app.openapi = lambda: document  # type: ignore[method-assign]
    app.add_middleware(Admission, access=access)
    if access.origins:  # a browser asks before it sends JSON for another website
        methods, named = ["GET", "POST"], ["Content-Type", "Authorization", "X-Request-Id"]
        app.add_middleware(
            CORSMiddleware, allow_origins=list(access.origins), allow_methods=methods, allow_headers=named
        )
    for kind, handler in _KSERVE_ERRORS.items():
        app.add_exception_handler(kind, handler)
    return app

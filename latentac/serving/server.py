"""One process that serves one exported model through KServe's ModelServer, on loopback unless told otherwise."""

import asyncio
import errno
import json
import logging
import os
import shlex
import signal
import socket
import sys
import warnings
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from latentac.serving.access import Access, access
from latentac.system.errors import ResourceError

if TYPE_CHECKING:
    from latentac.serving.exported import Exported

NAME = "latentac"
HOST = "127.0.0.1"
PORT = 8080
GRACE_SECONDS = 600
"""How long accepted requests may take after SIGTERM. Whoever stops the server sets the tighter limit, with SIGKILL."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that nothing can connect before the model is loaded.

    port 0 takes a free one. Raises ResourceError if the address cannot be had.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        # A port that a stopped server left in TIME_WAIT is free; one that somebody listens on is still refused.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise _refused(f"{host}:{port}", error) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """http://host:port of a bound socket; an IPv6 host in brackets."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    folder: Path,
    port: int = PORT,
    *,
    host: str = HOST,
    name: str = NAME,
    device: str = "auto",
    log_prompts: bool = False,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    token_file: Path | None = None,
) -> None:
    """Serve an exported folder to a person, until Ctrl-C or SIGTERM; tells its address and an example on stdout.

    hosts, origins, token_file: who may ask (`latentac.serving.guard`). Raises ResourceError if the port is taken and
    ConfigError for what cannot be allowed, before anything is loaded, and ServingError if `folder` cannot be served.
    """
    with bind(host, port) as listener:
        allowed = access(host, hosts, origins, token_file)
        serve_on(listener, folder, name, device, told=True, log_prompts=log_prompts, allowed=allowed)


def serve_on(
    listener: socket.socket,
    folder: Path,
    name: str,
    device: str,
    *,
    told: bool = False,
    log_prompts: bool = False,
    allowed: Access | None = None,
) -> None:
    """Load the model, listen on the bound `listener`, and serve until SIGTERM, SIGINT or SIGQUIT; requests that were
    accepted by then are answered. log_prompts: they stand in the request log, which otherwise leaves them out.
    allowed: who may ask, by default whoever reaches the server by a loopback name."""
    from latentac.serving import exported  # imports pydantic: after the port is known to be free

    described = exported.read(folder)
    # Imported late: torch and kserve take seconds, and kserve parses the command line anew, by its own rules.
    sys.argv = sys.argv[:1]
    from fastapi import FastAPI
    from kserve.model_server import ModelServer
    from starlette.middleware.cors import CORSMiddleware

    from latentac.serving import connections, observing, openapi
    from latentac.serving.guard import Guard
    from latentac.serving.model import SteeredDiffusion
    from latentac.serving.routes import Routes
    from latentac.serving.state import State

    class LoopbackServer(ModelServer):
        """ModelServer listens on every address of the machine; this one on the socket that it is given. And it offers
        what its OpenAPI document says, no more."""

        def register_signal_handler(self) -> None:
            """ModelServer's own handlers lose a signal that comes before uvicorn has put its in their place."""
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, self._rest_server._server.handle_exit)

        async def _serve(self) -> None:
            rest, generator = self._rest_server, model.generator
            rest._server.serve = partial(rest._server.serve, sockets=[listener])

            def register(app: FastAPI) -> None:
                Routes(model, prompts=log_prompts).register(app)
                written = int((folder / exported.FILE).stat().st_mtime)
                State(self.dataplane, name, generator.exported, written).register(app)
                document = openapi.document(app, generator.forms, name, generator.exported.version)
                app.openapi = lambda: document  # type: ignore[method-assign]
                may = allowed or Access()
                app.add_middleware(Guard, access=may)
                if may.origins:  # a browser asks before it sends JSON for another website
                    methods, named = ["GET", "POST"], ["Content-Type", "Authorization", "X-Request-Id"]
                    app.add_middleware(
                        CORSMiddleware, allow_origins=list(may.origins), allow_methods=methods, allow_headers=named
                    )

            rest._register_endpoints = register
            connections.bound(rest.config)
            watching = asyncio.ensure_future(connections.watch(rest._server))
            try:
                await super()._serve()
            finally:
                watching.cancel()

    _log_plainly()
    observing.log_requests()
    model = SteeredDiffusion(name, folder, device)
    model.load()
    server = LoopbackServer(workers=1, enable_grpc=False, enable_latency_logging=False, grace_period=GRACE_SECONDS)
    _listen(listener)
    if told:
        print(_example(address_of(listener), name, described), file=sys.stdout, flush=True)
    server.start([model])
    model.close()


def _listen(listener: socket.socket) -> None:
    try:
        listener.listen()
    except OSError as error:  # somebody else bound it too, and was faster
        raise _refused(address_of(listener), error) from error


def _refused(address: str, error: OSError) -> ResourceError:
    if error.errno == errno.EADDRINUSE:
        return ResourceError(address, "the port is in use", "Stop what listens there, or choose another port.")
    reason = error.strerror or os.strerror(error.errno or 0)
    return ResourceError(address, f"cannot be listened on: {reason}", "Choose another host or port.")


def _example(address: str, name: str, described: "Exported") -> str:
    prompt = described.examples[0] if described.examples else "a picture"
    body = shlex.quote(json.dumps({"instances": [{"prompt": prompt, "seed": 1}]}, ensure_ascii=False))
    notice = f"{described.notice}\n" if described.notice else ""
    decode = "import base64, json, sys; p = json.load(sys.stdin)['predictions'][0]; "
    decode += "open('picture.png', 'wb').write(base64.b64decode(p['images'][0]))"
    return (
        f"{notice}Serving {name} at {address} (a page in a browser; Ctrl-C stops it). A picture:\n"
        f"  curl -s {address}/v1/models/{name}:predict -H 'Content-Type: application/json' \\\n"
        f'    -d {body} \\\n    | python3 -c "{decode}"'
    )


def _log_plainly() -> None:
    """Warnings and errors on stderr, one line each; no line a request, and no traceback for a caller's mistake."""
    import transformers

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers = [handler]
    kserve_logger = logging.getLogger("kserve")  # has a handler of its own, or ModelServer installs noisier ones
    kserve_logger.handlers, kserve_logger.propagate = [handler], False
    kserve_logger.setLevel(logging.WARNING)
    kserve_logger.addFilter(_is_ours)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")  # kserve's own, with every answer


def _is_ours(record: logging.LogRecord) -> bool:
    """False for the traceback that kserve logs when it answers 4xx or 501: the caller has been told."""
    from kserve import errors

    mistakes = (errors.InvalidInput, errors.ModelNotFound, errors.UnsupportedProtocol, NotImplementedError)
    return not (record.exc_info and isinstance(record.exc_info[1], mistakes))

"""One process that serves one exported model through KServe's ModelServer, on loopback by default."""

import asyncio
import errno
import json
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Collection
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
    base: Path | None = None,
    log_prompts: bool = False,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    token_file: Path | None = None,
) -> None:
    """Serve an exported folder to a person, until Ctrl-C or SIGTERM; prints its address and an example on stdout.

    base: folder with the base of an adapter, by default `base/` in `folder`.
    hosts, origins, token_file: who may ask (`latentac.serving.admission`). Raises ResourceError if the port is taken
    and ConfigError for what cannot be allowed, before anything is loaded, and ServingError if `folder` cannot be
    served.
    """
    with bind(host, port) as listener:
        allowed = access(host, hosts, origins, token_file)
        serve_on(listener, folder, name, device, base=base, announce=True, log_prompts=log_prompts, allowed=allowed)


def serve_on(
    listener: socket.socket,
    folder: Path,
    name: str,
    device: str,
    *,
    base: Path | None = None,
    announce: bool = False,
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
    import uvicorn
    from kserve import ModelServer

    from latentac.serving import connections, observing
    from latentac.serving.application import application
    from latentac.serving.model import SteeredDiffusion

    class LoopbackServer(ModelServer):
        """ModelServer listens on every address of the machine, with every route that KServe knows. This one listens on
        the socket that it is given, and offers what its OpenAPI document says."""

        def start(self, models: list[SteeredDiffusion]) -> None:
            for each in models:
                self.register_model(each)
            written = int((folder / exported.FILE).stat().st_mtime)
            may = allowed or Access()
            app = application(self.dataplane, model, written, may, log_prompts=log_prompts)
            config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=GRACE_SECONDS)
            connections.bound(config)
            self.server = uvicorn.Server(config)
            self.register_signal_handler()
            asyncio.run(self.serve())

        def register_signal_handler(self) -> None:
            """ModelServer's own handlers lose a signal that comes before uvicorn has put its in their place."""
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, self.server.handle_exit)

        async def serve(self) -> None:
            watching = asyncio.ensure_future(connections.watch(self.server))
            try:
                await self.server.serve(sockets=[listener])
            finally:
                watching.cancel()

    _log_plainly()
    observing.log_requests()
    model = SteeredDiffusion(name, folder, device, base)
    model.load()
    server = LoopbackServer(workers=1, enable_grpc=False, grace_period=GRACE_SECONDS)
    listen(listener)
    if announce:
        print(_example(address_of(listener), name, described), file=sys.stdout, flush=True)
    server.start([model])
    model.close()


def listen(listener: socket.socket) -> None:
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
    prompt = described.examples[0] if described.examples else "an image"
    body = shlex.quote(json.dumps({"instances": [{"prompt": prompt, "seed": 1}]}, ensure_ascii=False))
    notice = f"{described.notice}\n" if described.notice else ""
    decode = "import base64, json, sys; p = json.load(sys.stdin)['predictions'][0]; "
    decode += "open('image.png', 'wb').write(base64.b64decode(p['images'][0]))"
    return (
        f"{notice}Serving {name} at {address} (a page in a browser; Ctrl-C stops it). An image:\n"
        f"  curl -s {address}/v1/models/{name}:predict -H 'Content-Type: application/json' \\\n"
        f'    -d {body} \\\n    | python3 -c "{decode}"'
    )


def _log_plainly() -> None:
    """Warnings and errors on stderr, one line each; no line a request."""
    import transformers

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers = [handler]
    kserve_logger = logging.getLogger("kserve")  # has a handler of its own, or ModelServer installs noisier ones
    kserve_logger.handlers, kserve_logger.propagate = [handler], False
    kserve_logger.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()

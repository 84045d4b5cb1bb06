"""A gateway for the HTTPRoutes of one namespace: it accepts them, and forwards by weight to addresses of a test."""

import itertools
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from latentac.components.cluster.api import HTTP_ROUTES, Api
from tests.cluster.kserve import patch_status

POLL_SECONDS = 0.2
_OPENER = build_opener(ProxyHandler({}))


class Gateway:
    """address: where it listens, on loopback; shares: each set of weights (backend -> weight) that it accepted;
    broken: backends that it answers 503 for."""

    def __init__(self, api: Api, backend: Callable[[str], str]) -> None:
        self._api, self._backend = api, backend
        self.shares: list[dict[str, int]] = []
        self.hosts: set[str] = set()
        self.broken: set[str] = set()
        self._turn = itertools.count()
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.forward(self)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Gateway":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)
        self._server.shutdown()
        self._server.server_close()

    def forward(self, request: BaseHTTPRequestHandler) -> None:
        """To the backends in turn, each as often as its weight says."""
        self.hosts.add(request.headers["Host"])
        turns = [backend for backend, weight in self.shares[-1].items() for _ in range(weight)]
        backend = turns[next(self._turn) * 37 % len(turns)]  # every one of a hundred, well mixed
        body = request.rfile.read(int(request.headers["Content-Length"]))
        status, answer = 503, b'{"error": "no healthy upstream"}'
        if backend not in self.broken:
            sent = Request(self._backend(backend) + request.path, body, {"Content-Type": "application/json"})
            try:
                with _OPENER.open(sent, timeout=120) as response:
                    status, answer = response.status, response.read()
            except HTTPError as error:
                status, answer = error.code, error.read()
        request.send_response(status)
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)

    def _run(self) -> None:
        seen: dict[str, int] = {}
        while not self._ended.wait(POLL_SECONDS):
            for route in self._api.find(HTTP_ROUTES):
                name, generation = route["metadata"]["name"], route["metadata"]["generation"]
                if seen.get(name) != generation:
                    seen[name] = generation
                    self.shares.append(_shares(route))
                    patch_status(self._api, HTTP_ROUTES, name, _accepted(route))


def _shares(route: Mapping[str, Any]) -> dict[str, int]:
    (rule,) = route["spec"]["rules"]
    return {backend["name"]: backend["weight"] for backend in rule["backendRefs"]}


def _accepted(route: Mapping[str, Any]) -> dict[str, Any]:
    common = {"status": "True", "observedGeneration": route["metadata"]["generation"], "message": ""}
    common["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    conditions = [
        {"type": "Accepted", "reason": "Accepted", **common},
        {"type": "ResolvedRefs", "reason": "ResolvedRefs", **common},
    ]
    parent = {"parentRef": route["spec"]["parentRefs"][0], "controllerName": "latentac.test/gateway"}
    return {"parents": [{**parent, "conditions": conditions}]}

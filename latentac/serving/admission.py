"""The first thing that a request meets: it is refused unless its host, its origin and its token are allowed.

A browser sends requests for any website that a person visits, to servers on the person's own machine too. It says in
`Origin` for which website, and in `Host` under which name it found the server: a website can have its own name resolve
to 127.0.0.1 (DNS rebinding). So both are checked. Programs send no `Origin`.
"""

import hmac
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from latentac.serving.access import ANY, Access, is_loopback
from latentac.serving.connections import HEADER_BYTES
from latentac.serving.refusals import is_openai, refusal
from latentac.serving.request import shortened
from latentac.serving.tensors import BINARY_HEADER
from latentac.system.errors import Problem

_ONCE = ("Host", "Origin", "Authorization", "Content-Type", "Content-Encoding", BINARY_HEADER)
"""Who finds two of them takes one; which one, programs do not agree about."""
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(:[0-9]*)?", re.ASCII | re.IGNORECASE)
_OPEN = ("/", "/metrics", "/v2/health/live", "/v2/health/ready")


class Admission:
    """Refuses what `access` does not allow, before a request's body is read."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            status, problem = self._problem(scope, Headers(scope=scope))
            if problem is not None:
                headers = {401: {"WWW-Authenticate": "Bearer"}, 400: {"Connection": "close"}}.get(status, {})
                await refusal(status, [problem], headers, openai=is_openai(scope["path"]))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope, headers: Headers) -> tuple[int, Problem | None]:
        if not scope["http_version"].startswith("1."):
            return 400, Problem("HTTP", scope["http_version"], "is not a version of this server", "Use HTTP/1.1.")
        if scope["method"] == "CONNECT":  # for a proxy in front, what follows is no HTTP
            return 400, Problem("method", "CONNECT", "opens no tunnel here", "Use GET or POST.")
        size = len(scope["raw_path"]) + sum(len(name) + len(value) + 4 for name, value in headers.raw)
        if size > HEADER_BYTES:  # of those that came at once: the connection bounds what comes in pieces
            return 431, Problem("headers", size, "bytes are too many", f"Send at most {HEADER_BYTES}.")
        for twice in (name for name in _ONCE if len(headers.getlist(name)) > 1):
            return 400, Problem(twice, len(headers.getlist(twice)), "times is once too often", "Send it once.")
        if "content-length" in headers and "transfer-encoding" in headers:  # a proxy may believe the other one
            problem = "stands beside Content-Length"
            return 400, Problem("Transfer-Encoding", None, problem, "Send one of them.")
        allowed, host = self._access, headers.get("host", "").lower()
        name = _name_of(host)
        if not (is_loopback(name) or allowed.hosts & {ANY, name, host}):
            problem = "is not a name of this server"
            remedy = f"Allow it: --allow-host {shortened(name)}" if name else "Send the server's name."
            return 403, Problem("Host", shortened(host), problem, remedy)
        origin = headers.get("origin")
        own = {f"{scheme}://{host}" for scheme in ("http", "https")}
        if origin is not None and not (allowed.origins | own) & {ANY, origin.lower()}:
            problem, remedy = "may not use this server", "Allow it: --allow-origin with that origin"
            return 403, Problem("Origin", shortened(origin), problem, remedy)
        if allowed.token and not _is_open(scope["path"]):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), allowed.token.encode()):
                problem = "is missing" if "authorization" not in headers else "is not this server's"
                return 401, Problem("Authorization", None, problem, "Send `Authorization: Bearer <token>`.")
        return 200, None


def _is_open(path: str) -> bool:
    """Whether an address needs no token: probes, metrics, and the page, which asks a person for it."""
    return path in _OPEN or path.startswith("/page/") or (path.startswith("/v2/models/") and path.endswith("/ready"))


def _name_of(host: str) -> str:
    """A Host header in lower case without its port; an IPv6 address without its brackets. "" for what is not a host."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").rstrip(".") if found else ""

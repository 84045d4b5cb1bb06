"""The first thing that a request meets: it is refused unless its host, its origin and its token are allowed.

A browser sends requests for any website that a person visits, to servers on the person's own machine too. It says in
`Origin` for which website, and in `Host` under which name it found the server: a website can have its own name resolve
to 127.0.0.1 (DNS rebinding). So both are checked. Programs send no `Origin`.
"""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from latentac.serving.access import ANY, Access, is_loopback
from latentac.serving.refusals import is_openai, refusal
from latentac.serving.request import shortened
from latentac.system.errors import Problem

_OPEN = ("/", "/metrics", "/v2/health/live", "/v2/health/ready")


class Guard:
    """Refuses what `access` does not allow, before a request's body is read."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            status, problem = self._problem(scope["path"], Headers(scope=scope))
            if problem is not None:
                headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
                await refusal(status, [problem], headers, openai=is_openai(scope["path"]))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, path: str, headers: Headers) -> tuple[int, Problem | None]:
        allowed, host = self._access, headers.get("host", "")
        name = _name_of(host)
        if not (is_loopback(name) or allowed.hosts & {ANY, name, host.lower()}):
            told, remedy = "is not a name of this server", f"Allow it: --allow-host {name}"
            return 403, Problem("Host", shortened(host), told, remedy)
        origin = headers.get("origin")
        if origin is not None and not (origin.partition("://")[2] == host or allowed.origins & {ANY, origin.lower()}):
            told, remedy = "may not use this server", "Allow it: --allow-origin with that origin"
            return 403, Problem("Origin", shortened(origin), told, remedy)
        if allowed.token and not _is_open(path):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), allowed.token.encode()):
                told = "is missing" if "authorization" not in headers else "is not this server's"
                return 401, Problem("Authorization", None, told, "Send `Authorization: Bearer <token>`.")
        return 200, None


def _is_open(path: str) -> bool:
    """Whether an address needs no token: probes, metrics, and the page, which asks a person for it."""
    return path in _OPEN or path.startswith("/page/") or (path.startswith("/v2/models/") and path.endswith("/ready"))


def _name_of(host: str) -> str:
    """A Host header without its port; an IPv6 address without its brackets."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")

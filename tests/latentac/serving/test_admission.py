"""Who may ask: names of the server, websites, and the token."""

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from latentac.serving.access import Access, access
from latentac.serving.admission import Admission
from latentac.system.errors import ConfigError

TOKEN = "0123456789abcdef"
PREDICT = "/v1/models/latentac:predict"


def status(allowed: Access, headers: dict[str, str], path: str = PREDICT) -> int:
    """Of a POST that names the server localhost:8080, unless the headers say otherwise."""
    app = Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse("drawn"), methods=["POST"])])
    app.add_middleware(Admission, access=allowed)
    with TestClient(app, base_url="http://localhost:8080") as client:
        return client.post(path, headers=headers).status_code


LOOPBACK, ANYWHERE = access("127.0.0.1", [], [], None), access("0.0.0.0", [], [], None)  # noqa: S104 - nothing listens
NAMED = access("0.0.0.0", ["Draw.Example.com"], ["https://App.example.com"], None)  # noqa: S104
ONE_PORT = access("127.0.0.1", ["draw.example.com:8443"], [], None)


@pytest.mark.parametrize(
    ("allowed", "host", "origin", "expected"),
    [
        (LOOPBACK, "localhost:8080", None, 200),
        (LOOPBACK, "127.0.0.1:8080", "http://127.0.0.1:8080", 200),
        (LOOPBACK, "[::1]:8080", "http://[::1]:8080", 200),
        (LOOPBACK, "LOCALHOST", None, 200),
        (LOOPBACK, "evil.example:8080", None, 403),
        (LOOPBACK, "evil.example:8080", "http://evil.example:8080", 403),
        (LOOPBACK, "localhost.evil.example", None, 403),
        (LOOPBACK, "127.0.0.1.evil.example", None, 403),
        (LOOPBACK, "evillocalhost", None, 403),
        (LOOPBACK, "a.localhost", None, 200),
        (LOOPBACK, "", None, 403),
        (LOOPBACK, "localhost:8080", "https://evil.example", 403),
        (LOOPBACK, "localhost:8080", "http://localhost:3000", 403),
        (LOOPBACK, "localhost:8080", "null", 403),
        (LOOPBACK, "localhost:8080", "", 403),
        (LOOPBACK, "localhost:8080", "https://localhost:8080", 200),
        (LOOPBACK, "localhost:8080", "evil://localhost:8080", 403),
        (LOOPBACK, "LocalHost:8080", "http://localhost:8080", 200),
        (LOOPBACK, "localhost:1@evil.example", None, 403),
        (LOOPBACK, "localhost:1@evil.example", "http://localhost:1@evil.example", 403),
        (LOOPBACK, "[::1]evil.example", None, 403),
        (LOOPBACK, "localhost:80:80", None, 403),
        (LOOPBACK, "localhost, evil.example", None, 403),
        (ANYWHERE, "10.0.0.7:8080", None, 200),
        (ANYWHERE, "draw.team.example", "https://draw.team.example", 200),
        (ANYWHERE, "draw.team.example", "https://evil.example", 403),
        (NAMED, "draw.example.com", None, 200),
        (NAMED, "draw.example.com:443", "https://app.example.com", 200),
        (NAMED, "draw.example.com.", None, 200),
        (NAMED, "other.example.com", None, 403),
        (NAMED, "draw.example.com", "http://app.example.com", 403),
        (NAMED, "draw.example.com", "HTTPS://APP.example.com", 200),
        (ONE_PORT, "draw.example.com:8443", None, 200),
        (ONE_PORT, "draw.example.com", None, 403),
        (access("127.0.0.1", ["*"], ["*"], None), "any.example", "https://evil.example", 200),
    ],
)
def test_hosts_and_origins(allowed: Access, host: str, origin: str | None, expected: int) -> None:
    """A website that a person visits may use neither the server nor a name of its own for it."""
    assert status(allowed, {"Host": host, **({} if origin is None else {"Origin": origin})}) == expected


@pytest.mark.parametrize(
    ("given", "path", "expected"),
    [
        (None, PREDICT, 401),
        ("Bearer " + TOKEN, PREDICT, 200),
        ("bearer  " + TOKEN, PREDICT, 200),
        ("Bearer " + TOKEN[:-1], PREDICT, 401),
        ("Bearer", PREDICT, 401),
        ("Basic " + TOKEN, PREDICT, 401),
        (TOKEN, PREDICT, 401),
        ("Bearer \xe9", PREDICT, 401),
        (None, "/metrics", 200),
        (None, "/openapi.json", 401),
        (None, "/v2/models/latentac", 401),
        (None, "/v1/images/ready", 401),
        (None, "/v2/models/latentac/ready", 200),
        (None, "/v2/health/live", 200),
        (None, "/", 200),
        (None, "/page/page.js", 200),
    ],
)
def test_the_token(given: str | None, path: str, expected: int) -> None:
    """Probes, metrics and the page do without; a page's person is asked."""
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    assert status(Access(token=TOKEN), headers, path) == expected  # type: ignore[arg-type]


def test_what_cannot_be_allowed_is_refused(tmp_path: Path) -> None:
    """Before the model is loaded, with the argument and the remedy; the token itself is never shown."""
    for origin in ("app.example.com", "https://app.example.com/", "file://x", "https://"):
        with pytest.raises(ConfigError, match=r"--allow-origin = .* is not an origin"):
            access("127.0.0.1", [], [origin], None)
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match=r"--token-file = .* cannot be read: No such file"):
        access("127.0.0.1", [], [], file)
    for content in (
        "",
        "short",
        "two words of enough length",
        "t\u00f6ken-of-enough-length",
        TOKEN[:-1],
        f"{TOKEN}\x00",
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match="--token-file = ") as caught:
            access("127.0.0.1", [], [], file)
        assert not content or content not in str(caught.value)
    file.write_text(f"{TOKEN}\n")
    assert access("127.0.0.1", [], [], file).token == TOKEN
    assert TOKEN not in repr(access("127.0.0.1", [], [], file))


def answered(*headers: tuple[str, str], path: str = PREDICT, method: str = "POST") -> tuple[int, str]:
    """Status of a request with these headers, and which one is wrong."""
    app = Starlette(routes=[Route("/{path:path}", lambda request: PlainTextResponse("drawn"), methods=["POST"])])
    app.add_middleware(Admission, access=LOOPBACK)
    with TestClient(app, base_url="http://localhost:8080") as client:
        answer = client.request(method, path, headers=list(headers))
    assert (answer.headers.get("connection") == "close") == (answer.status_code == 400)
    return answer.status_code, answer.json()["problems"][0]["field"] if answer.status_code != 200 else ""


@pytest.mark.parametrize(
    "name",
    ["Host", "Origin", "Authorization", "Content-Type", "Content-Encoding", "Inference-Header-Content-Length"],
)
def test_a_header_that_decides_stands_there_once(name: str) -> None:
    """Of two, a proxy may have believed the other one; also where both say the same."""
    value = {"Host": "localhost:8080", "Origin": "http://localhost:8080"}.get(name, "x")
    assert answered((name, value)) == (200, "")
    assert answered((name, value), (name, value)) == (400, name)
    assert answered((name, value), (name.lower(), "other")) == (400, name)
    assert answered(("Accept", "a"), ("Accept", "b")) == (200, "")


def test_a_length_is_reported_in_one_way() -> None:
    """Content-Length beside Transfer-Encoding is how requests are smuggled past a proxy: refused, and the connection
    ends."""
    assert answered(("Content-Length", "3"), ("Transfer-Encoding", "chunked")) == (400, "Transfer-Encoding")


def test_headers_have_a_size() -> None:
    """Also where they come at once."""
    assert answered(("X", "a" * 60_000)) == (200, "")
    assert answered(("X", "a" * 66_000)) == (431, "headers")
    assert answered(*((f"X{index}", "a") for index in range(8_000))) == (431, "headers")
    assert answered(("X", "a" * 30_000), path="/" + "a" * 40_000) == (431, "headers")


def test_another_version_of_http_is_refused() -> None:
    """Its requests end elsewhere than those of HTTP/1; nothing behind the admission sees them."""
    admission = Admission(PlainTextResponse("drawn"), LOOPBACK)
    for version, expected in (("1.1", 200), ("1.0", 200), ("0.9", 400), ("2", 400), ("9.9", 400)):

        async def app(scope: Scope, receive: Receive, send: Send, version: str = version) -> None:
            await admission({**scope, "http_version": version}, receive, send)

        assert TestClient(app, base_url="http://localhost").post(PREDICT).status_code == expected, version


@pytest.mark.parametrize("name", ["Host", "Origin"])
def test_a_refusal_is_short_whatever_was_sent(name: str) -> None:
    """An answer is no larger than a few lines."""
    app = Admission(PlainTextResponse("drawn"), LOOPBACK)
    answer = TestClient(app, base_url="http://localhost").post(PREDICT, headers={name: "a" * 10_000})
    assert (answer.status_code, len(answer.content) < 1000) == (403, True)


def test_whoever_lacks_the_token_learns_how_to_give_it() -> None:
    """By the header that HTTP asks for beside 401."""
    answer = TestClient(Admission(PlainTextResponse("drawn"), Access(token=TOKEN)), base_url="http://localhost").get(
        "/v2"
    )
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_tunnel_is_not_opened() -> None:
    """And the connection ends: what follows was meant for somebody else."""
    assert answered(method="CONNECT") == (400, "method")

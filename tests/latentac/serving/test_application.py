"""The application of a loaded model: which websites a browser may ask for, and which addresses there are."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane
from starlette.testclient import TestClient

from latentac.serving.access import access
from latentac.serving.application import application
from latentac.serving.model import SteeredDiffusion

SITE, OTHER = "https://app.example.com", "https://evil.example"
PREDICT = "/v1/models/latentac:predict"


@pytest.fixture(scope="module")
def model(exported_folder: Path) -> Iterator[SteeredDiffusion]:
    loaded = SteeredDiffusion("latentac", exported_folder, "cpu")
    loaded.load()
    yield loaded
    loaded.close()


@pytest.fixture
def client(model: SteeredDiffusion) -> Callable[..., TestClient]:
    """Of an application that these websites may use."""

    def made(*origins: str) -> TestClient:
        registry = ModelRepository()
        registry.update(model)
        allowed = access("127.0.0.1", [], origins, None)
        app = application(DataPlane(model_registry=registry), model, 0, allowed, log_prompts=False)
        return TestClient(app, base_url="http://localhost:8080")

    return made


def preflight(client: TestClient, origin: str, method: str = "POST", headers: str = "content-type") -> int:
    """Status of a browser's question whether a page of `origin` may send such a request."""
    asked = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    answer = client.options(PREDICT, headers=asked)
    if answer.status_code == 200:
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert {*answer.headers["Access-Control-Allow-Methods"].split(", ")} == {"GET", "POST"}
    return answer.status_code


@pytest.mark.parametrize(
    ("origin", "method", "headers", "expected"),
    [
        (SITE, "GET", "content-type", 200),
        (SITE, "POST", "content-type, authorization, x-request-id", 200),
        (SITE, "DELETE", "content-type", 400),
        (SITE, "PUT", "content-type", 400),
        (SITE, "POST", "x-anything", 400),
        (OTHER, "POST", "content-type", 400),
        ("null", "POST", "content-type", 400),
        (f"{SITE}.evil.example", "POST", "content-type", 400),
    ],
)
def test_a_browser_may_send_for_an_allowed_website_what_the_server_takes(
    client: Callable[..., TestClient], origin: str, method: str, headers: str, expected: int
) -> None:
    """Its methods and headers, and no others; for another website nothing."""
    with client(SITE) as asked:
        assert preflight(asked, origin, method, headers) == expected


def test_where_no_website_is_allowed_a_browser_is_refused_as_anybody(client: Callable[..., TestClient]) -> None:
    """By the guard, which says how to allow one; no header of the answer speaks to browsers."""
    with client() as asked:
        answer = asked.options(PREDICT, headers={"Origin": SITE, "Access-Control-Request-Method": "POST"})
        assert answer.status_code == 403
        assert answer.json()["problems"][0]["field"] == "Origin"
        answers = [answer, asked.get("/v1/images/options"), asked.get("/v1/images/options", headers={"Origin": SITE})]
    assert not [name for each in answers for name in each.headers if name.startswith("access-control-")]


def test_a_page_may_read_an_answer_of_its_website_alone(client: Callable[..., TestClient]) -> None:
    """The guard's refusals, too, so that a page can tell what is wrong."""
    with client(SITE) as asked:
        for path, expected in (("/v1/images/options", 200), ("/nothing", 404)):
            answer = asked.get(path, headers={"Origin": SITE})
            found = answer.status_code, answer.headers["Access-Control-Allow-Origin"], answer.headers["Vary"]
            assert found == (expected, SITE, "Origin")
        answer = asked.get("/v1/images/options", headers={"Origin": OTHER})
    assert answer.status_code == 403
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_any_website_may_be_allowed(client: Callable[..., TestClient]) -> None:
    """By the operator, with a star."""
    with client("*") as asked:
        answer = asked.get("/v1/images/options", headers={"Origin": OTHER})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, "*")


def test_the_document_is_ours_and_no_page_about_it_loads_from_elsewhere(client: Callable[..., TestClient]) -> None:
    """FastAPI's own pages load scripts from another server, and its document knows nothing of what may be asked for."""
    with client() as asked:
        for path in ("/docs", "/docs/oauth2-redirect", "/redoc"):
            assert asked.get(path).status_code == 404, path
        document = asked.get("/openapi.json").json()
    assert "/v1/models/{model_name}:predict" in document["paths"]
    assert document["info"]["title"] == "latentac"
    assert "prompt" in document["components"]["schemas"]["Request"]["properties"]


@pytest.mark.parametrize("path", ["/v1/models/latentac", "/v2/models/latentac/ready"])
def test_a_model_that_is_not_ready_is_kserves_answer(
    client: Callable[..., TestClient], model: SteeredDiffusion, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Not a fault of the server: whoever asks comes again."""
    with client() as asked:
        assert asked.get(path).status_code == 200
        monkeypatch.setattr(model, "ready", False)
        assert asked.get(path).status_code == 503

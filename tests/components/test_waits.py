"""A Kubernetes API server that does not answer is given up within the stated bound, by every way of asking it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from latentac.components.cluster import api as cluster
from latentac.components.cluster.api import CONFIG_MAPS, PODS, Api, connect
from latentac.components.train.volcano import Volcano
from latentac.system.errors import ClusterError, ClusterUnavailable, ConfigError
from latentac.system.waiting import Bounds
from tests.components.test_volcano import settings_of, workspace
from tests.faults import Faulty, faulty, seconds_of

SHORT = Bounds(answer_seconds=0.8, retry_seconds=0.8)
MARGIN_SECONDS = 2.0
"""Of a busy machine."""

QUESTIONS: dict[str, Callable[[Api], object]] = {
    "get": lambda api: api.get(CONFIG_MAPS, "x"),
    "find": lambda api: api.find(PODS),
    "create": lambda api: api.create(CONFIG_MAPS, {}),
    "apply": lambda api: api.apply(CONFIG_MAPS, {"metadata": {"name": "x"}}),
    "delete": lambda api: api.delete(CONFIG_MAPS, "x"),
    "log": lambda api: api.log("x", "main", tail=5),
}


def api_of(server: Faulty) -> Api:
    return Api(client.Configuration(host=server.url), "latentac", SHORT)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("fault", ["silent", "head", "body"])
def test_no_answer_is_given_up_within_the_bound(fault: str, question: str) -> None:
    """The message names server, question and seconds; the exit code says: again later."""
    with faulty(fault) as server:
        began = time.monotonic()
        with pytest.raises(ClusterUnavailable) as caught:
            QUESTIONS[question](api_of(server))
        assert seconds_of(began) < SHORT.total_seconds + MARGIN_SECONDS
        assert server.accepted == 1, "the library asked again behind our back"
    message = str(caught.value)
    assert server.url in message
    assert "/namespaces/latentac/" in message
    assert "given up after 0." in message or "given up after 1." in message
    assert caught.value.exit_code == 75


def test_a_connection_that_breaks_is_made_again() -> None:
    """Until the time for that is over."""
    with faulty("reset") as server:
        began = time.monotonic()
        with pytest.raises(ClusterUnavailable, match=r"given up after \d"):
            QUESTIONS["get"](api_of(server))
        assert seconds_of(began) < SHORT.total_seconds + MARGIN_SECONDS
        assert server.accepted > 1


@pytest.mark.parametrize("fault", ["silent", "head", "body"])
def test_another_library_with_our_client_is_bounded_too(fault: str) -> None:
    """TorchX is given it, and names no timeout."""
    with faulty(fault) as server:
        api, began = api_of(server), time.monotonic()
        jobs = client.CustomObjectsApi(api.client)
        with pytest.raises(ClusterUnavailable, match=r"does not answer GET /x"), api.translated("GET", "/x"):
            jobs.get_namespaced_custom_object("batch.volcano.sh", "v1alpha1", "latentac", "jobs", "x")
        assert seconds_of(began) < SHORT.answer_seconds + MARGIN_SECONDS


@pytest.mark.parametrize("fault", ["silent", "head"])
def test_a_log_that_does_not_begin_is_given_up(fault: str) -> None:
    """Whoever follows it asks again."""
    with faulty(fault) as server:
        began = time.monotonic()
        with pytest.raises(ClusterUnavailable):
            list(api_of(server).follow("x", "main"))
        assert seconds_of(began) < SHORT.answer_seconds + MARGIN_SECONDS


@pytest.fixture
def slow_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubeconfig whose credentials come from a program that does not end."""
    file = tmp_path / "kubeconfig"
    command = {"apiVersion": "client.authentication.k8s.io/v1", "command": "sleep", "args": ["5"]}
    content = {
        "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "x", "user": {"exec": command}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.setattr(cluster, "_LOGIN_SECONDS", 0.5)
    return file


def test_a_login_that_does_not_end_is_given_up(slow_login: Path) -> None:
    """With the kubeconfig that names it."""
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"gives no credentials .no answer within 0.5 s") as caught:
        connect("latentac")
    assert seconds_of(began) < 3
    assert str(slow_login) in str(caught.value)


@contextlib.contextmanager
def refusing() -> Iterator[Faulty]:
    """An API server that knows no object and will have none made: each is there already."""
    found = Faulty()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, reason: str) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found.accepted += 1
            reported = {"kind": "Status", "reason": reason, "message": reason, "code": status, "details": {"name": "x"}}
            content = json.dumps(reported).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer(404, "NotFound")

        def do_POST(self) -> None:
            self.answer(409, "AlreadyExists")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.address = f"127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield found
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(60)
def test_a_job_that_is_never_there_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused because it is there, and it is not there when it is looked at. The server gets its rest between."""
    monkeypatch.setattr("latentac.components.train.volcano._ROOM_SECONDS", 0.5)
    with refusing() as server:
        train = Volcano(settings_of("latentac", grace_seconds=1), api_of(server), poll_seconds=0.2)
        began = time.monotonic()
        with pytest.raises(ClusterError, match=r"job latentac/.*is gone again each time that it is submitted"):
            train._submit(workspace(tmp_path))
        assert seconds_of(began) < 1.5 + 6 * MARGIN_SECONDS
        assert server.accepted < 30


@pytest.mark.parametrize("fault", ["silent", "reset"])
def test_a_job_is_not_submitted_without_an_end(tmp_path: Path, fault: str) -> None:
    """TorchX asks, and we ask it again, until the time for that is over."""
    with faulty(fault) as server:
        train = Volcano(settings_of("latentac"), api_of(server), poll_seconds=0.2)
        began = time.monotonic()
        with pytest.raises(ClusterUnavailable, match="does not answer POST"):
            train._submit(workspace(tmp_path))
        assert seconds_of(began) < SHORT.total_seconds + 3 * MARGIN_SECONDS

"""Kubeflow Pipelines and docker that do not answer are given up within the stated bound; a run that goes on is not."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kfp_server_api
import pytest

from latentac.pipelines import containers
from latentac.pipelines.following import Follower
from latentac.pipelines.service import Order, Service
from latentac.system.errors import ClusterError, ClusterUnavailable, ResourceError
from latentac.system.waiting import Bounds
from tests.faults import faulty, seconds_of

SHORT = Bounds(answer_seconds=0.8, retry_seconds=0.8)
MARGIN_SECONDS = 2.0
"""Of a busy machine."""
ORDER = Order("name", ("pipeline", "version"), {}, "account", "experiment", "")

QUESTIONS: dict[str, Callable[[Service, Path], object]] = {
    "run": lambda service, file: service.run("x"),
    "runs": lambda service, file: service.runs(3),
    "nodes": lambda service, file: service.nodes("x"),
    "submit": lambda service, file: service.submit(ORDER),
    "upload": lambda service, file: service.upload(file, "name", "version"),
    "terminate": lambda service, file: service.terminate("x"),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("fault", ["silent", "head", "body"])
def test_no_answer_is_given_up_within_the_bound(tmp_path: Path, fault: str, question: str) -> None:
    """The message names server, question and seconds; the exit code says: again later."""
    (tmp_path / "pipeline.yaml").write_text("x")
    with faulty(fault) as server:
        service, began = Service(server.url, bounds=SHORT), time.monotonic()
        with pytest.raises(ClusterUnavailable, match=r"does not answer .*given up after [01]\.") as caught:
            QUESTIONS[question](service, tmp_path / "pipeline.yaml")
        assert seconds_of(began) < SHORT.total_seconds + MARGIN_SECONDS
    assert caught.value.where.startswith(f"{server.url}, ")
    assert caught.value.exit_code == 75


def test_following_ends_when_nobody_answers() -> None:
    """A run may take days; its server may be silent for a stated time."""
    with faulty("silent") as server:
        reported: list[str] = []
        service = Service(server.url, bounds=Bounds(0.3, 0.3))
        follower = Follower(service, ("train",), reported.append, poll_seconds=0.05, outage_seconds=0.5)
        began = time.monotonic()
        with pytest.raises(ClusterUnavailable, match=r"run x: .*no answer for \d+ s\. It may go on"):
            follower.follow("x")
        assert seconds_of(began) < 0.5 + 2 * 0.6 + MARGIN_SECONDS
    assert any("trying again" in line for line in reported)


@pytest.mark.parametrize("again", [True, False], ids=["round and round", "on and on"])
def test_a_list_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """Each page names a next one: the same, or always another."""
    monkeypatch.setattr("latentac.pipelines.service._MOST_PAGES", 5)
    service, pages = Service("http://127.0.0.1:9"), iter(range(10**6))

    def page(**options: object) -> kfp_server_api.V2beta1ListExperimentsResponse:
        token = "1" if again else str(next(pages))
        return kfp_server_api.V2beta1ListExperimentsResponse(experiments=[], next_page_token=token)

    with pytest.raises(ClusterError, match=r"list has no end after \d pages"):
        list(service._pages(page))


@pytest.fixture
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a docker daemon."""
    monkeypatch.setattr(containers, "_ANSWER_SECONDS", 0.8)
    monkeypatch.setattr(containers, "_LOOK_SECONDS", 0.1)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # put back afterwards


@pytest.mark.usefixtures("little_patience")
@pytest.mark.parametrize("fault", ["silent", "head", "body"])
def test_a_daemon_that_does_not_answer_is_given_up(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made, with its address and the seconds."""
    with faulty(fault) as server:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://{server.address}")
        began = time.monotonic()
        with pytest.raises(ResourceError, match=r"no docker daemon answers \(no answer within 0.8 s\)") as caught:
            containers._client()
        assert seconds_of(began) < 0.8 + MARGIN_SECONDS
        assert caught.value.where == f"tcp://{server.address}"


@pytest.mark.usefixtures("little_patience")
def test_a_daemon_that_falls_silent_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step waits on a connection that nothing comes from, without a bound: it may print nothing for hours."""
    with (
        faulty("silent") as server,
        socket.create_connection(("127.0.0.1", server.port)) as waiting,
    ):
        monkeypatch.setenv("DOCKER_HOST", f"tcp://{server.address}")
        began = time.monotonic()
        with (
            pytest.raises(ResourceError, match=r"has not answered 2 pings within 0\.8 s each"),
            containers._answering(),
        ):
            waiting.recv(1)
        assert seconds_of(began) < 2 * 0.9 + MARGIN_SECONDS


@contextlib.contextmanager
def daemon() -> Iterator[str]:
    """The address of what answers as a docker daemon does that is asked whether it is there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = b'{"ApiVersion": "1.44"}' if self.path.endswith("version") else b"OK"
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"tcp://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("little_patience")
def test_a_daemon_that_answers_lets_a_run_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long nothing is printed; and Ctrl-C stays Ctrl-C."""
    with daemon() as address:
        monkeypatch.setenv("DOCKER_HOST", address)
        containers._client().close()
        with containers._answering():
            time.sleep(2)
        with pytest.raises(KeyboardInterrupt), containers._answering():
            raise KeyboardInterrupt


def test_a_connection_that_breaks_is_made_again_a_few_times() -> None:
    """Not a few times for each of ours; and what must not be done twice is asked for once."""
    with faulty("reset") as server:
        service = Service(server.url, bounds=SHORT)
        with pytest.raises(ClusterUnavailable, match="does not answer"):
            service.run("x")
        assert 1 < server.accepted <= 4
        server.accepted = 0
        with pytest.raises(ClusterUnavailable, match="does not answer"):
            service._once("start x", service._runs.run_service_create_run, kfp_server_api.V2beta1Run())
        assert server.accepted == 1


def test_a_server_without_tls_is_reported_at_once() -> None:
    """Waiting does not mend what is wrong with a certificate, or with `https` in the address."""
    with faulty("cut") as server:
        service = Service(f"https://{server.address}", bounds=SHORT)
        with pytest.raises(ClusterError, match=r"there is no trusted TLS connection to it .*--ca"):
            service.run("x")
        assert server.accepted == 1


@contextlib.contextmanager
def refusing(content: bytes) -> Iterator[str]:
    """The address of what refuses each question, with these words."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(400)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("content", [b'{"message": "%s"}' % (b"a " * 500_000), b"<html>a proxy's page", b"[]", b"{"])
def test_a_refusal_is_reported_in_few_words(content: bytes) -> None:
    """Whatever the server, or a proxy before it, says."""
    with refusing(content) as address:
        with pytest.raises(ClusterError, match="run x: 400 ") as caught:
            Service(address, bounds=SHORT).run("x")
        assert len(str(caught.value)) < 1000


def test_a_connection_that_ends_in_its_handshake_is_made_again() -> None:
    """A server that starts anew does that. It is no matter of certificates."""
    with faulty("closed") as server:
        with pytest.raises(ClusterUnavailable, match="does not answer"):
            Service(f"https://{server.address}", bounds=SHORT).run("x")
        assert server.accepted > 1

"""What an API server says, and how it says it: each refusal is one short error of ours, a break is no refusal."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from kubernetes import client

from latentac.components.cluster import api as cluster
from latentac.components.cluster.api import CONFIG_MAPS, PODS, VOLCANO_JOBS, Api
from latentac.system.errors import ClusterError, ClusterUnavailable
from latentac.system.waiting import Bounds
from tests.faults import faulty, seconds_of
from tests.latentac.test_store import _certificate
from tests.latentac.test_store_hostile import Answer, Liar, lying

SHORT = Bounds(answer_seconds=0.8, retry_seconds=0.8)
MARGIN_SECONDS = 2.0
"""Of a busy machine."""


def api_at(address: str, **settings: object) -> Api:
    configuration = client.Configuration(host=address)
    for name, value in settings.items():
        setattr(configuration, name, value)
    return Api(configuration, "latentac", SHORT)


def answering(*answers: tuple[int, bytes]) -> Answer:
    """Statuses and bodies one after another; the last stays."""
    left = list(answers)

    def answer(request: BaseHTTPRequestHandler) -> None:
        status, content = left.pop(0) if len(left) > 1 else left[0]
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    return answer


def status(message: object) -> bytes:
    return json.dumps({"kind": "Status", "message": message}).encode()


@pytest.mark.parametrize("preloaded", [True, False], ids=["object", "log"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (status("not\nso " * 200_000), "409 not so not so"),
        (b"<html>a proxy's page" + b"\n " * 200_000 + b"x", "409 "),
        (status({"much": "x" * 10_000}), "409 {'much'"),
        (b"[" * 100_000, "409 "),
        (b"[1, 2]", "409 [1, 2]"),
        (b"{}", "409 "),
        (b"", "409 Conflict"),
    ],
    ids=["status", "page", "object", "deep", "list", "empty object", "nothing"],
)
def test_a_refusal_is_reported_in_one_short_line(content: bytes, expected: str, preloaded: bool) -> None:
    """In the words of the Status object, or else of what came; whatever a server, or a proxy before it, says."""
    with lying(answering((409, content))) as server:
        api = api_at(f"http://{server.address}")
        with pytest.raises(ClusterError) as caught:
            api.create(PODS, {}) if preloaded else api.log("x", "main", tail=1)
    assert caught.value.problem.startswith(expected)
    assert len(str(caught.value)) < 1300
    assert "\n" not in str(caught.value)
    assert caught.value.status == 409


@pytest.mark.parametrize("content", [status("too busy " * 200_000), b"x" * 10**6])
def test_an_outage_is_reported_in_one_short_line(content: bytes) -> None:
    """Also where another library asks with our client."""
    with lying(answering((503, content))) as server:
        api = api_at(f"http://{server.address}")
        for ask in (api.find, client.CustomObjectsApi(api.client).get_cluster_custom_object):
            arguments = (PODS,) if ask == api.find else ("g", "v", "p", "n")
            with pytest.raises(ClusterUnavailable) as caught, api.translated("GET", "/x"):
                ask(*arguments)
            assert "503 " in caught.value.problem
            assert len(str(caught.value)) < 1600


def test_what_is_no_answer_is_reported_in_one_short_line() -> None:
    """The library has the first line in its message, however long it is."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"x" * 50_000 + b"\r\n")

    with lying(answer) as server, pytest.raises(ClusterUnavailable, match="BadStatusLine") as caught:
        api_at(f"http://{server.address}").get(PODS, "x")
    assert len(str(caught.value)) < 1600


@pytest.mark.parametrize(
    ("code", "message", "remedy"),
    [
        (401, "Unauthorized", "token or the kubeconfig"),
        (403, 'pods is forbidden: User "x" cannot create', "Grant the right"),
        (403, 'admission webhook "judge" denied the request', "Correct the object"),
        (403, 'pods "x" is forbidden: violates PodSecurity "restricted"', "Correct the object"),
        (404, "the server could not find the requested resource", "Install what serves that resource"),
        (422, "spec.tasks: Required value", "Correct the object"),
    ],
)
def test_the_remedy_is_that_of_the_refusal(code: int, message: str, remedy: str) -> None:
    """Nothing is asked again: a right that is missing stays missing."""
    with lying(answering((code, status(message)))) as server:
        with pytest.raises(ClusterError, match=message.split('"')[0]) as caught:
            api_at(f"http://{server.address}").create(VOLCANO_JOBS, {})
        assert len(server.seen) == 1
    assert remedy in caught.value.remedy
    assert caught.value.where == "POST /apis/batch.volcano.sh/v1alpha1/namespaces/latentac/jobs"


def test_another_library_is_refused_as_we_are() -> None:
    """What is no outage is not called one."""
    with lying(answering((403, status("jobs is forbidden")))) as server:
        api = api_at(f"http://{server.address}")
        jobs = client.CustomObjectsApi(api.client)
        expected = r"GET /x: 403 jobs is forbidden\. Grant the right"
        with pytest.raises(ClusterError, match=expected) as caught, api.translated("GET", "/x?y"):
            jobs.get_cluster_custom_object("g", "v", "p", "n")
    assert (caught.value.exit_code, caught.value.status) == (9, 403)


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_an_outage_that_ends_is_none(code: int) -> None:
    """The same question is asked again."""
    with lying(answering((code, b"busy"), (200, b'{"items": [{"a": 1}]}'))) as server:
        assert api_at(f"http://{server.address}").find(PODS) == [{"a": 1}]
        assert len(server.seen) == 2


def test_a_field_that_is_unknown_is_reported_at_once() -> None:
    """The server calls it its own fault, with a 500, and may name many before."""
    message = "failed to create typed patch object: " + "x" * 3000 + " .spec.oops: field not declared in schema"
    with lying(answering((500, status(message)))) as server:
        with pytest.raises(ClusterError, match="500 failed to create typed patch object") as caught:
            api_at(f"http://{server.address}").apply(PODS, {"metadata": {"name": "x"}})
        assert len(server.seen) == 1
    assert caught.value.exit_code == 9


def test_a_name_leads_nowhere_else() -> None:
    """It is a part of the path, whatever is in it."""
    with lying(answering((200, b"{}"))) as server:
        api_at(f"http://{server.address}").get(CONFIG_MAPS, "../secrets/x?y=#")
        (asked,) = server.seen
    assert asked.startswith("GET /api/v1/namespaces/latentac/configmaps/..%2Fsecrets%2Fx%3Fy%3D%23 HTTP")


def test_a_log_is_text_and_may_not_be_there() -> None:
    """Also one of digits; none is there before the container has started, or when the pod is gone."""
    with lying(answering((200, b"12\n34"), (400, status("waiting to start")), (404, status("no pod")))) as server:
        api = api_at(f"http://{server.address}")
        assert [api.log("x", "main", tail=5) for _ in range(3)] == [["12", "34"], [], []]
        assert all("tailLines=5&limitBytes=1048576&" in asked for asked in server.seen), "its lines may be long"


@pytest.mark.parametrize("code", [400, 404])
def test_a_log_that_is_not_there_is_followed_to_its_end(code: int) -> None:
    """Which is at once."""
    with lying(answering((code, status("waiting to start")))) as server:
        assert list(api_at(f"http://{server.address}").follow("x", "main")) == []


def written(pauses: Mapping[bytes, float]) -> Answer:
    """A log whose pieces come after these pauses."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.protocol_version = "HTTP/1.1"
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for piece, seconds in pauses.items():
            time.sleep(seconds)
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        request.wfile.write(b"0\r\n\r\n")

    return answer


def test_a_container_may_be_silent_for_longer_than_an_answer_may_take() -> None:
    """A log is no answer that is waited for; its lines come whole."""
    pauses = {b"one\ntw": 0.0, b"o\n": SHORT.answer_seconds + 0.4, b"three\n": 0.0}
    with lying(written(pauses)) as server:
        assert list(api_at(f"http://{server.address}").follow("x", "main")) == ["one", "two", "three"]


def test_a_log_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before is handed on as it comes. A node that is gone does not say so."""
    monkeypatch.setattr(cluster, "_SILENCE_SECONDS", 0.5)
    with lying(written({b"one\n": 0.0, b"two\n": 10.0})) as server:
        began, lines = time.monotonic(), api_at(f"http://{server.address}").follow("x", "main")
        assert next(lines) == "one"
        with pytest.raises(ClusterUnavailable, match="Read timed out"):
            next(lines)
        assert seconds_of(began) < 0.5 + MARGIN_SECONDS


def test_a_line_without_an_end_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fills the memory. What is no whole line at the end is none: the stream was cut, and is followed again."""
    monkeypatch.setattr(cluster, "_LINE_BYTES", 1000)
    with lying(written({b"%04d" % number * 100: 0.0 for number in range(20)} | {b"end\nlast\ncut": 0.0})) as server:
        pieces = list(api_at(f"http://{server.address}").follow("x", "main"))
    assert "".join(pieces[:-1]) == "".join(f"{number:04}" * 100 for number in range(20)) + "end"
    assert pieces[-1] == "last"
    assert max(map(len, pieces)) < 2000


@pytest.fixture
def listening() -> Iterator[tuple[str, threading.Event]]:
    """The address of a server that says nothing, and whether its first caller has gone."""
    gone = threading.Event()

    def hold() -> None:
        caller, _ = listener.accept()
        with caller:
            while caller.recv(65_536):
                pass
        gone.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=hold, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", gone


def test_a_call_that_is_given_up_holds_no_connection(listening: tuple[str, threading.Event]) -> None:
    """Nor a thread: a step that asks for days would run out of them."""
    address, gone = listening
    with pytest.raises(ClusterUnavailable):
        api_at(address).get(PODS, "x")
    assert gone.wait(SHORT.answer_seconds + MARGIN_SECONDS)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[Liar, Path]]:
    """A server with a certificate of its own, and the file of its authority."""
    folder = _certificate(tmp_path / "certificates")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "public.crt", folder / "private.key")
    with lying(answering((200, b"{}"))) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield server, folder / "public.crt"


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another library's"])
def test_a_certificate_that_is_not_trusted_is_reported_by_its_authority(secured: tuple[Liar, Path], ours: bool) -> None:
    """At once, for waiting does not make it trusted: with the server, the file that was used, and where to name it."""
    server, authority = secured
    other = _certificate(authority.parents[1] / "others") / "public.crt"
    assert api_at(f"https://{server.address}", ssl_ca_cert=str(authority)).get(PODS, "x") == {}
    api, began = api_at(f"https://{server.address}", ssl_ca_cert=str(other)), time.monotonic()
    ask = api.find if ours else client.CustomObjectsApi(api.client).get_cluster_custom_object
    arguments = (PODS,) if ours else ("g", "v", "p", "n")
    with pytest.raises(ClusterError, match="no trusted TLS connection") as caught, api.translated("GET", "/x"):
        ask(*arguments)
    assert seconds_of(began) < MARGIN_SECONDS
    assert caught.value.where == f"https://{server.address}"
    assert "CERTIFICATE_VERIFY_FAILED" in caught.value.problem
    assert f"certificate authority {other}" in caught.value.problem
    assert "certificate-authority" in caught.value.remedy
    assert caught.value.exit_code == 9


def test_a_connection_that_ends_in_its_handshake_is_made_again() -> None:
    """A server that starts anew does that. It is no matter of certificates."""
    with faulty("closed") as server:
        with pytest.raises(ClusterUnavailable, match="does not answer"):
            api_at(f"https://{server.address}").get(PODS, "x")
        assert server.accepted > 1

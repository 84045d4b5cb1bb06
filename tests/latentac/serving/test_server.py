"""The real server over HTTP, as a process."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from latentac.serving.client import Client
from latentac.serving.generator import Generator
from latentac.serving.process import ServerProcess
from latentac.serving.server import bind
from latentac.system.errors import ResourceError, ServingError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

READY_SECONDS = 240.0
LONG: dict[str, Any] = {
    "prompt": "two red squares",
    "count": 8,
    "num_steps": 100,
    "method": "resampling",
    "particles": 16,
}
"""Takes seconds, even on a fast machine."""


@pytest.fixture(scope="module")
def server(exported_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server:
        yield server


def ask(server: ServerProcess, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, Any]:
    """Status and JSON; a POST if there is a body, of the content type `kind`."""
    headers = {"Content-Type": kind} if body else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.address + path, body, headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def decoded(image: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))))


def test_a_prediction_is_the_generators_image(server: ServerProcess, generator: Generator) -> None:
    """Bit for bit, in another process; with everything that is needed to ask for it again."""
    weights = {"shapes_verifier": 1.5, "jpeg_compressibility": -0.5}
    request = {"prompt": "a red circle", "seed": 7, "count": 2, "steering": weights}
    answer, images = server.predict(request), generator.generate("a red circle", 7, 2, steering=weights)
    assert np.array_equal(np.stack([decoded(image) for image in answer["images"]]), images.images)
    np.testing.assert_array_equal(np.float32(answer["values"]["shapes_verifier"]), images.values[:, :, 0])
    assert {name: answer[name] for name in ("seed", "nfe", "method", "steering", "version")} == {
        "seed": 7,
        "nfe": 30,
        "method": "value_gradient",
        "steering": weights,
        "version": "some-version",
    }
    assert server.predict(request) == answer


def test_instances_are_answered_in_order(server: ServerProcess) -> None:
    """One prediction each."""
    body = json.dumps({"instances": [{"prompt": "a red circle", "seed": seed, "num_steps": 2} for seed in (3, 4)]})
    status, content = ask(server, f"/v1/models/{server.name}:predict", body.encode())
    assert (status, [prediction["seed"] for prediction in content["predictions"]]) == (200, [3, 4])


@pytest.mark.parametrize(
    ("headers", "expected", "field"),
    [
        ({"Content-Type": "text/plain"}, 415, "Content-Type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
        ({"Content-Type": ""}, 415, "Content-Type"),
        ({"Origin": "https://evil.example"}, 403, "Origin"),
        ({"Host": "evil.example"}, 403, "Host"),
    ],
)
def test_no_website_can_make_the_server_draw(
    server: ServerProcess, headers: dict[str, str], expected: int, field: str
) -> None:
    """What a browser sends for any page without asking the server first."""
    body, form = b'{"prompt": "a red circle", "num_steps": 2}', {"Content-Type": "application/json", **headers}
    for path in (f"/v1/models/{server.name}:predict", "/v1/images/generations", "/v1/images/stream", "/v2/nothing"):
        request = urllib.request.Request(server.address + path, body, form)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        if path != "/v2/nothing":
            assert (caught.value.code, json.load(caught.value)["problems"][0]["field"]) == (expected, field)


def test_a_token_a_name_and_a_website_can_be_allowed(exported_folder: Path, tmp_path: Path) -> None:
    """By the command line. A browser's question before the request is answered for that website alone."""
    (tmp_path / "token").write_text("0123456789abcdef\n")
    command = [sys.executable, "-m", "latentac.serving", "--model", str(exported_folder), "--port", "0"]
    command += ["--token-file", str(tmp_path / "token"), "--allow-origin", "https://app.example.com"]
    command += ["--allow-host", "draw.example.com"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split(" at ")[1].split()[0]
            place = urlsplit(address).netloc

            def answer(method: str, path: str, **headers: str) -> tuple[int, str | None]:
                connection = http.client.HTTPConnection(place, timeout=60)
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                connection.request(method, path, headers=named)
                found = connection.getresponse()
                connection.close()
                return found.status, found.headers.get("Access-Control-Allow-Origin")

            site, path = "https://app.example.com", "/v1/images/options"
            preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
            assert answer("GET", path) == (401, None)
            assert answer("GET", path, Authorization="Bearer 0123456789abcdef") == (200, None)
            assert answer("GET", "/v2/health/live") == (200, None)
            assert answer("GET", "/v2/health/live", Host="draw.example.com:8080") == (200, None)
            assert answer("GET", "/v2/health/live", Host="other.example.com:8080") == (403, None)
            request = {"prompt": "a", "num_steps": 2}
            assert Client(address, token="0123456789abcdef").predict(request)["seed"] == 0
            with pytest.raises(ServingError, match="answered 401: Authorization"):
                Client(address).predict(request)
            assert answer("OPTIONS", path, Origin=site, **preflight) == (200, site)
            assert answer("GET", path, Origin=site, Authorization="Bearer 0123456789abcdef") == (200, site)
            assert answer("OPTIONS", path, Origin="https://evil.example", **preflight)[1] is None
            assert answer("GET", path, Origin="https://evil.example", Authorization="Bearer 0123456789abcdef")[0] == 403
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"instances": [{"prompt": "a", "seed": -1}]}', 422, "instances.0.seed = -1"),
        (b'{"instances": 3}', 422, "instances = 3"),
        (b'"x"', 422, "is no JSON object"),
        (b'{"instances": [', 400, "is not JSON"),
        (b'{"instances": [{"prompt": "a", "seed": 1e400}]}', 400, "instances.0.seed = '1e309 or more'"),
        (b'{"instances": 1e999}', 400, "instances = "),
        (b"-1e999", 400, "body = "),
    ],
)
def test_bad_input_is_the_callers_mistake(server: ServerProcess, body: bytes, status: int, message: str) -> None:
    """4xx with a message that says where; the fields are listed for a program."""
    found, content = ask(server, f"/v1/models/{server.name}:predict", body)
    assert (found, message in content["error"]) == (status, True), content
    if status == 422:
        assert set(content["problems"][0]) == {"field", "value", "problem", "remedy"}


def test_what_is_not_there_is_reported(server: ServerProcess) -> None:
    """Another model's name is 404 in each protocol; what KServe offers and this server does not is not there."""
    assert ask(server, "/v1/models/other:predict", b'{"instances": []}')[0] == 404
    assert ask(server, "/v2/models/other/infer", b"{}")[0] == 404
    assert ask(server, "/v1/images/generations", b'{"model": "other", "prompt": "a"}')[0] == 404
    assert ask(server, f"/v2/repository/models/{server.name}/unload", b"{}")[0] == 404
    assert ask(server, "/v2")[1]["extensions"] == ["binary_tensor_data"]
    assert ask(server, f"/v1/models/{server.name}:explain", b"{}")[0] == 404
    assert ask(server, f"/v1/models/{server.name}:explain")[0] == 404
    status, content = ask(server, f"/v1/models/{server.name}:predict")
    assert (status, "is asked with POST" in content["error"]) == (405, True)


def test_predict_says_why_it_is_refused(server: ServerProcess) -> None:
    """ServerProcess turns what is not 200 into one error with the server's words."""
    with pytest.raises(ServingError, match=r"answered 422: instances\.0\.count = 99"):
        server.predict({"prompt": "a", "count": 99})


def test_probes_answer_while_it_draws(server: ServerProcess) -> None:
    """A synchronous predict would hold them up for as long as it draws."""
    seconds = []
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        drawing = pool.submit(server.predict, LONG)
        time.sleep(0.2)
        while not drawing.done():
            asked = time.monotonic()
            assert ask(server, f"/v2/models/{server.name}/ready")[0] == 200
            assert ask(server, "/v2/health/live")[0] == 200
            seconds.append((time.monotonic() - asked) / 2)
            time.sleep(0.02)
        whole = time.monotonic() - started
    print(
        f"{len(seconds)} probes in {whole:.1f} s: median {statistics.median(seconds):.4f} s, max {max(seconds):.4f} s"
    )
    assert len(seconds) >= 5
    assert statistics.median(seconds) < 0.1
    assert max(seconds) < whole / 2


def test_a_taken_port_is_reported_before_anything_is_loaded(server: ServerProcess, exported_folder: Path) -> None:
    """One message, exit code 6, no traceback, at once."""
    port = server.address.rpartition(":")[2]
    command = [sys.executable, "-X", "importtime", "-m", "latentac.serving", "--model", str(exported_folder)]
    done = subprocess.run([*command, "--port", port], capture_output=True, text=True, timeout=60, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 6
    assert said == [f"serving: 127.0.0.1:{port}: the port is in use. Stop what listens there, or choose another port."]
    assert not {"torch", "kserve", "pydantic"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    with (
        pytest.raises(ResourceError, match="the port is in use"),
        ServerProcess(exported_folder, ready_seconds=1, port=int(port)),
    ):
        pass


def test_an_address_that_is_not_ours_is_reported() -> None:
    """So is a name that does not resolve."""
    with pytest.raises(ResourceError, match="cannot be listened on"):
        bind("192.0.2.1", 0)
    with pytest.raises(ResourceError, match="cannot be listened on"):
        bind("no-such-host.invalid", 0)


def test_help_is_light_and_has_an_example() -> None:
    """No torch, no KServe, no pydantic for a help text."""
    command = [sys.executable, "-X", "importtime", "-m", "latentac.serving", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python -m latentac.serving --model" in done.stdout
    assert not {"torch", "kserve", "pydantic"} & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_sigterm_lets_the_accepted_request_finish(exported_folder: Path) -> None:
    """The image arrives whole, then the process ends with code 0."""
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server, ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(server.predict, LONG | {"num_steps": 30})
        time.sleep(0.5)
        assert not drawing.done()
        os.kill(server.pid, signal.SIGTERM)
        assert len(drawing.result(300)["images"]) == LONG["count"]
        assert server.wait(300) == 0


def test_a_killed_server_is_reported(exported_folder: Path) -> None:
    """At once, with the signal; not a hang and not a broken pipe."""
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server, ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(server.predict, LONG)
        time.sleep(0.5)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServingError, match=r"did not answer .*it ended with SIGKILL"):
            drawing.result(10)


def test_ctrl_c_stops_it_cleanly(exported_folder: Path) -> None:
    """As a person serves: the address and an example on stdout, nothing on stderr, code 0."""
    command = [sys.executable, "-m", "latentac.serving", "--model", str(exported_folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = [process.stdout.readline() for _ in range(4)]
        # The address is printed before the server answers. A request waits until it does.
        address = re.findall(r"http://[\d.:]+", output[0])[0]
        with urllib.request.urlopen(f"{address}/v2/health/ready", timeout=120) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=300)
    assert output[0].startswith("Serving latentac at http://127.0.0.1:")
    assert output[1].startswith("  curl")
    assert (process.returncode, complaints) == (0, "")


def test_the_printed_command_generates_an_image(exported_folder: Path, tmp_path: Path) -> None:
    """As it is printed, in a shell: of the model's own first prompt, whatever characters are in it. And the terminal,
    the options and the folder say what the model is not for."""
    folder = tmp_path / "model"
    shutil.copytree(exported_folder, folder)
    notice = "held: for inspection only, not in production"
    content = json.loads((folder / "latentac.json").read_text())
    prompt = 'it\'s "$A" `x` ö'
    (folder / "latentac.json").write_text(json.dumps({**content, "examples": [prompt], "notice": notice}))
    command = [sys.executable, "-m", "latentac.serving", "--model", str(folder), "--port", "0", "--log-prompts"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = [process.stdout.readline() for _ in range(5)]
        assert output[0] == f"{notice}\n"
        script = "".join(output[2:])
        drawn = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=False, timeout=300)
        address = re.findall(r"http://[\d.:]+", output[1])[0]
        with urllib.request.urlopen(f"{address}/v1/images/options", timeout=30) as answer:
            options = json.load(answer)
        process.send_signal(signal.SIGINT)
        log = [json.loads(line) for line in process.communicate(timeout=300)[0].splitlines()]
    assert drawn.returncode == 0
    assert [one["prompt"] for line in log for one in line.get("asked", ())] == [prompt]
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")
    assert options["notice"] == notice

"""What no caller may do to a real server: break it, make it lose or mix up a request, make it grow."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from latentac.serving.process import ServerProcess
from tests.latentac.serving.conftest import READY_SECONDS
from tests.latentac.serving.fuzzing import EXAMPLES, SEED, counted
from tests.latentac.serving.test_protocols import ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Two rules that a JSON schema cannot tell: the images of all instances together, and elements of a tensor's type.
CONFIGURATION = """
[[operations]]
include-path-regex = "predict|infer"
[operations.checks]
positive_data_acceptance.enabled = false
"""


def fuzz(server: ServerProcess, folder: Path, examples: int) -> int:
    """Requests that schemathesis made from the document; all of its checks must hold."""
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "--config-file", "schemathesis.toml", "run", f"{server.address}/openapi.json"]
    command += ["--max-examples", str(examples), "--seed", str(SEED), "--continue-on-failure"]
    command += ["--suppress-health-check", "all", "--phases", "examples,coverage,fuzzing", "--no-color"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    made = re.search(r"([\d,]+) generated", done.stdout)
    assert made, done.stdout[-2000:]
    return int(made[1].replace(",", ""))


def resident(server: ServerProcess) -> int:
    """kB of memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())
    assert found
    return int(found[1])


def statuses(server: ServerProcess) -> Counter[str]:
    """Requests for images by status, as the server counts them."""
    counted: Counter[str] = Counter()
    for status, number in re.findall(
        r'latentac_requests_total\{.*status="(\d+)"\} (\S+)', ask(server, "GET", "/metrics")[2]
    ):
        counted[status] += int(float(number))
    return counted


@pytest.mark.fuzz
def test_requests_made_from_the_document_break_nothing(small: ServerProcess, tmp_path: Path) -> None:
    """No 5xx; every status, header and body as the document says; what it allows is accepted and what it forbids is
    not; and the memory at the end is that after the first tenth."""
    earlier = statuses(small)
    made = fuzz(small, tmp_path, max(10, EXAMPLES // 10))
    before = resident(small)
    made += fuzz(small, tmp_path, EXAMPLES)
    growth, found = resident(small) / before - 1, statuses(small) - earlier
    counted("document", found.elements(), requests=made - found.total())
    print(f"memory {before} kB {growth:+.1%}")
    assert not [status for status in found if status >= "500"]
    assert found["200"] > EXAMPLES
    assert growth < 0.05


def test_hostile_bytes_are_refused(small: ServerProcess) -> None:
    """Each with an answer of the 400s or a closed connection, and the next request is answered."""
    path = f"/v1/models/{small.name}:predict"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    lines = [
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"A" * 100_000,
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        head + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        head + b"Content-Length: 1000\r\n\r\n{",  # and then nothing: the connection is closed
    ]
    for sent in lines:
        assert first_line(small, sent)[:10] in (b"", b"HTTP/1.1 4"), sent[:80]
    deep = b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bodies = [b"", b"null", b"[]", b"\xff\xfe", deep, b'{"instances": [' + b"{}," * 100_000 + b"{}]}", b"{" * 10]
    bodies += [json.dumps({"instances": [field]}).encode() for field in hostile_fields()]
    for body in bodies:
        for place in (path, f"/v2/models/{small.name}/infer", "/v1/images/generations", "/v1/images/stream"):
            status, _, answer = ask(small, "POST", place, body)
            assert status in (400, 413, 422), (place, body[:80], status)
            assert len(json.dumps(answer)) < 20_000
    assert ask(small, "POST", path, b"x" * 2_000_000)[0] == 413
    assert small.predict({"prompt": "a red circle"})["num_steps"] == 2


def hostile_fields() -> list[Any]:
    """Instances that are wrong in ways that no schema thinks of."""
    return [
        {"prompt": "a", "seed": 10**400},
        {"prompt": "a", "guidance_scale": 10**400},
        {"prompt": "a", "steering": {"shapes_verifier": 10**400}},
        {"prompt": "a", "steering": {"\u202e" * 1000: 1}},
        {"prompt": "a", "steering": {"__class__": 1}},
        {"prompt": "\ud800", "num_steps": "2"},
        {"prompt": "a" * 900_000},
        {"prompt": ["a"]},
        {"prompt": "a", "count": True},
        {"prompt": "a", "size": "1000000x1000000"},
        {"prompt": "a", "method": "os:system"},
        {"prompt": "a", "policy": "../base"},
    ]


def first_line(server: ServerProcess, sent: bytes) -> bytes:
    """Of what the server says to these bytes, after which the connection is half closed."""
    place = urlsplit(server.address)
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(65536).partition(b"\r\n")[0]
        except (ConnectionResetError, BrokenPipeError):
            return b""


def test_a_thousand_requests_at_once_are_all_right(exported_folder: Path) -> None:
    """1,000 of several kinds, 16 at a time: each answer is, byte for byte, what the same request gets alone."""
    kinds: list[dict[str, Any]] = [
        {"method": "none"},
        {"method": "none", "policy": "base"},
        {"method": "none", "guidance_scale": 3.0},
        {"method": "value_gradient", "steering": {"shapes_verifier": 3.0}},
        {"method": "value_gradient", "steering": {"jpeg_compressibility": -2.0}},
        {"method": "resampling", "particles": 2},
    ]
    asked = [
        {"prompt": f"{kind} circle", "seed": seed, "num_steps": 3} for kind in ("a red", "a blue") for seed in range(5)
    ]
    asked = [one | kind for one in asked for kind in kinds]
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server, ThreadPoolExecutor(16) as pool:
        alone = [server.predict(one) for one in asked]
        order = [(7 * index) % len(asked) for index in range(1000)]
        together = list(pool.map(lambda index: server.predict(asked[index]), order))
        metrics = ask(server, "GET", "/metrics")[2]
    wrong = [index for index, answer in zip(order, together, strict=True) if answer != alone[index]]
    assert (len(together), wrong) == (1000, [])
    batches, images = (
        float(re.findall(rf"latentac_batch_images_{name} (\S+)", metrics)[0]) for name in ("count", "sum")
    )
    print(f"{images / batches:.2f} images per batch")
    assert images / batches > 1.2  # they did share


def test_sigterm_under_load_answers_what_was_accepted(exported_folder: Path) -> None:
    """Eight callers keep asking; after SIGTERM each answer that has begun is whole and right, every other attempt is
    refused before it begins, and the process ends with code 0."""
    answered: list[tuple[int, Any]] = []
    refused: list[OSError] = []
    broken: list[Exception] = []
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server:
        path = f"/v1/models/{server.name}:predict"
        body = json.dumps({"instances": [{"prompt": "a red circle", "num_steps": 40, "count": 2}]})
        expected = ask(server, "POST", path, body.encode())[2]

        def caller() -> None:
            while not refused:
                connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=300)
                try:
                    connection.connect()
                except ConnectionRefusedError as error:
                    refused.append(error)
                    return
                try:
                    connection.request("POST", path, body, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    answered.append((answer.status, json.loads(answer.read())))
                except (OSError, http.client.HTTPException) as error:
                    broken.append(error)
                finally:
                    connection.close()

        callers = [threading.Thread(target=caller) for _ in range(8)]
        for thread in callers:
            thread.start()
        time.sleep(3)
        os.kill(server.pid, signal.SIGTERM)
        for thread in callers:
            thread.join(600)
        assert server.wait(600) == 0
        log = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    assert len(answered) >= 8
    assert all(answer == (200, expected) for answer in answered)
    # A connection that the kernel took and the server had not yet may end without an answer; it was never accepted.
    assert all(line["status"] == 200 for line in log)
    assert len(broken) <= 8
    print(f"{len(answered)} answered, {len(broken)} never accepted")

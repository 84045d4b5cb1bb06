"""Each way to ask a real server for images, and what an operator sees of it."""

import asyncio
import base64
import gzip
import http.client
import json
import logging
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI

from latentac.serving.model import SteeredDiffusion
from latentac.serving.process import ServerProcess
from latentac.serving.routes import Routes
from tests.latentac.serving.conftest import READY_SECONDS, changed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ASKED: dict[str, Any] = {"prompt": "a red circle", "seed": 7, "num_steps": 3}


@pytest.fixture(scope="module")
def server(exported_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server:
        yield server


def ask(server: ServerProcess, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers, and the JSON or text of the answer."""
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=120)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    kind = {} if content is None else {"Content-Type": "application/json"}
    connection.request(method, path, content, {**kind, **headers})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    is_json = answer.headers.get_content_type() == "application/json" and method != "HEAD"
    return answer.status, answer.headers, json.loads(text) if is_json else text


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of each event of a stream."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("event: "):
            name, data = block.removeprefix("event: ").split("\ndata: ")
            found.append((name, json.loads(data)))
    return found


def tensor(name: str, datatype: str, *data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [len(data)], "data": list(data)}


def test_all_protocols_draw_the_same_image(server: ServerProcess) -> None:
    """V1, V2, OpenAI's and the stream, with one seed: the same PNG, byte for byte, and the same figures."""
    fields = ASKED | {"steering": {"shapes_verifier": 2.0}, "method": "resampling", "particles": 3}
    first = server.predict(fields)
    inputs = [
        tensor("prompt", "BYTES", "a red circle"),
        tensor("seed", "INT64", 7),
        tensor("num_steps", "INT32", 3),
        tensor("steering", "BYTES", '{"shapes_verifier": 2.0}'),
        tensor("method", "BYTES", "resampling"),
        tensor("particles", "INT64", 3),
    ]
    status, _, second = ask(server, "POST", f"/v2/models/{server.name}/infer", {"id": "x", "inputs": inputs})
    outputs = {one["name"]: one for one in second["outputs"]}
    assert (status, second["id"], second["model_version"]) == (200, "x", "some-version")
    assert (outputs["image"]["shape"], outputs["image"]["datatype"]) == ([1], "BYTES")
    status, _, third = ask(server, "POST", "/v1/images/generations", {"model": server.name, "n": 1, **fields})
    assert status == 200
    status, headers, text = ask(server, "POST", "/v1/images/stream", fields)
    assert (status, headers.get_content_type()) == (200, "text/event-stream")
    name, last = events(text)[-1]
    assert name == "image"
    images = [first["images"], outputs["image"]["data"], [third["data"][0]["b64_json"]], last["images"]]
    assert all(image == images[0] for image in images)
    found = {key: value for key, value in first.items() if key != "images"}
    assert json.loads(outputs["metadata"]["data"][0]) == third["latentac"] == found
    assert last == first
    assert base64.b64decode(images[0][0]).startswith(b"\x89PNG")


def long_prompt_on_every_route(server: ServerProcess) -> list[tuple[int, Any]]:
    """Status and answer of V1, V2, OpenAI's and the stream, for a prompt of 18 tokens where 16 are read."""
    text = "a red circle left of a blue square above a green triangle and four yellow squares"
    fields = {"prompt": text, "num_steps": 2, "method": "none"}
    inputs = [tensor("prompt", "BYTES", "a red circle", text), tensor("num_steps", "INT64", 2)]
    return [
        ask(server, "POST", path, body)[::2]
        for path, body in (
            (f"/v1/models/{server.name}:predict", {"instances": [{"prompt": "a red circle"}, fields]}),
            (f"/v2/models/{server.name}/infer", {"inputs": inputs}),
            ("/v1/images/generations", fields),
            ("/v1/images/stream", fields),
        )
    ]


def test_a_prompt_that_would_be_cut_is_refused_on_every_route(server: ServerProcess) -> None:
    """422 with the field, its tokens and the model's number, which the options name."""
    paths = []
    for status, answer in long_prompt_on_every_route(server):
        assert status == 422
        (problem,) = answer["problems"]
        assert problem["problem"] == "has 18 tokens, and the model reads 16"
        paths.append(problem["field"])
    assert paths == ["instances.1.prompt", "instances.1.prompt", "prompt", "prompt"]
    assert ask(server, "GET", "/v1/images/options")[2]["limits"]["max_tokens"] == 16


def test_every_route_says_that_a_prompt_was_cut(exported_folder: Path, tmp_path: Path) -> None:
    """Where the model's latentac.json allows it."""
    folder = changed(exported_folder, tmp_path, limits={"allow_truncation": True})
    with ServerProcess(folder, ready_seconds=READY_SECONDS) as server:
        (_, first), (_, second), (_, third), (_, stream) = long_prompt_on_every_route(server)
    outputs = {one["name"]: one for one in second["outputs"]}
    reported = [
        *first["predictions"],
        *map(json.loads, outputs["metadata"]["data"]),
        third["latentac"],
        events(stream)[-1][1],
    ]
    found = [(one["tokens"], one["truncated"]) for one in reported]
    assert found == [(5, False), (18, True), (5, False), (18, True), (18, True), (18, True)]


def test_a_body_has_room_for_the_longest_prompt(exported_folder: Path, tmp_path: Path) -> None:
    """Of as many characters as the limits say, escaped as JSON has it; a longer body is refused with the bound."""
    limits = {"allow_truncation": True, "max_prompt_characters": 200_000, "max_images": 1}
    with ServerProcess(changed(exported_folder, tmp_path, limits=limits), ready_seconds=READY_SECONDS) as server:
        path = f"/v1/models/{server.name}:predict"
        prompt = "\N{SNOWMAN}" * 200_000
        assert len(json.dumps(prompt)) > 1_000_000
        assert ask(server, "POST", path, {"instances": [ASKED | {"prompt": prompt}]})[0] == 200
        longer = gzip.compress(json.dumps({"instances": [ASKED | {"prompt": prompt * 3}]}).encode())
        status, _, answer = ask(server, "POST", path, longer, **{"Content-Encoding": "gzip"})
        assert (status, answer["problems"][0]["remedy"]) == (413, "Send at most 2410000.")


def test_v2_takes_several_prompts_and_names_its_outputs(server: ServerProcess) -> None:
    """An input of one element holds for all; only what was asked for comes back."""
    inputs = [tensor("prompt", "BYTES", "a red circle", "two blue squares"), tensor("num_steps", "INT64", 2)]
    path, body = f"/v2/models/{server.name}/infer", {"inputs": inputs, "outputs": [{"name": "metadata"}]}
    status, _, answer = ask(server, "POST", path, body)
    assert (status, [one["name"] for one in answer["outputs"]]) == (200, ["metadata"])
    assert len(answer["outputs"][0]["data"]) == 2
    metadata = ask(server, "GET", f"/v2/models/{server.name}")[2]
    assert {"name": "prompt", "datatype": "BYTES", "shape": [-1]} in metadata["inputs"]


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2], ["a red circle", "two blue squares"]),
        ([2, 1], [["a red circle"], ["two blue squares"]]),
        ([1, 2], [["a red circle", "two blue squares"]]),
        ([2, 1], ["a red circle", "two blue squares"]),
    ],
)
def test_v2_takes_data_nested_as_their_shape_says_or_flat(server: ServerProcess, shape: list[int], data: Any) -> None:
    """Both are V2; one element of no dimension holds for all."""
    prompts = {"name": "prompt", "datatype": "bytes", "shape": shape, "data": data}
    steps = {"name": "num_steps", "datatype": "INT8", "shape": [], "data": [2]}
    body: dict[str, Any] = {
        "inputs": [prompts, steps],
        "outputs": [],
        "id": None,
        "model_name": "any",
        "parameters": {},
    }
    status, _, answer = ask(server, "POST", f"/v2/models/{server.name}/infer", body)
    expected = [
        server.predict({"prompt": prompt, "num_steps": 2})["images"][0]
        for prompt in ("a red circle", "two blue squares")
    ]
    assert (status, answer["outputs"][0]["data"]) == (200, expected)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "has no input `prompt`"),
        ([tensor("promt", "BYTES", "a")], 'Did you mean "prompt"?'),
        ([tensor("prompt", "INT64", 1)], "inputs.0.datatype = 'INT64': is not that of prompt. Use BYTES."),
        ([tensor("prompt", "BYTES", "a") | {"shape": [2]}], "does not fit 1 elements"),
        ([tensor("prompt", "BYTES", "a"), tensor("seed", "INT64", 1, 2)], "inputs.seed = 2: is the number of elements"),
        ([tensor("prompt", "BYTES", "a")] * 2, "an input is given twice"),
        ([tensor("prompt", "BYTES", "a"), tensor("steering", "BYTES", "x")], "instances.0.steering"),
        ([tensor("prompt", "BYTES", "")], "instances.0.prompt = ''"),
        ([tensor("prompt", "BYTES", ["a"])], "instances.0.prompt = ['a']"),
        ([tensor("prompt", "BYTES", "a"), tensor("seed", "BOOL", True)], "is not that of seed. Use INT64."),
        ([tensor("prompt", "BYTES", "a"), tensor("seed", "FP32", 1.0)], "is not that of seed. Use INT64."),
        ([tensor("prompt", "BYTES", "a"), tensor("n", "INT64", 1)], "inputs.1.name = 'n': no such input."),
        (3, "inputs = 3"),
    ],
)
def test_a_wrong_tensor_is_reported(server: ServerProcess, inputs: Any, message: str) -> None:
    """422, with the tensor and the remedy."""
    status, _, answer = ask(server, "POST", f"/v2/models/{server.name}/infer", {"inputs": inputs})
    assert (status, message in answer["error"]) == (422, True), answer


def test_openais_errors_have_its_form(server: ServerProcess) -> None:
    """A client of theirs reads `error.message` and `error.param`."""
    status, _, answer = ask(server, "POST", "/v1/images/generations", {"prompt": "a", "n": 99})
    assert (status, answer["error"]["param"], answer["error"]["type"]) == (422, "n", "invalid_request_error")
    assert "Use at most 8." in answer["error"]["message"]


def test_the_stream_has_the_values_as_they_come(server: ServerProcess) -> None:
    """Queued, then each step in order, then the image; the last step's value is the image's own."""
    found = events(ask(server, "POST", "/v1/images/stream", ASKED | {"policy": "base"})[2])
    assert [name for name, _ in found] == ["queued", "step", "step", "step", "image"]
    steps, image = [content for name, content in found if name == "step"], found[-1][1]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert image["policy"] == "base"
    for name, [values] in image["values"].items():
        assert [step["values"][name][0] for step in steps] == pytest.approx(values)
    status, _, refused = ask(server, "POST", "/v1/images/stream", {"prompt": ""})
    assert (status, refused["problems"][0]["field"]) == (422, "prompt")


def test_the_page_loads_nothing_from_elsewhere(server: ServerProcess) -> None:
    """Served by this process, under a policy that allows no other origin and no inline script."""
    status, headers, text = ask(server, "GET", "/", Accept="text/html,*/*;q=0.8")
    assert (status, headers.get_content_type()) == (200, "text/html")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.findall(r"(?:src|href|action)\s*=\s*[\"']?(?:\w+:)?//", text)
    assert [ask(server, "GET", f"/page/{name}")[0] for name in ("page.css", "page.js", "../model.py")] == [
        200,
        200,
        404,
    ]


def test_the_options_are_what_may_be_asked_for(server: ServerProcess) -> None:
    """Each method that they list draws; each limit that they state holds."""
    options = ask(server, "GET", "/v1/images/options")[2]
    assert options["size"] == [32, 32]
    assert options["policies"] == ["trained", "base"]
    for method in options["methods"]:
        fields = {"prompt": "a", "num_steps": 2, "method": method["name"], "size": "32x32"}
        assert server.predict(fields)["particles"] == method["particles"]
    fields = options["fields"]
    assert fields == ask(server, "GET", "/openapi.json")[2]["components"]["schemas"]["Request"]["properties"]
    assert fields["num_steps"]["anyOf"][0]["maximum"] == options["limits"]["max_steps"] == 100
    assert all(options["defaults"][name] == fields[name]["default"] for name in ("count", "seed", "guidance_scale"))
    too_many = {"prompt": "a", "num_steps": options["limits"]["max_steps"] + 1}
    assert ask(server, "POST", "/v1/images/stream", too_many)[0] == 422


def test_an_operator_sees_numbers_and_no_prompts(exported_folder: Path, tmp_path: Path) -> None:
    """Metrics by protocol, method and status; a line of JSON a request, with the caller's id and without the prompt."""
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server:
        body = {"instances": [ASKED | {"prompt": "a secret circle", "method": "none"}]}
        headers = ask(server, "POST", f"/v1/models/{server.name}:predict", body, **{"X-Request-Id": "mine-1"})[1]
        assert headers["X-Request-Id"] == "mine-1"
        ask(server, "POST", f"/v1/models/{server.name}:predict", b"{", **{"X-Request-Id": "bad id"})
        metrics = ask(server, "GET", "/metrics")[2]
        log = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    assert 'latentac_requests_total{protocol="v1",status="200"} 1.0' in metrics
    assert 'latentac_requests_total{protocol="v1",status="400"} 1.0' in metrics
    assert 'latentac_function_evaluations_total{method="none"} 3.0' in metrics
    assert "latentac_queued_images 0.0" in metrics
    for name in ("request_seconds", "wait_seconds", "batch_images", "batch_seconds"):
        assert f"latentac_{name}_count" in metrics
    assert [(line["request"] == "mine-1", line["status"]) for line in log] == [(True, 200), (False, 400)]
    assert log[0]["asked"][0]["seed"] == 7
    assert "secret" not in json.dumps(log)


def test_a_full_queue_says_when_to_come_back(exported_folder: Path, tmp_path: Path) -> None:
    """429 with Retry-After; whoever comes back then is answered."""
    folder = changed(exported_folder, tmp_path, batching={"max_queued_images": 2})
    long = ASKED | {"num_steps": 50, "method": "twisted", "particles": 8}
    with ServerProcess(folder, ready_seconds=READY_SECONDS) as server, ThreadPoolExecutor(12) as pool:
        path = f"/v1/models/{server.name}:predict"
        answers = list(pool.map(lambda s: ask(server, "POST", path, {"instances": [long | {"seed": s}]}), range(12)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429}
        refused = next(answer for answer in answers if answer[0] == 429)
        assert int(refused[1]["Retry-After"]) >= 1
        assert refused[2]["problems"][0]["remedy"].startswith("Ask again in")
        assert ask(server, "POST", path, {"instances": [ASKED]})[0] == 200


def test_a_request_that_takes_too_long_is_given_up(exported_folder: Path, tmp_path: Path) -> None:
    """503 after the time that a request may take; its work ends, so the next one is answered."""
    folder = changed(exported_folder, tmp_path, batching={"request_seconds": 0.5})
    long = ASKED | {"num_steps": 100, "method": "twisted", "particles": 32, "count": 8}
    with ServerProcess(folder, ready_seconds=READY_SECONDS) as server:
        status, headers, answer = ask(server, "POST", f"/v1/models/{server.name}:predict", {"instances": [long]})
        assert (status, int(headers["Retry-After"]) >= 1) == (503, True)
        assert "not drawn within 0.5 s" in answer["error"]
        status, _, text = ask(server, "POST", "/v1/images/stream", long)
        assert (status, events(text)[-1][0]) == (200, "error")
        deadline = time.monotonic() + 100
        while ask(server, "POST", f"/v1/models/{server.name}:predict", {"instances": [ASKED]})[0] != 200:
            assert time.monotonic() < deadline


def test_whoever_goes_away_has_its_work_ended(server: ServerProcess) -> None:
    """A closed connection leaves nothing in the queue: neither a prediction's nor a stream's."""
    long = ASKED | {"num_steps": 100, "method": "twisted", "particles": 32, "count": 8}
    place = urlsplit(server.address).netloc
    for path, body in ((f"/v1/models/{server.name}:predict", {"instances": [long]}), ("/v1/images/stream", long)):
        for _ in range(4):
            connection = http.client.HTTPConnection(place, timeout=60)
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            time.sleep(0.3)
            connection.close()
    began = time.monotonic()
    assert server.predict(ASKED)["num_steps"] == 3
    assert time.monotonic() - began < 30  # eight times 8 images of 32 particles, 100 steps, would take minutes
    assert "latentac_queued_images 0.0" in ask(server, "GET", "/metrics")[2]


@pytest.mark.parametrize("reads", [False, True], ids=["before its first event", "while it waits for the next"])
def test_whoever_leaves_a_stream_has_its_work_ended(
    exported_folder: Path, caplog: pytest.LogCaptureFixture, reads: bool
) -> None:
    """Also where not one byte could be sent: the images are given up, the operator is told 499, and nothing goes on
    waiting."""
    model = SteeredDiffusion("latentac", exported_folder, "cpu")
    model.load()
    app = FastAPI()
    Routes(model, prompts=False).register(app)
    body = ASKED | {"num_steps": 100, "method": "twisted", "particles": 32, "count": 8}

    messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.sleep(0.3)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if not reads:
            await asyncio.Event().wait()

    async def left() -> list[Any]:
        await asyncio.wait_for(app(scope, receive, send), 60)
        await asyncio.sleep(0.2)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    scope = {"type": "http", "method": "POST", "path": "/v1/images/stream", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")]}
    with caplog.at_level(logging.INFO, "latentac.requests"):
        assert asyncio.run(left()) == []
    began = time.monotonic()
    model.close()
    assert time.monotonic() - began < 30  # 8 images of 32 particles, 100 steps, take longer
    assert [json.loads(line.getMessage())["status"] for line in caplog.records] == [499]

"""The protocols' own clients on a real server: what they send by default is understood, and so is the answer."""

import asyncio
import functools
import gzip
import http.client
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from kserve import InferenceRESTClient, InferInput, InferRequest, InferResponse, RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from kserve.utils.numpy_codec import from_np_dtype

from latentac.serving.process import ServerProcess
from tests.latentac.serving.conftest import READY_SECONDS
from tests.latentac.serving.test_protocols import ASKED, ask, tensor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HEADER = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def server(exported_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def seed_of(answer: openai.types.ImagesResponse) -> int:
    """The seed that an answer tells."""
    reported: dict[str, Any] = (answer.model_extra or {})["latentac"]
    return int(reported["seed"])


# OpenAI's client


def test_two_calls_of_openais_client_give_two_images(client: openai.OpenAI, server: ServerProcess) -> None:
    """Without a seed each call draws a fresh one; the seed that is told gives the same image again, by V1 too."""
    first, second = (client.images.generate(prompt="a red circle", extra_body={"num_steps": 3}) for _ in range(2))
    assert seed_of(first) != seed_of(second)
    assert first.data
    assert second.data
    assert first.data[0].b64_json != second.data[0].b64_json
    fields = {"num_steps": 3, "seed": seed_of(first)}
    again = client.images.generate(prompt="a red circle", extra_body=fields)
    assert again.data == first.data
    assert server.predict({"prompt": "a red circle", **fields})["images"] == [first.data[0].b64_json]
    assert (first.size, first.output_format, first.background) == ("32x32", "png", "opaque")


def test_kserves_protocols_draw_the_same_image_without_a_seed(server: ServerProcess) -> None:
    """Seed 0: a retry is answered as its first try was."""
    assert server.predict({"prompt": "a", "num_steps": 2}) == server.predict({"prompt": "a", "num_steps": 2, "seed": 0})
    inputs = [tensor("prompt", "BYTES", "a"), tensor("num_steps", "INT64", 2)]
    answer = ask(server, "POST", f"/v2/models/{server.name}/infer", {"inputs": inputs})[2]
    assert json.loads(answer["outputs"][1]["data"][0])["seed"] == 0


def test_openais_client_may_send_each_default(client: openai.OpenAI, server: ServerProcess) -> None:
    """All of its defaults together, and null for what it has not set."""
    answer = client.images.generate(
        prompt="a red circle",
        model=server.name,
        n=None,
        size="auto",
        quality="auto",
        style="vivid",
        background="auto",
        moderation="auto",
        output_format="png",
        output_compression=100,
        partial_images=0,
        stream=False,
        user="somebody",
        extra_body={"seed": 7, "num_steps": 3, "response_format": None, "steering": None},
    )
    assert answer.data
    assert [answer.data[0].b64_json] == server.predict(ASKED)["images"]


def test_openais_client_learns_what_is_not_available(client: openai.OpenAI) -> None:
    """An exception of its own, with the field and the remedy."""
    with pytest.raises(openai.UnprocessableEntityError, match="POST /v1/images/stream answers by events") as caught:
        client.images.generate(prompt="a", stream=True)
    assert caught.value.param == "stream"
    with pytest.raises(openai.NotFoundError, match="Use latentac"):
        client.images.generate(prompt="a", model="gpt-image-2")


def test_both_clients_read_the_same_answer_about_models(client: openai.OpenAI, server: ServerProcess) -> None:
    """OpenAI's lists and retrieves; KServe's sees that the model is ready; and the answer has both forms."""
    listed = client.models.list()
    assert [(one.id, one.object, one.owned_by) for one in listed] == [(server.name, "model", "latentac")]
    one = client.models.retrieve(server.name)
    assert one == listed.data[0]
    assert one.created > 1_500_000_000
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert ask(server, "GET", "/v1/models")[2].keys() == {"models", "object", "data"}
    assert ask(server, "GET", "/v1/models")[2]["models"] == [server.name]

    async def states() -> list[bool]:
        async with (
            InferenceRESTClient(RESTConfig(protocol="v1")) as first,
            InferenceRESTClient(RESTConfig(protocol="v2")) as second,
        ):
            return [
                await first.is_server_live(server.address),
                await first.is_model_ready(server.address, server.name),
                await second.is_server_live(server.address),
                await second.is_server_ready(server.address),
                await second.is_model_ready(server.address, server.name),
                not await second.is_model_ready(server.address, "other"),
            ]

    assert asyncio.run(states()) == [True] * 6


# KServe's client


def infer(server: ServerProcess, request: InferRequest | dict[str, Any], protocol: str = "v2") -> Any:
    """What KServe's own client makes of the answer."""

    async def asked() -> Any:
        async with InferenceRESTClient(RESTConfig(protocol=protocol)) as client:
            return await client.infer(server.address, request, model_name=server.name)

    return asyncio.run(asked())


def inputs_of(shape: list[int], integer: Any, number: Any, *, binary: bool) -> list[InferInput]:
    """ASKED in numpy arrays, as KServe's client is given them."""
    found = []
    for name, value, kind in (
        ("prompt", ASKED["prompt"], np.object_),
        ("seed", ASKED["seed"], integer),
        ("num_steps", ASKED["num_steps"], integer),
        ("guidance_scale", 1, number),
    ):
        array = np.array(value, dtype=kind).reshape(shape)
        one = InferInput(name, list(array.shape), from_np_dtype(array.dtype))
        one.set_data_from_numpy(array, binary_data=binary)
        found.append(one)
    return found


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(
    ("shape", "integer", "number"),
    [
        ([1], np.int64, np.float32),
        ([1, 1], np.int32, np.float64),
        ([], np.uint8, np.int64),
        ([1], np.uint64, np.float64),
    ],
)
def test_kserves_client_works_with_its_defaults(
    server: ServerProcess, shape: list[int], integer: Any, number: Any, binary: bool
) -> None:
    """Binary tensors, which are its default, of any shape and type of number; the same image as by V1."""
    request = InferRequest("any", inputs_of(shape, integer, number, binary=binary), request_id="mine")
    answer: InferResponse = infer(server, request)
    first = infer(server, {"instances": [ASKED]}, "v1")["predictions"][0]
    assert answer.get_output_by_name("image").as_numpy().tolist() == first["images"]
    metadata = json.loads(answer.get_output_by_name("metadata").as_numpy()[0])
    assert metadata == {name: value for name, value in first.items() if name != "images"}
    assert answer.id == "mine"


@pytest.mark.parametrize("binary", [True, False])
def test_several_prompts_in_a_column_or_a_row(server: ServerProcess, binary: bool) -> None:
    """Bytes or texts, beyond ASCII; one steering for all of them."""
    texts = ["a red circle", "grüne Kreise"]
    expected = [server.predict({"prompt": text, "num_steps": 2})["images"][0] for text in texts]
    for shape in ([2], [2, 1], [1, 2]):
        prompts = np.array([text.encode() for text in texts], dtype=np.object_).reshape(shape)
        one = InferInput("prompt", shape, "BYTES")
        one.set_data_from_numpy(prompts, binary_data=binary)
        steps = InferInput("num_steps", [1], "INT32")
        steps.set_data_from_numpy(np.array([2], np.int32))
        answer = infer(server, InferRequest(server.name, [one, steps]))
        assert answer.get_output_by_name("image").as_numpy().tolist() == expected


@pytest.mark.parametrize(
    ("parameters", "outputs", "binary"),
    [
        ({}, None, []),
        ({"binary_data_output": True}, None, ["image", "metadata"]),
        ({}, [("image", {"binary_data": True})], ["image"]),
        ({"binary_data_output": True}, [("image", None), ("metadata", {"binary_data": False})], ["image"]),
        ({"priority": 1, "timeout": 5, "content_type": "str"}, [("metadata", None)], []),
    ],
)
def test_outputs_are_binary_where_that_is_asked_for(
    server: ServerProcess, parameters: dict[str, Any], outputs: list[tuple[str, Any]] | None, binary: list[str]
) -> None:
    """An output's own parameter goes before the request's; the content is the same."""
    wanted = [RequestedOutput(*one) for one in outputs] if outputs else None
    inputs = inputs_of([1], np.int64, np.float32, binary=True)
    request = InferRequest(server.name, inputs, parameters=parameters, request_outputs=wanted)
    answer: InferResponse = infer(server, request)
    assert [one.name for one in answer.outputs] == [name for name, _ in outputs or [("image", 0), ("metadata", 0)]]
    assert [one.name for one in answer.outputs if (one.parameters or {}).get("binary_data_size")] == []
    for one in answer.outputs:
        if one.name == "image":
            assert one.as_numpy().tolist() == server.predict(ASKED)["images"]
    body, length = request.to_rest()
    assert isinstance(body, bytes)
    head, sent = raw(server, body, {HEADER: str(length)})
    found = json.loads(sent[: int(head[HEADER])] if head[HEADER] else sent)["outputs"]
    assert [one["name"] for one in found if "binary_data_size" in one.get("parameters", {})] == binary
    assert head.get_content_type() == ("application/octet-stream" if binary else "application/json")


def raw(server: ServerProcess, body: bytes, headers: dict[str, str], path: str = "") -> tuple[Any, bytes]:
    """Headers and bytes of the answer; the status is in `status` of the headers."""
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=120)
    form = {"Content-Type": "application/json"}
    connection.request("POST", path or f"/v2/models/{server.name}/infer", body, {**form, **headers})
    answer = connection.getresponse()
    content, head = answer.read(), answer.headers
    connection.close()
    head["status"] = str(answer.status)
    return head, content


def one_input(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", **fields}]}


def seed_input(size: int, datatype: str = "INT64", name: str = "seed") -> dict[str, Any]:
    """A prompt in the JSON, and another input as bytes."""
    fields = {"name": name, "shape": [1], "datatype": datatype, "parameters": {"binary_data_size": size}}
    return {"inputs": [tensor("prompt", "BYTES", "a"), fields]}


def size(number: Any) -> dict[str, Any]:
    return {"parameters": {"binary_data_size": number}}


@pytest.mark.parametrize(
    ("body", "binary", "message"),
    [
        (one_input(**size(5)), b"\x01\0\0\0a", ""),
        (one_input(**size(5)), b"", "inputs.0.parameters.binary_data_size = 5: bytes are not there, but 0."),
        (one_input(**size(2**62)), b"\x01\0\0\0a", "bytes are not there, but 5."),
        (one_input(**size(-1)), b"", "inputs.0.parameters.binary_data_size = -1"),
        (one_input(**size(True)), b"", "inputs.0.parameters.binary_data_size = True"),
        (one_input(**size("5")), b"\x01\0\0\0a", "inputs.0.parameters.binary_data_size = '5'"),
        (one_input(**size(4)), b"\x01\0\0\0a", "body = 1: bytes belong to no input."),
        (one_input(**size(5), data=["a"]), b"\x01\0\0\0a", "is given twice"),
        (one_input(), b"\x01\0\0\0a", "inputs.0.data = None: is required."),
        (one_input(**size(3)), b"\x01\0\0", "is the element that the bytes end in"),
        (one_input(**size(8)), b"\xff\xff\xff\xffabcd", "is the element that the bytes end in"),
        (one_input(**size(5)), b"\x01\0\0\0\xff", "is not UTF-8"),
        (one_input(**size(10)), b"\x01\0\0\0a" * 2, "inputs.0.shape = [1]: does not fit 2 elements."),
        (one_input(**size(400_000)), b"\0" * 400_000, "inputs.0.shape = [1]: does not fit 100000 elements."),
        (one_input(**size(0)), b"", "does not fit 0 elements."),
        (one_input(shape=[-1, -1], **size(5)), b"\x01\0\0\0a", "does not fit"),
        (one_input(shape=[1] * 9, **size(5)), b"\x01\0\0\0a", "does not fit"),
        (one_input(shape=[2**70], **size(5)), b"\x01\0\0\0a", "does not fit"),
        (seed_input(8), struct.pack("<q", 3), ""),
        (seed_input(7), b"\0" * 7, "is not a multiple of 8. Use 8 bytes an element."),
        (seed_input(8), struct.pack("<q", -1), "instances.0.seed = -1"),
        (seed_input(1, "BOOL"), b"\1", "inputs.1.datatype = 'BOOL': is not that of seed. Use INT64."),
        (seed_input(8, "FP64"), struct.pack("<d", 3), "is not that of seed. Use INT64."),
        (seed_input(2, "BF16"), b"\0\0", "is not that of seed. Use INT64."),
        (seed_input(4, "FP32", "guidance_scale"), struct.pack("<f", 2.5), ""),
        (seed_input(4, "FP32", "guidance_scale"), struct.pack("<f", np.nan), "not a finite number"),
        (seed_input(2, "FP16", "guidance_scale"), struct.pack("<e", np.inf), "not a finite number"),
        (one_input(parameters={"shared_memory_region": "x"}), b"", "inputs.0.parameters.shared_memory_region = 'x'"),
        (one_input(data=["a"]) | {"parameters": {"seed": 3}}, b"", "Send it as an input of its own."),
        (one_input(data=["a"]) | {"parameters": {"sequence_id": 3}}, b"", "parameters.sequence_id = 3: unknown field."),
        (one_input(data=["a"]) | {"ouputs": []}, b"", 'ouputs = []: unknown field. Did you mean "outputs"?'),
        (one_input(data=["a"], nmae="x"), b"", "inputs.0.nmae = 'x': unknown field. Did you mean \"name\"?"),
        (
            one_input(data=["a"]) | {"outputs": [{"name": "image", "parameters": {"classification": 3}}]},
            b"",
            "outputs.0.parameters.classification = 3: unknown field.",
        ),
    ],
)
def test_a_wrong_binary_body_is_the_callers_mistake(
    server: ServerProcess, body: dict[str, Any], binary: bytes, message: str
) -> None:
    """422 with the place and the remedy, in few words; never a 500."""
    content = json.dumps(body).encode()
    head, answer = raw(server, content + binary, {HEADER: str(len(content))})
    if not message:
        assert head["status"] == "200", answer
        return
    reported = json.loads(answer)
    assert (head["status"], message in reported["error"]) == ("422", True), reported
    assert len(answer) < 5_000


@pytest.mark.parametrize("length", ["", "-1", "+2", "1e1", "0x2", "99999", "9" * 400, "2.0", "²", "None"])
def test_a_wrong_length_of_the_json_is_the_callers_mistake(server: ServerProcess, length: str) -> None:
    """400, as for a body that is no JSON; so is one that cuts the JSON."""
    head, answer = raw(server, b"{}", {HEADER: length})
    assert (head["status"], HEADER in json.loads(answer)["error"]) == ("400", True)
    content = json.dumps(one_input(data=["a"])).encode()
    assert raw(server, content, {HEADER: "10"})[0]["status"] == "400"
    assert raw(server, content, {HEADER: "0"})[0]["status"] == "400"


def test_one_version_is_served(server: ServerProcess) -> None:
    """It may stand in the address, as V2 has it; any other is not there."""
    path, body = f"/v2/models/{server.name}/versions/", {"inputs": [tensor("prompt", "BYTES", "a")]}
    for version, expected in (("some-version", 200), ("1", 404)):
        assert ask(server, "POST", f"{path}{version}/infer", body)[0] == expected
        assert ask(server, "GET", f"{path}{version}/ready")[0] == expected
        assert ask(server, "GET", f"{path}{version}")[0] == expected
    assert ask(server, "GET", f"/v2/models/{server.name}")[2]["versions"] == ["some-version"]
    assert "Use some-version." in ask(server, "POST", f"{path}1/infer", body)[2]["error"]


# Any client

BODY = json.dumps({"instances": [{"prompt": "a", "num_steps": 2}]}).encode()
# The time of compression is part of gzip's header. Test names hold these bytes and must be equal in every worker.
zipped = functools.partial(gzip.compress, mtime=0)


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        (zipped(BODY), {"Content-Encoding": "gzip"}, 200),
        (zipped(BODY), {"Content-Encoding": "GZIP, identity"}, 200),
        (zlib.compress(BODY), {"Content-Encoding": "deflate"}, 200),
        (BODY, {"Content-Encoding": "identity"}, 200),
        (b"\xef\xbb\xbf" + BODY, {"Content-Type": "application/json; charset=utf-8"}, 200),
        (BODY, {"Content-Type": "application/octet-stream", "Accept": "application/xml"}, 200),
        (BODY, {"Content-Type": "text/plain"}, 415),
        (zipped(BODY)[:-9], {"Content-Encoding": "gzip"}, 400),
        (zipped(BODY) + b"x", {"Content-Encoding": "gzip"}, 400),
        (BODY, {"Content-Encoding": "gzip"}, 400),
        (b"", {"Content-Encoding": "gzip"}, 400),
        (zipped(b"0" * 50_000_000, 1), {"Content-Encoding": "gzip"}, 413),
        (zipped(zipped(BODY)), {"Content-Encoding": "gzip, gzip"}, 415),
        (BODY, {"Content-Encoding": "br"}, 415),
        (b"--x\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
    ],
)
def test_a_body_may_be_compressed(server: ServerProcess, body: bytes, headers: dict[str, str], expected: int) -> None:
    """Within the bound of any body; what is damaged or not read here is refused, in each protocol alike."""
    path = f"/v1/models/{server.name}:predict"
    assert raw(server, body, headers, path)[0]["status"] == str(expected)
    if expected != 200:
        for other in ("", "/v1/images/generations", "/v1/images/stream"):
            assert raw(server, body, headers, other)[0]["status"] == str(expected)


def test_head_and_slashes_too_many_mean_what_they_do_elsewhere(server: ServerProcess) -> None:
    """As a load balancer, `curl -I` and a joined address send them; HEAD has no body, and POST is not reached by it."""
    for path in ("/", "/v2/health/live", f"/v1/models/{server.name}", "/openapi.json", "/metrics"):
        status, headers, text = ask(server, "HEAD", path)
        assert (status, text, int(headers["Content-Length"]) > 0) == (200, "", True), path
    assert ask(server, "HEAD", "/v1/images/generations")[0] == 405
    expected = server.predict({"prompt": "a", "num_steps": 2})
    for path in (f"/v1/models/{server.name}:predict/", f"//v1//models/{server.name}:predict"):
        status, _, answer = ask(server, "POST", path, BODY)
        assert (status, answer["predictions"]) == (200, [expected])
    assert ask(server, "GET", "/v1/models/")[0] == 200


def test_an_address_that_is_not_here_is_reported(server: ServerProcess) -> None:
    """As a problem like all others, with the one that was meant."""
    status, _, answer = ask(server, "POST", "/images/generations", {"prompt": "a"})
    assert (status, "Did you mean /v1/images/generations?" in answer["error"]) == (404, True)
    status, headers, answer = ask(server, "GET", "/v1/images/generations")
    assert (status, headers["Allow"], answer["problems"][0]["field"]) == (405, "POST", "address")


def test_openais_client_learns_why_an_address_is_not_here(client: openai.OpenAI) -> None:
    """In the object that it reads."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="latentac", messages=[{"role": "user", "content": "a"}])
    assert caught.value.type == "invalid_request_error"
    assert isinstance(caught.value.body, dict)
    assert "/v1/chat/completions" in caught.value.body["message"]
    with pytest.raises(openai.NotFoundError, match=r"model = 'x{80}\.\.\.': is not served here. Use latentac"):
        client.models.retrieve("x" * 500)


def test_the_address_alone_says_that_the_server_lives(server: ServerProcess) -> None:
    """To who does not ask for HTML, as KServe's V1 client; a browser gets the page."""
    assert ask(server, "GET", "/", Accept="*/*")[2] == {"status": "alive"}
    status, headers, _ = ask(server, "GET", "/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert (status, headers.get_content_type()) == (200, "text/html")

"""`latentac reward-server` as a process: its scores, its errors, its end, and a run that depends on it."""

import base64
import gzip
import io
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image

from latentac.config.schema import Reward
from latentac.rewards import REWARDS
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.runs import testing
from latentac.serving import reward_server
from latentac.serving.access import Access
from latentac.serving.reward_server import MOST_BYTES, MOST_IMAGES, Scoring
from latentac.serving.server import address_of, bind
from latentac.system.errors import RewardError
from latentac.worlds.prompts import Prompt
from latentac.worlds.shapes.captions import parse_caption
from latentac.worlds.shapes.scenes import sample_images
from tests.latentac.rewards.servers import READY_SECONDS, RewardServer, free_port
from tests.latentac.workers import RUN, SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SLOW = "tests.latentac.rewards.scored:Slow"
IMAGES = sample_images([parse_caption(prompt) for prompt in testing.PROMPTS], np.random.default_rng(0))
PROMPTS = [Prompt(text, "all", {"more": place}) for place, text in enumerate(testing.PROMPTS)]
BRIGHTNESS = IMAGES.mean((1, 2, 3)) + np.arange(len(PROMPTS))


def remote(url: str, **fields: Any) -> ConfiguredReward:
    own = {"use": "remote", "name": "far", "url": url, "ready_seconds": READY_SECONDS, **fields}
    (reward,) = load_rewards([Reward.model_validate(own)])
    return reward


def png(size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG") -> str:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON, and headers of an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **named})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with RewardServer("jpeg_compressibility") as server:
        yield server


@pytest.mark.parametrize("name", ["shapes_verifier", "jpeg_compressibility", "shapes_clip", "colourfulness"])
def test_scores_are_those_of_the_reward_in_process(name: str) -> None:
    """And so is the unit; the contract of rewards holds over HTTP."""
    here = REWARDS.build(name)
    with RewardServer(name) as server:
        there = remote(server.url, batch_size=3)
        assert there.unit == here.unit
        expected = here(IMAGES, testing.PROMPTS)
        assert there(IMAGES, PROMPTS) == pytest.approx(expected, abs=1e-6)
        testing.check_reward("remote", images=IMAGES, url=server.url, batch_size=1)
        assert server.end(signal.SIGTERM)[0] == 0


def test_health_says_what_is_served(server: RewardServer) -> None:
    """For whoever configures a client."""
    status, content, _ = ask(f"{server.url}/v1/health")
    assert status == 200
    assert content == {
        "reward": "jpeg_compressibility",
        "unit": "minus kB (1000 bytes) of the JPEG file at quality 95",
        "ready": True,
    }


def body(**fields: Any) -> bytes:
    return json.dumps({"images": [png()], "prompts": ["a"], **fields}).encode()


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "is not JSON"),
        (b"{", 400, "is not JSON"),
        (b"[]", 422, "is no JSON object"),
        (b"{}", 422, "images = None: is required"),
        (body(images=[]), 422, "images = "),
        (body(images=[png()] * (MOST_IMAGES + 1)), 422, "at most 256 items"),
        (body(images=[1]), 422, "images.0 = 1"),
        (body(images=["?"]), 422, "images.0 = None: Error: "),
        (body(images=["AAAA"]), 422, "images.0 = None: UnidentifiedImageError"),
        (body(images=[png(kind="JPEG")]), 422, "images.0 = None: UnidentifiedImageError"),
        (body(images=[png()[:40]]), 422, "images.0 = None: "),
        (body(images=[png(mode="RGBA")]), 422, "its mode is RGBA, not RGB"),
        (body(images=[png(mode="I;16")]), 422, "its mode is I;16, not RGB"),
        (body(images=[png((9000, 9000))]), 422, "it has 9000 x 9000 pixels, more than"),
        (body(images=[png((20000, 20000), "1")]), 422, "images.0 = None: DecompressionBombError"),
        (body(images=[png(), png((9, 8))], prompts=["a", "b"]), 422, "has not the size of the first image, 8 x 8"),
        (body(prompts=[]), 422, "prompts = 0: has not the length of images, 1"),
        (body(prompts=["a", "b"]), 422, "prompts = 2: has not the length of images, 1"),
        (body(metadata=[{}, {}]), 422, "metadata = 2: has not the length of images, 1"),
        (body(metadata=["x"]), 422, "metadata.0 = 'x'"),
        (body(more=1), 422, "more = 1: unknown field"),
        (body(metadata=[{"x": [0] * 300_000}]), 400, "has more than 200000 values"),
        (b" " * (MOST_BYTES + 1), 413, "bytes and more are too many"),
    ],
)
def test_a_wrong_request_is_reported_in_one_form(server: RewardServer, content: bytes, status: int, words: str) -> None:
    """What is wrong, where, and what to do; the server goes on."""
    found, answer, _ = ask(f"{server.url}/v1/score", content)
    assert found == status, answer
    assert words in answer["error"]["message"]
    assert answer["problems"][0].keys() == {"field", "value", "problem", "remedy"}
    assert ask(f"{server.url}/v1/score", body())[0] == 200


def test_other_requests_are_reported_in_the_same_form(server: RewardServer) -> None:
    """Another address, method, content type, compression, and host."""
    bomb = gzip.compress(b" " * (MOST_BYTES + 1))
    for path, content, headers, status, words in (
        ("/", None, {}, 404, "Use POST /v1/score or GET /v1/health."),
        ("/v1/score", None, {}, 405, "method not allowed"),
        ("/v1/health", b"{}", {}, 405, "method not allowed"),
        ("/v1/score", body(), {"Content_Type": "text/plain"}, 415, "Send JSON as application/json"),
        ("/v1/score", body(), {"Content_Encoding": "br"}, 415, "is not read here"),
        ("/v1/score", bomb, {"Content_Encoding": "gzip"}, 413, "bytes and more are too many"),
        ("/v1/health", None, {"Host": "rewards.example.com"}, 403, "is not a name of this server"),
        ("/v1/health", None, {"Origin": "https://evil.example.com"}, 403, "may not use this server"),
    ):
        found, answer, _ = ask(server.url + path, content, **headers)
        assert (found, words in str(answer["error"])) == (status, True), answer
    assert ask(f"{server.url}/v1/score", gzip.compress(body()), Content_Encoding="gzip")[0] == 200


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    """Of each request; neither client nor server writes it anywhere."""
    token = "s3cret-" + "x" * 20
    (tmp_path / "token").write_text(token)
    with RewardServer("jpeg_compressibility", "--token-file", str(tmp_path / "token")) as server:
        with pytest.raises(RewardError, match=r"answered 401: .*Set token_file") as caught:
            remote(server.url)
        reward = remote(server.url, token_file=str(tmp_path / "token"))
        assert reward(IMAGES, PROMPTS).shape == (4,)
        (tmp_path / "token").write_text("another-" + "x" * 20)
        with pytest.raises(RewardError, match="is not this server's") as told:
            remote(server.url, token_file=str(tmp_path / "token"))
        code, stderr = server.end(signal.SIGTERM)
    assert code == 0
    assert token not in stderr + str(caught.value) + str(told.value)


def test_health_is_answered_while_scores_are_computed() -> None:
    """And the scores of several requests at the same time; settings come from the command line."""
    with RewardServer(SLOW, "--set", "score_seconds=2") as server:
        reward = remote(server.url, batch_size=2)
        with ThreadPoolExecutor() as threads:
            found = threads.submit(reward, IMAGES, PROMPTS)
            time.sleep(0.5)
            began = time.monotonic()
            assert ask(f"{server.url}/v1/health")[0] == 200
            assert time.monotonic() - began < 1
            assert not found.done()
            assert found.result() == pytest.approx(BRIGHTNESS)


def test_a_failure_of_the_reward_is_reported_and_the_server_goes_on() -> None:
    """By its exception, as in process; it is not tried again."""
    with RewardServer(SLOW) as server:
        reward = remote(server.url)
        with pytest.raises(RewardError, match=r"answered 500: .*prompt 'fail'.*ValueError: this prompt has no score"):
            reward(IMAGES[:2], [PROMPTS[0], Prompt("fail")])
        assert reward(IMAGES, PROMPTS) == pytest.approx(BRIGHTNESS)
        code, stderr = server.end(signal.SIGTERM)
    assert code == 0
    assert stderr.count("this prompt has no score") == 1


def test_a_server_that_is_killed_in_a_call_and_started_again_goes_on() -> None:
    """The client asks again until it answers."""
    with RewardServer(SLOW, "--set", "score_seconds=1.5") as server, ThreadPoolExecutor() as threads:
        reward = remote(server.url, batch_size=2, connections=2, attempts=30)
        found = threads.submit(reward, IMAGES, PROMPTS)
        time.sleep(0.7)
        assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
        time.sleep(1.0)
        assert not found.done()
        server.start()
        assert found.result(timeout=120) == pytest.approx(BRIGHTNESS)


def test_a_server_that_is_slow_to_start_is_waited_for() -> None:
    """It is started after its client, and takes seconds to build its reward."""
    server = RewardServer(SLOW, "--set", "build_seconds=2")
    with ThreadPoolExecutor() as threads:
        built = threads.submit(remote, server.url)
        time.sleep(0.5)
        server.start()
        try:
            assert built.result(timeout=READY_SECONDS).unit == "grey levels"
        finally:
            server.end()


def test_sigterm_ends_it_when_what_was_asked_is_answered() -> None:
    """With exit code 0; new connections are refused meanwhile."""
    with RewardServer(SLOW, "--set", "score_seconds=3") as server, ThreadPoolExecutor() as threads:
        found = threads.submit(remote(server.url), IMAGES, PROMPTS)
        time.sleep(0.7)
        assert not found.done()
        assert server.end(signal.SIGTERM) == (0, "")
        assert found.result() == pytest.approx(BRIGHTNESS)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--reward", "beauty"], 2, "use = 'beauty': no such reward"),
        (["--reward", "no.such:Thing"], 2, "cannot be imported"),
        (["--reward", SLOW, "--set", "score_seconds=x"], 2, "score_seconds = 'x'"),
        (["--reward", SLOW, "--set", "speed=1"], 2, "no such setting"),
        (["--reward", SLOW, "--set", "timeout_seconds=-1"], 2, "timeout_seconds = -1"),
        (["--reward", SLOW, "--token-file", "none"], 2, "cannot be read"),
        (["--reward", SLOW, "--port", "70000"], 2, "is not a whole number"),
        (["--reward", "remote", "--set", "url=http://127.0.0.1:9", "--set", "ready_seconds=0"], 5, "ready_seconds"),
    ],
)
def test_what_cannot_be_served_is_one_message(words: list[str], code: int, message: str) -> None:
    """With the exit code of its kind, before anything listens."""
    command = [sys.executable, "-m", "latentac.runs.cli", "reward-server", "--port", str(free_port()), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_reported(server: RewardServer) -> None:
    """Exit code 6."""
    command = [sys.executable, "-m", "latentac.runs.cli", "reward-server", "--reward", SLOW, "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "the port is in use" in done.stderr) == (6, True)


def test_a_server_with_too_much_to_do_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request waits for its turn, and is sent away with Retry-After when that takes too long; the client comes
    again."""
    monkeypatch.setattr(reward_server, "MOST_REQUESTS", 1)
    monkeypatch.setattr(reward_server, "QUEUE_SECONDS", 0.3)
    (slow,) = load_rewards([Reward.model_validate({"use": SLOW, "score_seconds": 1.0})])
    with bind("127.0.0.1", 0) as listener:
        config = uvicorn.Config(Scoring(slow).application(Access()), log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            url = address_of(listener)
            reward = remote(url, batch_size=1, attempts=30)
            with ThreadPoolExecutor() as threads:
                found = [threads.submit(ask, f"{url}/v1/score", body()) for _ in range(2)]
                status, answer, headers = max((one.result() for one in found), key=lambda one: one[0])
                assert (status, headers["Retry-After"]) == (503, "1")
                assert "1: requests are being answered already" in answer["error"]["message"]
            assert reward(IMAGES, PROMPTS) == pytest.approx(BRIGHTNESS)
        finally:
            server.should_exit = True
            thread.join()


def step(folder: Path, name: str, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "latentac.runs.cli", name, "--run", RUN, "--output", str(folder), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def completed(process: "subprocess.Popen[str]") -> None:
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr


def test_a_run_whose_reward_server_dies_ends_with_the_reason_and_can_go_on(tmp_path: Path) -> None:
    """Exit code 5 with name, address, and remedy, within the bound. With the server the same command completes."""
    calls = tmp_path / "calls"
    with RewardServer(SLOW, "--set", f"log={calls}", "--set", "score_seconds=0.4") as server:
        own = "attempts: 3, retry_seconds: 3, ready_seconds: 60"
        settings = [
            f"rewards=[{{use: remote, name: far, url: '{server.url}', {own}}}]",
            "gate.reward=far",
            "train={num_iterations: 4, images_per_iteration: 8, block_images: 2, updates_per_iteration: 2}",
        ]
        flags = [word for setting in [*SMALL, *settings] for word in ("--set", setting)]
        completed(step(tmp_path, "prepare", "--recipe", "shapes-unet-smoke", *flags))
        completed(step(tmp_path, "pretrain-value"))
        calls.write_text("")
        training = step(tmp_path, "train")
        while not calls.read_text() and training.poll() is None:
            time.sleep(0.05)
        server.end(signal.SIGKILL)
        began = time.monotonic()
        _, stderr = training.communicate(timeout=120)
        assert time.monotonic() - began < 60
        assert training.returncode == 5, stderr
        last = stderr.strip().splitlines()[-1]
        assert last.startswith("latentac: reward far, prompt '"), stderr
        assert f"{server.url}/v1/score: cannot be reached: " in last
        assert "Start the server again" in last
        server.start()
        completed(step(tmp_path, "train"))

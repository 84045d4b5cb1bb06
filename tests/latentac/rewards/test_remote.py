"""The client of a reward server: what it sends, what it repeats, and what ends it, each within its bound."""

import base64
import io
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentac.config.schema import Reward
from latentac.rewards import REWARDS
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.rewards.remote import Remote
from latentac.runs import testing
from latentac.system.errors import ConfigError, RewardError
from latentac.worlds.prompts import Prompt
from tests import faults
from tests.latentac.rewards.servers import answering, certificate_of, counted, free_port, healthy, send

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
PROMPTS = [Prompt("a" * (place + 1), "all", {"place": place}) for place in range(10)]
QUICK: dict[str, Any] = {"connect_seconds": 1.0, "answer_seconds": 1.0, "retry_seconds": 3.0, "ready_seconds": 1.0}
MARGIN_SECONDS = 1.5
"""Of a busy machine."""


def remote(url: str, **fields: Any) -> ConfiguredReward:
    (reward,) = load_rewards([Reward.model_validate({"use": "remote", "name": "far", "url": url, **QUICK, **fields})])
    return reward


def test_it_keeps_the_contract_of_rewards() -> None:
    """As each row of the table, over a server that scores by the prompt."""
    with answering(counted) as (url, _):
        assert testing.check_reward("remote", url=url, batch_size=3).unit == "units of x"


def test_a_call_is_split_and_its_scores_are_in_order() -> None:
    """Images arrive bit for bit, each beside its own prompt and metadata."""
    with answering(counted) as (url, asked):
        reward = remote(f"{url}/", batch_size=4)
        assert reward(IMAGES, PROMPTS).tolist() == list(range(1, 11))
    assert sorted(len(each["images"]) for each in asked) == [2, 4, 4]
    for question in asked:
        rows = zip(question["images"], question["prompts"], question["metadata"], strict=True)
        for image, prompt, metadata in rows:
            place = len(prompt) - 1
            assert metadata == {"place": place}
            assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) == IMAGES[place]).all()


def test_connections_are_bounded_and_used_again() -> None:
    """Also by several calls at once."""
    busy, most, lock = 0, 0, threading.Lock()

    def score(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)
        with lock:
            busy -= 1
        counted(handler, question)

    with answering(score) as (url, asked):
        reward = remote(url, batch_size=1, connections=2)
        calls = [threading.Thread(target=reward, args=(IMAGES, PROMPTS)) for _ in range(3)]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
    assert len(asked) == 30
    assert most == 2
    assert len({each["from"] for each in asked}) <= 3


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(status: int) -> None:
    """After the time that it asks for, where that is longer."""

    def score(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        if len(asked) < 2:
            send(handler, b"later", status, Retry_After="1")
        else:
            counted(handler, question)

    with answering(score) as (url, asked):
        assert remote(url)(IMAGES[:1], PROMPTS[:1]).tolist() == [1]
        assert len(asked) == 2
        assert asked[1]["at"] - asked[0]["at"] >= 0.95


def test_attempts_have_a_bound_in_number() -> None:
    """The last reason is told, with the server's own words."""

    def score(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        send(handler, b'{"error": {"message": "the GPU is\\nbusy"}}', 503)

    with answering(score) as (url, asked):
        reward = remote(url, attempts=2)
        with pytest.raises(RewardError, match=r"answered 503: the GPU is busy \(attempt 2, ") as caught:
            reward(IMAGES[:1], PROMPTS[:1])
        assert len(asked) == 2
    assert caught.value.where == f"reward far, prompt 'a', {url}/v1/score"
    assert caught.value.exit_code == 5


def test_attempts_have_a_bound_in_time(caplog: pytest.LogCaptureFixture) -> None:
    """A Retry-After of an hour does not hold the run: it would end beyond `retry_seconds`."""
    began = time.monotonic()
    for value in ("3600", "9" * 400, "soon", "Fri, 31 Dec 9999 23:59:59 GMT"):

        def score(handler: BaseHTTPRequestHandler, question: dict[str, Any], value: str = value) -> None:
            send(handler, b"", 503, Retry_After=value)

        with answering(score) as (url, _), caplog.at_level(logging.ERROR):
            reward = remote(url, retry_seconds=0.6)
            with pytest.raises(RewardError, match=r"answered 503 \(attempt "):
                reward(IMAGES[:1], PROMPTS[:1])
    assert time.monotonic() - began < 4 * 0.6 + MARGIN_SECONDS


def test_a_broken_connection_is_made_again() -> None:
    """Closed without an answer, and within one."""

    def score(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        if len(asked) == 2:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        if len(asked) < 3:
            handler.close_connection = True
            handler.connection.close()
        else:
            counted(handler, question)

    with answering(score) as (url, asked):
        assert remote(url)(IMAGES[:1], PROMPTS[:1]).tolist() == [1]
        assert len(asked) == 3


def dribbling(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
    """A header that does not end: no timeout between two bytes sees that."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
    for _ in range(600):
        handler.wfile.write(b"a")
        time.sleep(faults.PAUSE_SECONDS)


def trickling(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
    """The same in the body."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(600):
        handler.wfile.write(b" ")
        time.sleep(faults.PAUSE_SECONDS)


def hanging(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
    time.sleep(10)


@pytest.mark.parametrize("score", [hanging, dribbling, trickling])
def test_a_server_that_gives_no_answer_ends_within_the_bound(
    score: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None],
) -> None:
    """`connect_seconds` and `answer_seconds` together, without another attempt."""
    with answering(score) as (url, asked):
        reward, began = remote(url), time.monotonic()
        with pytest.raises(RewardError, match="gave no whole answer within 1 s"):
            reward(IMAGES[:1], PROMPTS[:1])
        assert time.monotonic() - began < 2 + MARGIN_SECONDS
        assert len(asked) == 1


def says(body: bytes, **options: Any) -> Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]:
    return lambda handler, question: send(handler, body, **options)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (says(b'{"scores": [1]}'), "answered 1 scores for 2 images"),
        (says(b'{"scores": [1, 2, 3]}'), "answered 3 scores for 2 images"),
        (says(b'{"scores": [1, NaN]}'), "prompt 'aa': .* answered nan, which is not a finite number"),
        (says(b'{"scores": [1, -Infinity]}'), "answered -inf, which"),
        (says(b'{"scores": [1, 1e39]}'), r"answered 1e\+39, which"),
        (says(b'{"scores": [1, 1' + b"0" * 400 + b"]}"), "answered 10{20,}, which"),
        (says(b'{"scores": [1, null]}'), "answered None, which"),
        (says(b'{"scores": [1, true]}'), "answered True, which"),
        (says(b'{"scores": [1, "2"]}'), "answered '2', which"),
        (says(b'{"scores": [1, [2]]}'), r"answered \[2\], which"),
        (says(b'{"scores": 1}'), "answered no list `scores`"),
        (says(b"[1, 2]"), "answered no list `scores`"),
        (says(b'{"scores": [1, 2'), "answered no JSON"),
        (says(b""), "answered no JSON"),
        (says(b"\xff\xfe"), "answered no JSON"),
        (says(b"[" * 100_000), "answered no JSON"),
        (says(b" " * (2**20 + 1) + b"1"), "answered more than 1 MiB"),
        (says(b'{"scores": [1, 2]}', kind="text/html"), "content type 'text/html', not application/json"),
        (says(b"", status=301, Location="http://127.0.0.1:9/"), "answered 301"),
        (says(b'{"error": "no such prompt"}', status=500), "answered 500: no such prompt. Look at the server's log"),
        (says(b"{}", status=401), "answered 401. Set token_file"),
        (says(b"{}", status=404), "answered 404. Correct url"),
        (says(b"{}", status=413), "answered 413. Send less at once: lower batch_size"),
        (says(b'{"error": "\\u001b[31m\\nred"}', status=422), r"answered 422: \[31m red\."),
    ],
)
def test_an_answer_that_is_none_is_one_clear_error(
    score: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None], words: str
) -> None:
    """It is asked for once."""
    with answering(score) as (url, asked):
        reward = remote(url)
        with pytest.raises(RewardError, match=words) as caught:
            reward(IMAGES[:2], PROMPTS[:2])
        assert len(asked) == 1
    assert str(caught.value).startswith("reward far, prompt 'a")
    assert f"{url}/v1/score" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_endless_body_is_not_read_to_its_end() -> None:
    """Without a length, at the speed of the machine."""

    def score(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        while True:
            handler.wfile.write(b" " * 2**16)

    with answering(score) as (url, _):
        reward = remote(url)
        with pytest.raises(RewardError, match="answered more than 1 MiB"):
            reward(IMAGES[:1], PROMPTS[:1])


def test_a_server_that_is_not_there_is_reported_when_the_reward_is_built() -> None:
    """With its address and the remedy, after `ready_seconds`."""
    url, began = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(RewardError, match=r"cannot be reached: .* refused; it was not ready within 1 s") as told:
        remote(url)
    assert str(told.value).startswith(f"reward far: cannot be built: {url}/v1/health: ")
    assert "latentac reward-server --reward" in told.value.remedy
    assert time.monotonic() - began < 1 + MARGIN_SECONDS


def test_a_server_that_loads_is_waited_for() -> None:
    """Whether it says so with `ready` or with 503; one that never is ready ends within the bound."""
    answers = [says(b"", status=503), says(b'{"ready": false}'), healthy]
    with answering(counted, lambda handler, question: answers.pop(0)(handler, question)) as (url, _):
        assert remote(url, ready_seconds=10).unit == "units of x"
    for health, words in (
        (says(b'{"ready": false}'), "says that it is not ready; it was not ready within 1 s"),
        (hanging, "gave no whole answer within 1 s; it was not ready within 1 s"),
    ):
        began = time.monotonic()
        with answering(counted, health) as (url, _), pytest.raises(RewardError, match=words):
            remote(url)
        assert time.monotonic() - began < 3 + MARGIN_SECONDS


@pytest.mark.parametrize(
    ("health", "words"),
    [
        (says(b"<html>", kind="text/html"), "content type 'text/html'"),
        (says(b"[]"), "answered no object with `ready`"),
        (says(b'{"ready": "yes"}'), "answered no object with `ready`"),
        (says(b"", status=404), "answered 404. Correct url"),
    ],
)
def test_another_server_is_reported_at_once(
    health: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None], words: str
) -> None:
    """Waiting does not make it a reward server."""
    began = time.monotonic()
    with answering(counted, health) as (url, _), pytest.raises(RewardError, match=words):
        remote(url, ready_seconds=30)
    assert time.monotonic() - began < MARGIN_SECONDS


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1",
        "127.0.0.1:8090",
        "http://",
        "http://h:0",
        "http://h:x",
        "http://h h",
        "http://h\n",
        "file:///x",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """As a problem of the field."""
    with pytest.raises(ConfigError, match=r"rewards\.0\.url = .*is no address like http://host:port"):
        remote(url)


@pytest.mark.parametrize("url", ["http://me:hunter2secret@h:1", "http://h:1?q=1", "http://h:1#x"])
def test_an_address_has_no_credentials(url: str) -> None:
    """They would stand in the configuration, and in messages."""
    with pytest.raises(ConfigError, match="has more than an address") as caught:
        remote(url)
    assert "hunter2secret" not in str(caught.value)


def test_a_token_is_sent_and_never_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even where the server repeats it."""
    token = "s3cret-" + "x" * 20
    (tmp_path / "token").write_text(f"{token}\n")

    def score(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        body = json.dumps({"error": f"no {handler.headers['Authorization']}"}).encode()
        send(handler, body, 503 if len(asked) == 1 else 403)

    with answering(score) as (url, asked), caplog.at_level(logging.DEBUG):
        reward = remote(url, token_file=str(tmp_path / "token"))
        with pytest.raises(RewardError, match="answered 403: no Bearer <token>") as caught:
            reward(IMAGES[:1], PROMPTS[:1])
        assert asked[0]["headers"]["Authorization"] == f"Bearer {token}"
    assert token not in str(caught.value) + caplog.text + repr(reward.reward.__dict__.get("_settings"))
    assert "answered 503: no Bearer <token>; next attempt in" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read: No such file"), (b"a b", "holds no token"), (b"", "holds no token"),
                           (b"\xff", "it is not ASCII"), (b"a\nb", "holds no token")]
)  # fmt: skip
def test_a_token_file_without_a_token_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    """Before the server is asked."""
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        remote("http://127.0.0.1:9", token_file=str(tmp_path / "token"))


def test_https_needs_a_trusted_certificate(tmp_path: Path) -> None:
    """`ca_file` names who signs it; what is not trusted is told at once."""
    certificate, key = certificate_of(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with answering(counted, context=context) as (url, _):
        assert url.startswith("https://")
        assert remote(url, ca_file=str(certificate))(IMAGES, PROMPTS).tolist() == list(range(1, 11))
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"has no trusted certificate: .*Set ca_file"):
            remote(url, ready_seconds=30)
        assert time.monotonic() - began < MARGIN_SECONDS
        for bad in (str(tmp_path / "none"), str(key)):
            with pytest.raises(ConfigError, match="ca_file"):
                remote(url, ca_file=bad)


def test_it_is_a_row_with_settings_of_its_own() -> None:
    """Whose names are not those of each reward."""
    assert REWARDS.load("remote") is Remote
    with pytest.raises(ConfigError, match=r"rewards\.0\.url = None: is required"):
        load_rewards([Reward.model_validate({"use": "remote"})])

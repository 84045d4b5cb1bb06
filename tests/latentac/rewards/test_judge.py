"""The reward `judge`: what it asks a model, how it reads answers, what it repeats and keeps, and what ends it."""

import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentac.config.schema import Reward
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.rewards.judge import RUBRIC, score_in
from latentac.rewards.judgements import FILE, Judgements
from latentac.runs import testing
from latentac.system.errors import ConfigError, RewardError
from latentac.worlds.prompts import Prompt
from tests.latentac.rewards.judging import brightness, completion, image_of, text_of
from tests.latentac.rewards.servers import answering, free_port, send

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 12, 3), dtype=np.uint8)
IMAGES[1] //= 4
PROMPTS = [Prompt(f"a lamp of colour {place}", "all") for place in range(6)]
EXPECTED = IMAGES.mean((1, 2, 3)) / 255
QUICK: dict[str, Any] = {"connect_seconds": 1.0, "answer_seconds": 1.0, "retry_seconds": 3.0}
MARGIN_SECONDS = 1.5
"""Of a busy machine."""
Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def judge(url: str, **fields: Any) -> ConfiguredReward:
    own = {"use": "judge", "url": url, "model": "m", **QUICK, **fields}
    (reward,) = load_rewards([Reward.model_validate(own)])
    return reward


def judging(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
    send(handler, completion(json.dumps({"score": brightness(question)})))


def saying(content: str | None) -> Answer:
    return lambda handler, question: send(handler, completion(content))


def test_it_keeps_the_contract_of_rewards() -> None:
    """As each row of the table, over a server that scores brightness."""
    with answering(judging) as (url, _):
        assert testing.check_reward("judge", url=url, model="m").unit == "score of m, 0 to 10, scaled to 0 to 1"


@pytest.mark.parametrize("ending", ["", "/", "/v1"])
def test_a_question_is_one_image_with_the_rubric(ending: str) -> None:
    """In OpenAI's form, at temperature 0; the image arrives bit for bit, and scores are in order."""
    with answering(judging) as (url, asked):
        assert judge(f"{url}{ending}")(IMAGES, PROMPTS) == pytest.approx(EXPECTED)
    assert len(asked) == len(IMAGES)
    for question in asked:
        text = text_of(question)
        (place,) = [place for place, prompt in enumerate(PROMPTS) if prompt.text in text]
        assert (image_of(question) == IMAGES[place]).all()
        assert text.endswith('{"score": <number from 0 to 10>}')
        assert (question["model"], question["temperature"], question["max_tokens"]) == ("m", 0, 256)
        assert "Authorization" not in question["headers"]


def test_the_rubric_is_a_template() -> None:
    """Its three fields are replaced, other braces stay, and a prompt is not a template."""
    rubric = 'Rate {prompt} {lowest}-{highest} as {"score": x} {other}'
    with answering(saying("3")) as (url, asked):
        reward = judge(url, rubric=rubric, lowest=1.0, highest=5.0, pattern=r"\d")
        assert reward(IMAGES[:1], [Prompt("{highest} {lamps}", "all")]).tolist() == [0.5]
        assert text_of(asked[0]) == 'Rate {highest} {lamps} 1-5 as {"score": x} {other}'
    assert "{prompt}" in RUBRIC


@pytest.mark.parametrize(
    ("answer", "pattern", "score"),
    [
        ('{"score": 7}', "", 7.0),
        ('```json\n{"reason": "a {lamp}", "score": 7.5}\n```', "", 7.5),
        ('At first {"score": 2}, but then {"score": 9e0, "sure": true}.', "", 9.0),
        ('{"score": 3, "parts": {"score": 5}}', "", 3.0),
        ("{" * 20_000 + '{"score": 1}', "", None),
        ('{"a":' * 10_000, "", None),
        ("x" * 20_000 + '{"score": 1}', "", None),
        ('{"score": "7"}', "", None),
        ('{"score": true}', "", None),
        ('{"score": null}', "", None),
        ('{"score": NaN}', "", None),
        ('{"score": 1e999}', "", None),
        ('{"score": ' + "9" * 5000 + "}", "", None),
        ('{"score": ' + "9" * 400 + "}", "", None),
        ('{"rating": 7}', "", None),
        ("7", "", None),
        ("", "", None),
        ("Score: 7/10", r"(\d+)/10", 7.0),
        ("first 3/10, then 7/10", r"(\d+)/10", 7.0),
        ("-1.5", r"-?\d+(?:\.\d+)?", -1.5),
        ("none", r"(\d+)/10", None),
        ("a/10", r"(\w+)/10", None),
        ("/10", r"(\d+)?/10", None),
    ],
)
def test_a_score_is_found_in_an_answer(answer: str, pattern: str, score: float | None) -> None:
    """As the last JSON object with a number `score`, or by a pattern; within a second, whatever the answer is."""
    began = time.monotonic()
    assert score_in(answer, pattern) == score
    assert time.monotonic() - began < 1 + MARGIN_SECONDS


@pytest.mark.parametrize("content", ["I like it", '{"score": 11}', '{"score": -0.1}', "", None, "\x1b[31m\nred"])
def test_an_answer_without_a_score_is_asked_for_again_with_a_bound(content: str | None) -> None:
    """Then it is an error with the prompt and the beginning of the answer, on one line."""
    with answering(saying(content)) as (url, asked):
        with pytest.raises(RewardError, match="m gave no score from 0 to 10 in 3 answers; the last begins '") as caught:
            judge(url)(IMAGES[:1], PROMPTS[:1])
        assert len(asked) == 3
        assert asked[0]["messages"] == asked[2]["messages"]
    message = str(caught.value)
    assert message.startswith(f"reward judge, prompt 'a lamp of colour 0', {url}/v1/chat/completions: ")
    assert message.isprintable()
    assert "Correct rubric or pattern" in message
    said = iter(["what?", '{"score": 5}'])
    with answering(lambda handler, question: saying(next(said))(handler, question)) as (url, asked):
        assert judge(url)(IMAGES[:1], PROMPTS[:1]).tolist() == [0.5]
        assert len(asked) == 2


def test_a_long_answer_is_shown_by_its_beginning() -> None:
    """And not more of it."""
    with answering(saying("lamp " * 10_000)) as (url, _), pytest.raises(RewardError) as caught:
        judge(url, questions=1)(IMAGES[:1], PROMPTS[:1])
    assert len(str(caught.value)) < 700


def says(body: bytes, **options: Any) -> Answer:
    return lambda handler, question: send(handler, body, **options)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(b'{"choices": []}'), "answered without exactly one choice with a message. Correct url"),
        (says(json.dumps({"choices": json.loads(completion("1"))["choices"] * 2}).encode()), "exactly one choice"),
        (says(b'{"choices": [{"text": "1"}]}'), "answered without exactly one choice"),
        (says(b'{"scores": [1]}'), "answered without exactly one choice"),
        (says(b"[1]"), "answered without exactly one choice"),
        (says(b'{"choices": [1'), "answered no JSON"),
        (says(b""), "answered no JSON"),
        (says(b"\xff"), "answered no JSON"),
        (says(b" " * (2**20 + 1)), "answered more than 1 MiB"),
        (says(b"<html>", kind="text/html"), "content type 'text/html', not application/json"),
        (says(b'{"error": {"message": "no such model"}}', status=404), "answered 404: no such model. Correct url"),
        (says(b'{"error": {"message": "temperature"}}', status=400), "answered 400: temperature"),
        (says(b"{}", status=401), "answered 401. Set token_file"),
        (says(b"", status=301, Location="http://127.0.0.1:9/"), "answered 301"),
    ],
)
def test_what_is_no_answer_ends_it_at_once(answer: Answer, words: str) -> None:
    """With the address; another question would not help."""
    with answering(answer) as (url, asked):
        with pytest.raises(RewardError, match=words) as caught:
            judge(url)(IMAGES[:1], PROMPTS[:1])
        assert len(asked) == 1
    assert f"{url}/v1/chat/completions" in str(caught.value)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    """After the time that it asks for; and not for ever."""

    def later(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        if len(asked) < 2:
            send(handler, b'{"error": {"message": "slow down"}}', status, Retry_After="1")
        else:
            judging(handler, question)

    with answering(later) as (url, asked):
        assert judge(url)(IMAGES[:1], PROMPTS[:1]) == pytest.approx(EXPECTED[:1])
        assert len(asked) == 2
        assert asked[1]["at"] - asked[0]["at"] >= 0.95
    with answering(says(b'{"error": {"message": "slow down"}}', status=status)) as (url, asked):
        with pytest.raises(RewardError, match=f"answered {status}: slow down .attempt 2"):
            judge(url, attempts=2)(IMAGES[:1], PROMPTS[:1])
        assert len(asked) == 2


def hanging(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
    time.sleep(30)


def test_a_server_that_hangs_ends_it_within_the_bound() -> None:
    """Without another attempt."""
    with answering(hanging) as (url, asked):
        reward, began = judge(url), time.monotonic()
        with pytest.raises(RewardError, match="gave no whole answer within 1 s"):
            reward(IMAGES[:1], PROMPTS[:1])
        assert time.monotonic() - began < 2 + MARGIN_SECONDS
        assert len(asked) == 1


@pytest.mark.parametrize("more", [10, -10])
def test_an_answer_of_another_length_is_asked_for_again(more: int) -> None:
    """One that ends too early is no answer; one that goes on is read to its stated end, where its JSON is broken."""

    def wrong(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        if len(asked) > 1:
            judging(handler, question)
            return
        body = completion('{"score": 1}')
        handler.close_connection = True
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body) + more}\r\n\r\n"
        handler.wfile.write(head.encode() + body)

    with answering(wrong) as (url, asked):
        if more > 0:
            assert judge(url)(IMAGES[:1], PROMPTS[:1]) == pytest.approx(EXPECTED[:1])
            assert len(asked) == 2
        else:
            with pytest.raises(RewardError, match="answered no JSON"):
                judge(url)(IMAGES[:1], PROMPTS[:1])


class Server:
    """The server of judging.py as a process, on a port that it keeps when it is started again."""

    def __init__(self, seconds: float) -> None:
        self.port, self.seconds = free_port(), seconds
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.latentac.rewards.judging", str(self.port), str(self.seconds)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "listening\n"
        return self.process

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_a_server_that_is_killed_and_started_again_is_asked_again(tmp_path: Path) -> None:
    """The call goes on where it was; where nobody starts it again, the call ends, and what was judged is kept."""
    server = Server(0.3)
    images, prompts = IMAGES.repeat(2, 0), PROMPTS * 2
    images[::2] += 1  # so each of the 12 is another one
    reward = judge(server.url, connections=2, answer_seconds=10.0, retry_seconds=60.0, attempts=50)
    found: list[np.ndarray] = []
    call = threading.Thread(target=lambda: found.append(reward(images, prompts)))
    call.start()
    time.sleep(0.8)
    server.kill()
    time.sleep(0.5)
    server.start()
    call.join(60)
    assert found[0] == pytest.approx(images.mean((1, 2, 3)) / 255)

    kept = judge(server.url, connections=1, retry_seconds=1.0, judgements=str(tmp_path))
    threading.Timer(0.8, server.kill).start()
    with pytest.raises(RewardError, match="attempt"):
        kept(images, prompts)
    judged = sqlite3.connect(tmp_path / FILE).execute("SELECT COUNT(*) FROM judgements").fetchone()[0]
    assert 1 <= judged < len(images)


def test_questions_at_once_are_bounded() -> None:
    """Also by several calls."""
    busy, most, lock = 0, 0, threading.Lock()

    def counting(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)
        with lock:
            busy -= 1
        judging(handler, question)

    with answering(counting) as (url, asked):
        reward = judge(url, connections=2)
        calls = [threading.Thread(target=reward, args=(IMAGES, PROMPTS)) for _ in range(3)]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
    assert len(asked) == 18
    assert most == 2


def test_what_is_judged_is_kept(tmp_path: Path) -> None:
    """By image, prompt, and each setting that has a part in the score; also by another process."""
    kept = {"judgements": str(tmp_path / "a" / "b")}
    with answering(judging) as (url, asked):
        first = judge(url, **kept)(IMAGES, PROMPTS)
        assert len(asked) == len(IMAGES)
        again = judge(url, connections=1, attempts=3, **kept)
        assert (again(IMAGES[::-1], PROMPTS[::-1])[::-1] == first).all()
        assert len(asked) == len(IMAGES)
        again(IMAGES[:1], [Prompt("another", "all")])
        again(255 - IMAGES[:1], PROMPTS[:1])
        again(IMAGES[:1].reshape(1, 12, 8, 3), PROMPTS[:1])
        assert len(asked) == len(IMAGES) + 3
        for change in ({"model": "n"}, {"rubric": "?"}, {"highest": 20.0}, {"max_tokens": 9}, {"pattern": r"(\d)\."}):
            judge(url, **kept, **change)(IMAGES[:1], PROMPTS[:1])
        assert len(asked) == len(IMAGES) + 8


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    """The oldest give way, and a score that is put again is a new one."""
    kept = Judgements(str(tmp_path), 3)
    for place, key in enumerate(["a", "b", "c", "a", "d", "e"]):
        kept.put(key, place / 8)
    found = {key: kept.get(key) for key in "abcde"}
    assert found == {"a": 0.375, "b": None, "c": None, "d": 0.5, "e": 0.625}
    assert Judgements(str(tmp_path), 3).get("e") == 0.625


def test_processes_share_what_is_kept(tmp_path: Path) -> None:
    """Four write at the same time, and one is killed while it does."""
    script = (
        "import sys\nfrom latentac.rewards.judgements import Judgements\n"
        f"kept = Judgements({str(tmp_path)!r}, 1000)\n"
        "print('ready', flush=True)\n"
        "for place in range(40):\n    kept.put(f'{sys.argv[1]} {place}', place)\n"
    )
    start = [
        subprocess.Popen([sys.executable, "-c", script, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    assert start[3].stdout is not None
    start[3].stdout.readline()
    start[3].kill()
    for process in start:
        process.communicate(timeout=60)
    assert [process.returncode for process in start[:3]] == [0, 0, 0]
    kept = Judgements(str(tmp_path), 1000)
    assert all(kept.get(f"{number} {place}") == place for number in range(3) for place in range(40))


def test_a_file_that_cannot_be_used_does_not_end_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, and the model is asked."""
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with answering(judging) as (url, asked), caplog.at_level(logging.WARNING):
        reward = judge(url, judgements=str(tmp_path))
        for _ in range(2):
            assert reward(IMAGES, PROMPTS) == pytest.approx(EXPECTED)
        assert len(asked) == 2 * len(IMAGES)
    told = [record for record in caplog.records if "cannot be used, and nothing is kept" in record.getMessage()]
    assert len(told) == 1
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"judgements = .*cannot be made"):
        judge("http://127.0.0.1:9", judgements=str(tmp_path / "file" / "below"))


@pytest.mark.parametrize("source", ["token_file", "token_variable"])
def test_a_token_is_sent_and_never_told(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not where the server repeats it, not in what is kept, and not in the settings."""
    token = "s3cret-" + "x" * 20
    (tmp_path / "token").write_text(f"{token}\n")
    monkeypatch.setenv("JUDGE_TOKEN", token)
    own = {source: str(tmp_path / "token") if source == "token_file" else "JUDGE_TOKEN"}
    kept = tmp_path / "kept"

    def score(handler: BaseHTTPRequestHandler, question: dict[str, Any]) -> None:
        if len(asked) == 1:
            send(handler, json.dumps({"error": f"no {handler.headers['Authorization']}"}).encode(), 503)
        elif "colour 0" in text_of(question):
            judging(handler, question)
        else:
            send(handler, completion(f"the token is {token}"))

    with answering(score) as (url, asked), caplog.at_level(logging.DEBUG):
        reward = judge(url, judgements=str(kept), **own)
        reward(IMAGES[:1], PROMPTS[:1])
        with pytest.raises(RewardError, match="the last begins 'the token is <token>'") as caught:
            reward(IMAGES[1:2], PROMPTS[1:2])
        assert asked[0]["headers"]["Authorization"] == f"Bearer {token}"
    assert token not in str(caught.value) + caplog.text + repr(vars(reward.reward)["_settings"])
    assert token.encode() not in (kept / FILE).read_bytes()


def test_a_variable_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name; what it holds is not told."""
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    for held in (None, "", "two s3cret words", "s3cret-é"):
        if held is not None:
            monkeypatch.setenv("JUDGE_TOKEN", held)
        with pytest.raises(ConfigError, match=r"token_variable = 'JUDGE_TOKEN': holds no token") as caught:
            judge("http://127.0.0.1:9", token_variable="JUDGE_TOKEN")
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "127.0.0.1:8000"}, "is no address like"),
        ({"url": "http://me:pw@h:1"}, "has more than an address"),
        ({"lowest": 10.0}, "lowest is not below highest"),
        ({"token_file": "a", "token_variable": "B"}, "token_file and token_variable are both set"),
        ({"pattern": "("}, "is no regular expression"),
        ({"model": ""}, "at least 1 character"),
        ({"rubric": ""}, "at least 1 character"),
        ({"questions": 0}, "greater than 0"),
        ({"most_judgements": 0}, "greater than 0"),
    ],
)
def test_settings_are_checked(fields: dict[str, Any], words: str) -> None:
    """Before anything is asked."""
    own = {"use": "judge", "url": "http://127.0.0.1:9", "model": "m", **fields}
    with pytest.raises(ConfigError, match=words):
        load_rewards([Reward.model_validate(own)])

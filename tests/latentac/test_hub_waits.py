"""A model hub that does not answer is given up within a bound; one that goes on sending is not."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub import constants

from latentac.backbones.source import locate
from latentac.backbones.stable_diffusion import UNET
from latentac.system import hub
from latentac.system.errors import ConfigError
from latentac.system.lifetime import children
from latentac.system.waiting import TimeUp
from tests.faults import faulty, seconds_of
from tests.latentac import miniatures
from tests.latentac.hub import COMMIT, Hub, cached, serving
from tests.latentac.test_lifetime import gone
from tests.latentac.test_store_hostile import lying

NAME = "someone/a-model"
SECONDS, LONG_SECONDS = 4.0, 8.0
"""The client's own imports take one; the longer one is for tests in which some of a file has to come by then."""

MARGIN_SECONDS = 6.0
"""Of a busy machine."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a client that may ask a hub."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "ANSWER_SECONDS", SECONDS)
    return tmp_path / "hub"


def at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.mark.parametrize("fault", ["silent", "head", "body"])
def test_no_answer_is_given_up_within_the_bound(cache: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub, what came and within how long; and nothing goes on waiting."""
    with faulty(fault) as server:
        at(server.url, monkeypatch)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=rf"{server.address}: \d+ bytes came within 4 s") as caught:
            locate(NAME, UNET)
        assert seconds_of(began) < SECONDS + MARGIN_SECONDS
        assert server.accepted
    assert NAME in str(caught.value)
    assert not [command for _, command in children() if "latentac.system.hub" in command]


def test_whoever_ends_leaves_no_client_behind(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by kill -9."""
    script = "from latentac.system import hub; hub.snapshot('someone/a-model', None, ['*'])"
    with faulty("silent") as server:
        at(server.url, monkeypatch)
        with subprocess.Popen([sys.executable, "-c", script]) as process:
            deadline = time.monotonic() + 60
            while not server.accepted:  # the client is asking
                assert time.monotonic() < deadline
                time.sleep(0.05)
            asking = clients(process.pid)
            process.kill()
        assert len(asking) == 1
        assert gone(asking[0])


def clients(parent: int) -> list[int]:
    """The processes below `parent` that ask a hub."""
    listed = subprocess.run(["pgrep", "-P", str(parent), "-f", "latentac.system.hub"], capture_output=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def test_a_client_that_is_killed_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, as where memory runs out."""
    with faulty("silent") as server:
        at(server.url, monkeypatch)

        def kill() -> None:
            while not server.accepted:
                time.sleep(0.05)
            os.kill(clients(os.getpid())[0], signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(ConfigError, match=r"could not be had from the hub .*client ended with -9") as caught:
            locate(NAME, UNET)
    is_whole(caught.value)


def is_whole(error: ConfigError) -> None:
    """Field, value and remedy, in one line that is not long."""
    (problem,) = error.problems
    assert (problem.path, problem.value) == ("backbone.source", NAME)
    assert "a hub id; a gated one needs HF_TOKEN" in problem.remedy
    assert len(str(error)) < 1000
    assert "\n" not in str(error)


SAID: dict[str, tuple[int, dict[str, str], bytes]] = {
    "gated": (401, {"X-Error-Code": "GatedRepo"}, b"{}"),
    "forbidden": (403, {"X-Error-Message": "no " * 10_000}, b"{}"),
    "none": (404, {"X-Error-Code": "RepoNotFound"}, b"{}"),
    "busy": (429, {"Retry-After": "100000"}, b"{}"),
    "broken": (500, {}, b"x\n" * 100_000),
    "a page": (200, {}, b"<html>"),
    "nothing": (200, {}, b""),
    "another object": (200, {}, b'{"sha": "../../../x", "siblings": [{"rfilename": "../../../x"}]}'),
    "a wrong object": (200, {}, b'{"id": 1, "sha": 2, "siblings": 3}'),
    "numbers without an end": (200, {}, b"[" * 100_000),
    "round and round": (302, {"Location": "/"}, b""),
}
"""What a hub answers: status, headers, body."""


@pytest.mark.parametrize("answer", SAID)
def test_whatever_a_hub_says_is_one_error(cache: Path, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the field, its value and what to do, in one short line, and within the bound."""
    status, headers, body = SAID[answer]

    def say(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    with lying(say) as server:
        at(f"http://{server.address}", monkeypatch)
        began = time.monotonic()
        with pytest.raises(ConfigError, match="could not be had from the hub") as caught:
            locate(NAME, UNET)
        assert seconds_of(began) < SECONDS + MARGIN_SECONDS
    is_whole(caught.value)
    assert "client ended" not in str(caught.value)
    assert "KeyError" in str(caught.value) or answer != "another object"
    assert not list(cache.parent.rglob("x"))


def test_what_the_cache_holds_is_used_where_nobody_answers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the hub cannot be reached at all."""
    snapshot = cached(cache, NAME, miniatures.sd15(tmp_path / "model"))
    with faulty("head") as server:
        at(server.url, monkeypatch)
        assert hub.snapshot(NAME, None, ["*.json"]) == snapshot
        began = time.monotonic()
        assert hub.snapshot(NAME, None, ["*.json"]) == snapshot
        assert seconds_of(began) < SECONDS, "it was asked again"
    assert "the cache is used" in caplog.text


@pytest.fixture
def slow_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One that needs twice the bound for a file of 4 MiB."""
    folder = miniatures.sd15(tmp_path / "model")
    (folder / "big.safetensors").write_bytes(os.urandom(2**22))
    with serving(NAME, folder) as server:
        server.seconds = 2 * LONG_SECONDS
        monkeypatch.setattr(hub, "ANSWER_SECONDS", LONG_SECONDS)
        at(server.url, monkeypatch)
        yield server


@pytest.mark.timeout(120)
def test_a_slow_hub_is_waited_for_while_it_sends(cache: Path, slow_hub: Hub) -> None:
    """The file is whole."""
    began = time.monotonic()
    folder = hub.snapshot(NAME, COMMIT, ["big.safetensors"])
    assert seconds_of(began) > 1.5 * LONG_SECONDS
    assert (folder / "big.safetensors").read_bytes() == (slow_hub.folder / "big.safetensors").read_bytes()


@pytest.mark.timeout(120)
def test_a_hub_below_the_rate_is_given_up(cache: Path, slow_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the file would take days. The next call goes on from what has come."""
    monkeypatch.setattr(hub, "BYTES_PER_SECOND", 2.0**21)
    with pytest.raises(TimeUp, match=r"\d+ bytes came within 8 s"):
        hub.snapshot(NAME, COMMIT, ["big.safetensors"])
    assert list((cache / "models--someone--a-model" / "blobs").glob("*.incomplete"))


@pytest.mark.timeout(120)
def test_another_process_with_the_same_file_is_not_waited_for_without_end(cache: Path, slow_hub: Hub) -> None:
    """It holds the lock of the file, and fetches nothing."""
    slow_hub.seconds = 0.0
    hub.snapshot(NAME, COMMIT, ["big.safetensors"])
    locks = list((cache / ".locks").rglob("*.lock"))
    shutil.rmtree(cache / "models--someone--a-model")
    with FileLock(locks[0]), pytest.raises(TimeUp):
        hub.snapshot(NAME, COMMIT, ["big.safetensors"])


def test_bytes_that_a_file_is_to_have_do_not_count_as_arrived(cache: Path) -> None:
    """A client may give a file its size before it has any of its bytes."""
    blobs = cache / "models--someone--a-model" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / "big.incomplete").open("wb") as file:
        file.truncate(2**30)
        file.write(b"x")
    assert 0 < hub._cached_bytes(NAME) < 2**20


@pytest.mark.timeout(120)
def test_a_hub_that_falls_silent_in_the_middle_is_given_up(
    cache: Path, slow_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before does not count for the time after it. The client itself would wait on."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "60")

    def fall_silent() -> None:
        while hub._cached_bytes(NAME) < 2**18:
            time.sleep(0.05)
        slow_hub.seconds = 1e5

    threading.Thread(target=fall_silent, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(TimeUp, match=r"\d+ bytes came within 8 s"):
        hub.snapshot(NAME, COMMIT, ["big.safetensors"])
    assert seconds_of(began) < 2.5 * LONG_SECONDS, "not at the end of the first time without bytes"

"""Training while its store, a real MinIO, is down or refuses."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from latentac.runs.failures import ATTEMPT
from latentac.runs.workers.uploads import THREAD
from latentac.runs.workers.worker import STOPPED
from latentac.store import open_store
from tests.latentac.extensions import Eventful
from tests.latentac.test_store import eventually, use
from tests.latentac.workers import RUN, prepared, train_here, trained_weights
from tools.minio import Server

LOSSES = 4
"""In an iteration."""

SETTINGS = (
    "algorithm.use=tests.latentac.extensions:Eventful",
    "train.checkpoint_every=1",
    "policy.learning_rate=1e-6",  # in many iterations of so few images a larger one diverges
)
LATEST = f"checkpoints/{RUN}/LATEST"


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    yield
    Eventful.events, Eventful.calls, Eventful.always = {}, 0, staticmethod(lambda: None)


def group(**more: str) -> dict[str, str]:
    """The environment of the only worker of a training job."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
    return os.environ | address | {ATTEMPT: "attempt-1"} | more


@pytest.fixture
def server(minio_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """One that the test may kill."""
    made = Server(tmp_path / "minio").start()
    yield made
    made.kill()


def unharmed(folder: Path, patch: pytest.MonkeyPatch, *settings: str) -> dict[str, str]:
    """The weights of a run to whose store nothing happens."""
    folder.mkdir()
    space = prepared(folder, *SETTINGS, *settings)
    assert train_here(folder, patch) == (0, "")
    Eventful.calls = 0
    return trained_weights(space)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [line for line in found if "Training goes on without" in line or "answers again" in line]


@pytest.mark.slow
@pytest.mark.minio
@pytest.mark.timeout(600)
def test_a_store_that_is_down_for_a_minute_costs_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on meanwhile, the newest checkpoint arrives afterwards, and so does the result, bitwise. Two lines
    in the log say what happened."""
    expected = unharmed(tmp_path / "whole", monkeypatch, "train.num_iterations=60")
    url, runs, before = use(server, monkeypatch), tmp_path / "runs", list[int]()
    runs.mkdir()
    space = prepared(runs, *SETTINGS, "train.num_iterations=60", store=url)
    down = threading.Event()

    def fail() -> None:
        down.set()
        server.kill()
        threading.Timer(60, come_back).start()

    def come_back() -> None:
        before.append(Eventful.calls)
        server.start()
        down.clear()

    Eventful.events = {3 * LOSSES: fail}
    Eventful.always = staticmethod(lambda: time.sleep(0.4 if down.is_set() else 0.0))
    assert train_here(runs, monkeypatch, url) == (0, "")
    assert before[0] > 15 * LOSSES, "many iterations were done while it was down"
    gone, back = lines(caplog)
    assert server.endpoint in gone
    assert "at most 900 s (train.max_seconds_without_store)" in gone
    assert str(runs / RUN / "checkpoints") in gone
    assert "is uploaded" in back
    assert trained_weights(space) == expected
    assert space.store.read_json(LATEST)["key"].endswith("000060")
    space.store.verify(space.store.manifest(space.store.read_json(LATEST)["key"]))


@pytest.mark.slow
@pytest.mark.minio
@pytest.mark.timeout(600)
def test_a_store_that_stays_down_ends_training_within_the_bound(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With exit code 75 and what to do. Resumed on this machine, not one iteration that was saved is done again."""
    settings = ["train.num_iterations=40", "train.max_seconds_without_store=30"]
    expected = unharmed(tmp_path / "whole", monkeypatch, *settings)
    url, runs, ended = use(server, monkeypatch), tmp_path / "runs", list[float]()
    runs.mkdir()
    space = prepared(runs, *SETTINGS, *settings, store=url)

    def fail() -> None:
        ended.append(time.monotonic())
        server.kill()

    Eventful.events = {3 * LOSSES: fail}
    Eventful.always = staticmethod(lambda: time.sleep(0.3 if ended else 0.0))
    code, message = train_here(runs, monkeypatch, url)
    seconds = time.monotonic() - ended[0]
    assert code == 75, message
    found = json.loads(message)
    assert found["kind"] == "StoreUnavailable"
    assert found["where"] == url
    assert "train.max_seconds_without_store = 30" in found["problem"]
    assert f"Checkpoints are kept in {runs / RUN / 'checkpoints'}" in found["remedy"]
    assert "not in the store yet: the checkpoint of iteration" in caplog.text
    newest = max((runs / RUN / "checkpoints").iterdir())
    saved, history = int(newest.name), json.loads((newest / "state" / "progress.json").read_text())["history"]
    assert saved > 3
    # The first checkpoint that is missed comes after an iteration, and the check that ends training after another.
    assert 30 < seconds < 30 + 2 * max(entry["seconds"] for entry in history) + 5

    for thread in threading.enumerate():
        if thread.name == THREAD:  # which the end of a process would have ended
            thread.join(60)
    server.start()
    Eventful.events, Eventful.calls, Eventful.always = {}, 0, staticmethod(lambda: None)
    assert train_here(runs, monkeypatch, url) == (0, "")
    assert Eventful.calls == (40 - saved) * LOSSES
    assert trained_weights(space) == expected


@pytest.mark.slow
@pytest.mark.minio
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [8, None])
def test_the_end_of_training_waits_for_the_store(
    seconds: int | None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the bound. Down in the last iteration, for a while or for ever; resumed then, there is only the upload."""
    settings = ["train.num_iterations=3", f"train.max_seconds_without_store={60 if seconds else 5}"]
    expected = unharmed(tmp_path / "whole", monkeypatch, *settings)
    url, runs = use(server, monkeypatch), tmp_path / "runs"
    runs.mkdir()
    space = prepared(runs, *SETTINGS, *settings, store=url)

    def fail() -> None:
        server.kill()
        if seconds:
            threading.Timer(seconds, server.start).start()

    Eventful.events = {3 * LOSSES: fail}
    code, _ = train_here(runs, monkeypatch, url)
    assert code == (0 if seconds else 75)
    if not seconds:
        server.start()
        Eventful.events, Eventful.calls = {}, 0
        assert train_here(runs, monkeypatch, url) == (0, "")
        assert Eventful.calls == 0
    assert trained_weights(space) == expected


@pytest.mark.slow
@pytest.mark.minio
@pytest.mark.timeout(300)
def test_a_divergence_while_the_store_is_down_waits_for_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To return to a checkpoint is to read from the store. The result is that of the same divergence without outage."""
    (tmp_path / "whole").mkdir()
    settings = [*SETTINGS, "train.num_iterations=5"]
    whole = prepared(tmp_path / "whole", *settings)
    diverge: dict[int, Callable[[], object]] = {3 * LOSSES + 1: lambda: Eventful.DIVERGE}
    Eventful.events = diverge
    assert train_here(tmp_path / "whole", monkeypatch) == (0, "")
    url, runs = use(server, monkeypatch), tmp_path / "runs"
    runs.mkdir()
    space = prepared(runs, *settings, store=url)

    def fail() -> None:
        server.kill()
        threading.Timer(25, server.start).start()

    Eventful.events, Eventful.calls = diverge | {3 * LOSSES: fail}, 0
    assert train_here(runs, monkeypatch, url) == (0, "")
    manifest = space.finished("train")
    assert manifest is not None
    assert [each["from_iteration"] for each in manifest.metrics["recoveries"]] == [3]
    assert trained_weights(space) == trained_weights(whole)


@pytest.mark.slow
@pytest.mark.minio
@pytest.mark.timeout(300)
def test_credentials_that_end_meanwhile_end_training_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting would not help. What was trained is here, and a run with the right ones goes on from it."""
    settings = ["train.num_iterations=12"]
    url, runs = use(server, monkeypatch), tmp_path / "runs"
    runs.mkdir()
    prepared(runs, *SETTINGS, *settings, store=url)

    def expire() -> None:
        server.kill()
        server.secret_key, kept[0] = "another-secret-word", server.secret_key
        server.start()

    kept = [""]
    Eventful.events = {3 * LOSSES: expire}
    Eventful.always = staticmethod(lambda: time.sleep(0.3 if kept[0] else 0.0))
    code, message = train_here(runs, monkeypatch, url)
    assert code == 3, message
    assert json.loads(message)["kind"] == "StoreAccessError"
    assert kept[0] not in message
    assert Eventful.calls < 11 * LOSSES
    assert max(int(path.name) for path in (runs / RUN / "checkpoints").iterdir()) >= 3


@pytest.mark.slow
@pytest.mark.minio
@pytest.mark.timeout(300)
@pytest.mark.parametrize("answers", [True, False])
def test_sigterm_saves_within_the_grace_period(
    answers: bool, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torchrun's agent. With a store the checkpoint is there; without one it is here, and both are said."""
    url, runs, log = use(server, monkeypatch), tmp_path / "runs", tmp_path / "log"
    runs.mkdir()
    settings = ["train.num_iterations=100000", "train.checkpoint_every=100000"]
    prepared(runs, *SETTINGS, *settings, store=url)
    command = [sys.executable, "-m", "latentac.runs.workers.supervisor", RUN, url, str(runs)]
    with (
        log.open("w+") as stream,
        subprocess.Popen(command, env=group(PET_SHUTDOWN_TIMEOUT="20"), stderr=stream) as process,
    ):
        try:
            eventually(lambda: "train " in log.read_text(), 120)
            if not answers:
                server.kill()
        finally:
            process.send_signal(signal.SIGTERM)
        told = "is in the store" if answers else "not in the store yet"
        eventually(lambda: told in log.read_text(), 20)  # a busy machine takes seconds to end a process that is done
        process.wait(100)
    found = log.read_text()
    assert process.returncode == STOPPED, found
    [saved] = (runs / RUN / "checkpoints").iterdir()
    if answers:
        assert f"the checkpoint of iteration {int(saved.name)} is in the store" in found
        assert open_store(url).read_json(LATEST)["key"].endswith(saved.name)
    else:
        assert f"not in the store yet: the checkpoint of iteration {int(saved.name)}." in found
        assert str(runs / RUN / "checkpoints") in found

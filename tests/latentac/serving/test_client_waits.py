"""Whoever asks an endpoint has an answer, or an error, within the time that it gives."""

import http.client
import os
import signal
import time
from pathlib import Path

import pytest

from latentac.serving.client import Client
from latentac.serving.process import ServerProcess
from latentac.system.errors import ServingError
from tests.faults import faulty, seconds_of
from tests.latentac.serving.conftest import changed

READY_SECONDS = 300.0

SECONDS = 0.8
MARGIN_SECONDS = 2.0
"""Of a busy machine."""


@pytest.mark.parametrize("fault", ["silent", "head", "body"])
def test_no_answer_is_given_up_within_the_bound(fault: str) -> None:
    """With the address and the seconds; and it is not ready."""
    with faulty(fault) as server:
        client, began = Client(server.url, "model", seconds=SECONDS), time.monotonic()
        with pytest.raises(ServingError, match=r"did not answer .*an answer may take 0\.8 s") as caught:
            client.predict({"prompt": "a red circle"})
        assert seconds_of(began) < SECONDS + MARGIN_SECONDS
        assert caught.value.where == f"{server.url}/v1/models/model:predict"
        assert not client.ready(SECONDS)
        assert seconds_of(began) < 2 * (SECONDS + MARGIN_SECONDS)


def test_a_connection_that_breaks_is_reported_at_once() -> None:
    with faulty("reset") as server:
        began = time.monotonic()
        with pytest.raises((OSError, http.client.HTTPException)):
            Client(server.url, "model").answer({"prompt": "a red circle"})
        assert seconds_of(began) < MARGIN_SECONDS


def test_a_server_that_hangs_is_given_the_time_that_its_model_gives_itself(
    exported_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serving.request_seconds` says how long an image may take, and whoever asks waits a little longer."""
    monkeypatch.setattr("latentac.serving.process.SPARE_SECONDS", 1.0)
    folder = changed(exported_folder, tmp_path / "model", batching={"request_seconds": 1.0})
    with ServerProcess(folder, ready_seconds=READY_SECONDS) as server:
        os.kill(server.pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            with pytest.raises(ServingError, match=r"did not answer .*no answer within 2 s"):
                server.predict({"prompt": "a red circle"})
            assert seconds_of(began) < 2 + 1 + MARGIN_SECONDS
        finally:
            os.kill(server.pid, signal.SIGCONT)

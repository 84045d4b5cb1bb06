"""The program that keeps a folder like a part of a store: what hostile names, bad times and signals do to it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path

from latentac.store.blobs import Entry, Folder, Stream
from latentac.store.mirror import PARTIAL, Mirror
from tests.latentac.test_store_hostile import Lies, lying, page, says


def test_a_name_of_the_mirrors_own_hides_no_other(tmp_path: Path) -> None:
    """What is named as its temporary file, or lies in a folder of that name, is left out."""
    blobs = Lies(**{PARTIAL: 64, f"{PARTIAL}/a": 64, f"run/{PARTIAL}": 64, f"run/{PARTIAL}/a": 64, "run/events": 64})
    for names in ([PARTIAL], [f"{PARTIAL}/a"], [f"run/{PARTIAL}"], [f"run/{PARTIAL}/a"]):
        blobs.listed = dict.fromkeys([*names, "run/events"], 64)
        mirror = Mirror(blobs, "tensorboard", tmp_path / names[0].replace("/", "-"), 2**20)  # type: ignore[arg-type]
        assert mirror.refresh() == ["run/events"]


class Vanishing(Folder):
    """A store whose list still has what somebody else has just removed."""

    def entries(self, prefix: str) -> dict[str, Entry]:
        return {f"{prefix}gone": Entry(4, 1.0, "x")} | super().entries(prefix)


def test_what_is_removed_while_it_is_copied_holds_up_no_other(tmp_path: Path) -> None:
    """The next pass finds it gone."""
    store = Vanishing(tmp_path / "store")
    store.put("tensorboard/run/events", Stream(BytesIO(b"data")), 4)
    Mirror(store, "tensorboard", tmp_path / "copy", 2**20).refresh()
    assert (tmp_path / "copy" / "run" / "events").read_bytes() == b"data"
    assert not (tmp_path / "copy" / "gone").exists()


def wait_until(met: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_store_that_refuses_is_reported_once_and_asked_again(tmp_path: Path) -> None:
    """Once for each bad time, however long it lasts; Ctrl-C ends the program with exit code 130."""
    refused = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    answers = [says(403, refused)]

    def answer(request: BaseHTTPRequestHandler) -> None:
        answers[0](request)

    with lying(answer) as server, (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "latentac.store.mirror", "--store", "s3://bucket", "--prefix", "tensorboard"]
        command += ["--to", str(tmp_path / "copy"), "--every-seconds", "0.1"]
        access = {"LATENTAC_S3_ENDPOINT": f"http://{server.address}", "AWS_ACCESS_KEY_ID": "x"}
        environment = os.environ | access | {"AWS_SECRET_ACCESS_KEY": "secret-secret"}

        def asked_again(times: int) -> None:
            before = len(server.seen)
            wait_until(lambda: len(server.seen) >= before + times)

        with subprocess.Popen(command, stderr=log, env=environment) as process:
            try:
                asked_again(5)
                assert (tmp_path / "log").read_text().count("AccessDenied") == 1
                answers[0] = says(200, page())
                asked_again(5)
                answers[0] = says(403, refused)
                asked_again(5)
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 130
            finally:
                process.kill()
    told = (tmp_path / "log").read_text()
    assert told.count("AccessDenied") == 2, told
    assert "Traceback" not in told

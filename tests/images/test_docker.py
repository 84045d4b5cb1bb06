"""The tests' own docker daemon: shared while it is used, gone without a trace when nobody uses it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.docker import MACHINES_OWN, ROOT, answers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def user(cache: Path, *command: str) -> "subprocess.Popen[str]":
    """A process that uses the daemon for as long as `command` runs."""
    environment = {key: text for key, text in os.environ.items() if key != "DOCKER_HOST"}
    environment["XDG_CACHE_HOME"] = str(cache)
    line = [sys.executable, "-m", "tools.docker", "exec", "--", *command]
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def traces(cache: Path, host: str) -> list[str]:
    """Processes and mounts of the daemon that keeps its data in `cache`, and its sockets."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(cache) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(cache) in command or host.removeprefix("unix://") in command:
            found.append(command)
    state = Path(host.removeprefix("unix://")).parent
    return [*found, *([str(state)] if state.exists() else [])]


def test_the_daemon_lives_as_long_as_its_last_user(tmp_path: Path) -> None:
    """Two processes share it; one ends well and one is killed, and then processes, mounts and sockets are gone."""
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("starting a docker daemon needs root and dockerd")
    if answers(MACHINES_OWN):
        pytest.skip("this machine has a docker daemon, which is used instead")
    say_and_wait = ("sh", "-c", "echo $DOCKER_HOST; read line")
    first, second = user(tmp_path, *say_and_wait), user(tmp_path, *say_and_wait)
    try:
        assert first.stdout is not None
        assert second.stdout is not None
        host = first.stdout.readline().strip()
        assert host == second.stdout.readline().strip()
        assert answers(host)
        second.communicate("\n", timeout=30)
        assert second.returncode == 0
        time.sleep(1)
        assert answers(host)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()  # closes what the command reads, so that it ends too
    deadline = time.monotonic() + 60
    while (left := traces(tmp_path, host)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left

"""Every program that is stopped before it has begun ends with exit code 130, and without a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = {
    "prepare": ["latentac.runs.cli", "prepare", "--run", "a", "--output", "{runs}", "--config", "{pipe}"],
    "run": ["latentac.runs.cli", "run", "--output", "{runs}", "--config", "{pipe}"],
    "the pipeline": ["latentac.pipelines", "run", "--output", "{runs}", "--config", "{pipe}"],
    "the server": ["latentac.serving", "--model", "{runs}", "--port", "0", "--token-file", "{pipe}"],
}


@pytest.mark.parametrize(
    ("program", "number"), [*((name, signal.SIGINT) for name in PROGRAMS), ("prepare", signal.SIGTERM)]
)
def test_a_program_that_is_stopped_while_it_waits_for_a_file_says_so(
    tmp_path: Path, program: str, number: signal.Signals
) -> None:
    """The file is a named pipe that nobody writes to."""
    pipe, places = tmp_path / "pipe", {"runs": str(tmp_path / "runs"), "pipe": str(tmp_path / "pipe")}
    os.mkfifo(pipe)
    command = [sys.executable, "-m", *(word.format(**places) for word in PROGRAMS[program])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            writer, deadline = -1, time.monotonic() + 60
            while writer < 0:
                assert time.monotonic() < deadline
                time.sleep(0.05)
                try:
                    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
                except OSError:  # nobody reads it yet
                    continue
            time.sleep(0.2)
            process.send_signal(number)
            told, _ = process.communicate(timeout=30)
            os.close(writer)
        finally:
            process.kill()
    assert process.returncode == 130, told
    assert "Traceback" not in told

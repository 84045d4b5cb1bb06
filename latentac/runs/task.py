"""One step as one pipeline task: its life, lock and log, and the one message and exit code of a failure.

    with pipeline_task("train", run, output, manifest.path) as publish:
        from latentac.runs.steps import train

        publish(train(run=run, store=store, output=output))

Everything here is the same embedded, in a container and on a cluster. A driver on this machine sets `LATENTAC_EVENTS`
and reads marked lines from the task's output: `begin`, and `end` or `fail`. What lies between is the step's own log.
"""

import faulthandler
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from latentac.store import Manifest
from latentac.system.calls import CALLS, FOLDER, supervised
from latentac.system.errors import LatentacError, expected
from latentac.system.lifetime import die_with_parent, refuse_links, run_lock, stop_on_sigterm
from latentac.system.names import working_folder
from latentac.system.scratch import remove_hidden, temporary_files, write_whole
from latentac.system.steps import SCORING
from latentac.system.terminal import escape_streams

EVENTS = "LATENTAC_EVENTS"
"""Environment variable: a driver reads this process's output, so mark begin and end, and leave the error to it."""

EVENT_MARK = "##latentac##"
"""What an event line starts with; JSON follows."""

ERROR_FILE = "error.json"
"""In `<output>/<run>/`: {"task", "exit_code", "message"} of the task that failed, the first one if two did."""

LOCK_FILE = "task.lock"
"""In `<output>/<run>/`: held while a step works on the run."""


@contextmanager
def pipeline_task(name: str, run: str, output: str, manifest_path: str) -> Iterator[Callable[[Manifest], Manifest]]:
    """Do the body as the task `name`; the body hands the step's manifest to what this yields, which writes it.

    Import the step in the body, so that this process is bound to its parent before it loads anything large. If the
    body fails, the process ends with the documented exit code: an expected failure (LatentacError, a full disk) gives
    one message and no traceback, anything else is a bug and keeps its traceback.
    """
    started, reused = int(time.time()), False  # manifests count whole seconds

    def publish(manifest: Manifest) -> Manifest:
        nonlocal reused
        Path(manifest_path).parent.mkdir(parents=True, exist_ok=True)
        Path(manifest_path).write_bytes(manifest.to_json())
        reused = datetime.fromisoformat(manifest.created).timestamp() < started
        return manifest

    escape_streams()
    try:
        die_with_parent()
        folder = working_folder(run, output)
        refuse_links(folder)  # before anything is written there
    except LatentacError as error:  # of no run, or of one that is not written to, so there is no file either
        raise SystemExit(_fail(name, None, error)) from None
    if name in SCORING and FOLDER not in os.environ and (ended := supervised(folder / CALLS)) is not None:
        exit_code, crash = ended
        raise SystemExit(exit_code if crash is None else _fail(name, folder, crash))
    stop_on_sigterm()
    faulthandler.enable()  # a crash in native code, a reward's for example, leaves its Python stack in the log
    _log_plainly()
    _emit(event="begin", task=name)
    try:
        with run_lock(folder / LOCK_FILE):
            remove_hidden(folder)
            with temporary_files(folder):
                yield publish
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:  # noqa: BLE001 - here is where every error becomes an exit code
        raise SystemExit(_fail(name, folder, error)) from None
    _emit(event="end", task=name, reused=reused)


def _fail(name: str, folder: Path | None, error: Exception) -> int:
    """Leave the message where a person or the driver finds it; the exit code."""
    meant = expected(error)
    if meant is None:
        traceback.print_exception(error)
        code, message = 1, f"{type(error).__name__}: {error} (a bug: its traceback is in the log above)"
    else:
        code, message = meant.exit_code, str(meant)
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        # The first failure is the cause; a start of the run removes the file.
        if folder is not None and not (folder / ERROR_FILE).exists():
            report = {"task": name, "exit_code": code, "message": message}
            write_whole(folder / ERROR_FILE, json.dumps(report, indent=2))
        unread = folder is None or EVENTS not in os.environ
    except OSError:  # the disk that is full, perhaps
        unread = True
    if unread:
        print(f"{name}: {message}", file=sys.stderr, flush=True)
    _emit(event="fail", task=name, exit_code=code)
    return code


def _log_plainly() -> None:
    """The step's own log lines as they are; of the libraries only warnings. KFP sets the root logger to INFO."""
    root, own = logging.getLogger(), logging.getLogger("latentac")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.setLevel(logging.WARNING)
    own.setLevel(logging.INFO)
    own.handlers, own.propagate = [handler], False


def _emit(**event: Any) -> None:
    if EVENTS in os.environ:  # on stderr, as the log: the two streams of a container are read in no order
        sys.stdout.flush()
        print(f"{EVENT_MARK}{json.dumps(event)}", file=sys.stderr, flush=True)

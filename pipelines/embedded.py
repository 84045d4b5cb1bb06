"""The pipeline on this machine: kfp.local runs every step as a process of this one's Python environment."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from latentac.errors import LatentacError, ServingError
from latentac.lifetime import own_descendants, run_lock
from latentac.progress import TERMINAL
from latentac.task import ERROR_FILE, EVENTS
from pipelines.console import CLEAR_LINE, Console
from pipelines.request import Request

_STOPPED = 130
_CONFIG_ERROR = 2


class StepFailed(Exception):
    """A step ended the pipeline: its name, its exit code, and its one message."""

    def __init__(self, step: str, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.step, self.exit_code, self.message = step, exit_code, message


def run_pipeline(run: str, request: Request, output: Path, *, fresh: bool) -> int:
    """Run, or go on with, the run `run` in `<output>/<run>/`, and print where to look. Returns the exit code.

    `fresh`: the folder was made for this call, and goes again if the configuration turns out wrong.
    """
    from pipelines.pipeline import STEPS  # imports kfp, a second

    folder = output / run
    signal.signal(signal.SIGTERM, _interrupt)
    own_descendants()
    with run_lock(folder / "run.lock"), _environment(folder):
        console = Console(STEPS, sys.stdout, folder / "timings.json")
        try:
            console.say(f"run {run}, recipe {request.recipe}, in {folder}")
            _execute(run, request, output, console)
            _conclude(run, request, output, console)
        except KeyboardInterrupt:
            console.count(console.running)
            return _report(f"stopped{f' in {console.running}' if console.running else ''}", _STOPPED, run, output)
        except StepFailed as failure:
            if fresh and failure.exit_code == _CONFIG_ERROR and failure.step == "prepare":
                shutil.rmtree(folder)  # nothing was done that could be resumed
                print(failure.message, file=sys.stderr)
                return failure.exit_code
            return _report(f"{failure.step}: {failure.message}", failure.exit_code, run, output)
    return 0


def _execute(run: str, request: Request, output: Path, console: Console) -> None:
    """Hand the graph to kfp.local. Raises StepFailed."""
    from kfp import local

    from pipelines.pipeline import latentac

    root = output / run / "kfp"
    local.init(
        local.SubprocessRunner(use_venv=False),  # True would build a venv and upgrade pip, for every step
        pipeline_root=str(root),
        workspace_root=str(root / "workspace"),
        raise_on_error=True,
    )
    # "You may be attempting to run a task that uses custom or non-Python base image": that is the intention
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="kfp.local")
    with contextlib.redirect_stdout(console):
        try:
            latentac(
                run=run,
                store=request.store_url(output),
                recipe=request.recipe,
                config=request.config,
                overrides=list(request.overrides),
                output=str(output),
            )
        except RuntimeError as error:  # kfp says only which task failed
            raise _failure(output / run, console) from error


def _failure(folder: Path, console: Console) -> StepFailed:
    """What the failed step left behind; for one that was killed, what was seen of it."""
    try:
        left = json.loads((folder / ERROR_FILE).read_text())
        return StepFailed(left["task"], left["exit_code"], left["message"])
    except (OSError, ValueError, KeyError):
        step = console.running or "pipeline"
    if console.running is not None:
        console.count(step)
    message = "ended without a message: killed, or out of memory"
    return StepFailed(step, 1, "\n".join([message, *(console.held if console.running is None else [])]))


def _conclude(run: str, request: Request, output: Path, console: Console) -> None:
    """Check that the graph did what the gate decided, write the report, print where to look."""
    from latentac.report import write_report
    from latentac.store import open_store

    store = request.store_url(output)
    decision = open_store(store).manifest(f"{run}/gate").metrics["decision"]
    # kfp.local calls a pipeline successful that skipped a branch for a reason of its own
    if (decision == "promote") != ("deploy" in console.finished):
        remedy = "Look at the condition in pipelines/pipeline.py."
        error = ServingError(f"run {run}", f"the gate says {decision}, and the deploy step did not follow it", remedy)
        raise StepFailed("deploy", error.exit_code, str(error))
    console.count(None)
    try:
        report, summary = write_report(run, store, str(output))
    except LatentacError as error:
        raise StepFailed("report", error.exit_code, str(error)) from error
    lines = [*console.table(), f"gate     {decision}", f"report   {report}", f"summary  {summary}"]
    if decision == "promote":
        lines.append(f"serve    make serve RUN={run}{_output_argument(output)}")
    for line in lines:
        console.say(line)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What the steps inherit, and a clean place for kfp's files."""
    root = folder / "kfp"  # holds copies of manifests of earlier starts: the store has the originals
    if (root / "tmp").is_symlink():  # the last start was killed
        shutil.rmtree((root / "tmp").readlink(), ignore_errors=True)
    shutil.rmtree(root, ignore_errors=True)
    (folder / ERROR_FILE).unlink(missing_ok=True)
    os.environ |= {EVENTS: "1", "PYTHONUNBUFFERED": "1"}  # a pipe is block-buffered otherwise
    if sys.stderr.isatty():
        os.environ[TERMINAL] = os.ttyname(sys.stderr.fileno())
    python = sys.executable
    # kfp.local puts sys.executable, unquoted, wherever its command says python3, in paths too: make that the identity
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(python)} "$@"\n')
    (root / "bin" / "python3").chmod(0o755)
    os.environ["PATH"] = f"{(root / 'bin').resolve()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    with tempfile.TemporaryDirectory(prefix="latentac-", ignore_cleanup_errors=True) as scratch:
        os.environ["TMPDIR"] = scratch  # each step's shell leaves a folder with its source behind
        (root / "tmp").symlink_to(scratch)  # not below root: names of sockets must be short
        sys.executable = "python3"
        try:
            yield
        finally:
            sys.executable = python


def _report(message: str, exit_code: int, run: str, output: Path) -> int:
    clear = CLEAR_LINE if sys.stderr.isatty() else ""
    print(f"{clear}{message}\nresume with: make run RESUME={run}{_output_argument(output)}", file=sys.stderr)
    return exit_code


def _output_argument(output: Path) -> str:
    return "" if output == Path("runs") else f" OUTPUT={shlex.quote(str(output))}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

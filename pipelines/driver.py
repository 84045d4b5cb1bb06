"""A run on this machine from its start to its report: kfp.local executes the graph, in processes or in containers."""

import contextlib
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from latentac.pipelines.console import Console
from latentac.pipelines.request import CONTAINERS, Request
from latentac.pipelines.ways import Way
from latentac.runs.task import ERROR_FILE, EVENTS
from latentac.system.calls import CALLS, crash_in_call, fresh_calls
from latentac.system.calls import FOLDER as REWARD_CALLS
from latentac.system.errors import LatentacError, ServingError
from latentac.system.lifetime import own_descendants, refuse_links, run_lock, stop_on_sigterm
from latentac.system.reading import read_json
from latentac.system.scratch import write_whole
from latentac.system.steps import NAMES, OPTIONAL
from latentac.system.terminal import EscapingStream

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

    folder = output / run
    stop_on_sigterm()
    own_descendants()
    refuse_links(folder)
    with run_lock(folder / "run.lock"):
        (folder / ERROR_FILE).unlink(missing_ok=True)
        # A pipe is block-buffered otherwise.
        os.environ |= {EVENTS: "1", "PYTHONUNBUFFERED": "1", REWARD_CALLS: str(fresh_calls(folder.resolve()))}
        console = Console(NAMES, sys.stdout, folder / "timings.json", optional=OPTIONAL)
        try:
            with _way(run, request, output) as way:
                console.say(f"run {run}, recipe {request.recipe}, in {folder}")
                try:
                    if not _done_already(run, request, way, console):
                        _execute(run, request, way, folder, console)
                    _conclude(run, request, output, way, console)
                except StepFailed as failure:
                    _keep(failure, run, folder, way.store, output)
                    raise
        except KeyboardInterrupt:
            console.count(console.running)
            return _report(
                f"stopped{f' in {console.running}' if console.running else ''}", _STOPPED, run, request, output
            )
        except StepFailed as failure:
            if fresh and failure.exit_code == _CONFIG_ERROR and failure.step == "prepare":
                shutil.rmtree(folder)  # nothing was done that could be resumed
                print(failure.message, file=sys.stderr)
                return failure.exit_code
            return _report(f"{failure.step}: {failure.message}", failure.exit_code, run, request, output)
        except LatentacError as error:
            if console.running or console.finished:
                step = console.running or "pipeline"
                return _report(f"{step}: {error}", error.exit_code, run, request, output)
            if fresh:  # it was before the first step
                shutil.rmtree(folder)
            raise
    return 0


def _way(run: str, request: Request, output: Path) -> contextlib.AbstractContextManager[Way]:
    if request.way == CONTAINERS:
        from latentac.pipelines.containers import containers

        return containers(run, request, output)
    from latentac.pipelines.embedded import processes

    return processes(run, request, output)


def _done_already(run: str, request: Request, way: Way, console: Console) -> bool:
    """Whether every step is published for this very request, its report too; then each is told, and none is started."""
    from latentac.runs.steps import FUNCTIONS, prepare
    from latentac.store import open_store

    try:
        store = open_store(way.store)
        known = set(store.keys(run))
        if not {f"{run}/prepare", f"{run}/finish"} <= known:
            return False
        given: dict[str, Any] = {
            "config": request.config,
            "overrides": request.overrides,
            "package": request.package,
        }
        prepared = prepare(run, way.store, str(way.output), request.recipe, **given)  # it is done: it only compares
        config_hash = prepared.config_hash
        steps = [step for step in FUNCTIONS if f"{run}/{step}" in known]
        found = {step: store.manifest(f"{run}/{step}") for step in steps}
    except LatentacError:  # the step that meets it says so
        return False
    if any(manifest.config_hash != config_hash for manifest in found.values()):
        return False
    published = [manifest.digest for step, manifest in found.items() if step != "finish"]
    if [parent.sha256 for parent in found["finish"].parents] != published:
        return False
    missing, deployed = set(FUNCTIONS) - set(steps), found.get("deploy")
    decided = [parent.sha256 for parent in deployed.parents] if deployed else []
    if (
        "gate" not in found
        or (deployed and found["gate"].digest not in decided)  # it was decided anew since
        or missing > {"deploy"}
        or (("deploy" in missing) == (found["gate"].metrics["decision"] == "promote"))
    ):
        return False
    for step in steps:
        console.skip(step)
    return True


def _execute(run: str, request: Request, way: Way, folder: Path, console: Console) -> None:
    """Hand the graph to kfp.local. Raises StepFailed."""
    from kfp import local

    from latentac.pipelines.pipeline import compose, compose_last

    root = folder.resolve() / "kfp"
    local.init(way.runner, pipeline_root=str(root), workspace_root=str(root / "workspace"), raise_on_error=True)
    # "You may be attempting to run a task that uses custom or non-Python base image": that is the intention
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="kfp.local")
    pipeline = compose(way.place)
    common = {"run": run, "store": way.store, "output": str(way.output)}
    with contextlib.redirect_stdout(console):
        try:
            pipeline(
                recipe=request.recipe,
                config=way.config,
                overrides=list(request.overrides),
                package=request.package,
                **common,
            )
        except RuntimeError as error:  # kfp says only which task failed
            raise _failure(folder, console) from error
        except way.errors as error:
            raise StepFailed(console.running or "pipeline", 1, str(error)) from error
        except ValueError as error:
            # kfp takes a container that is gone too soon for one that ended well, and then misses its output.
            if not str(error).startswith("Tried to get output"):
                raise
            with contextlib.suppress(RuntimeError):
                compose_last(way.place)(**common)
            raise _failure(folder, console) from error
    if console.failed is not None:  # or it needs no output of that container
        raise _failure(folder, console)


def _failure(folder: Path, console: Console) -> StepFailed:
    """What the failed step left behind; for one that was killed, what was seen of it."""
    step = console.failed or console.running
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        left = read_json(folder / ERROR_FILE)
        if step in (None, left["task"]):
            return StepFailed(str(left["task"]), int(left["exit_code"]), str(left["message"]))
    if console.running is not None:
        console.count(console.running)
    crash = crash_in_call(folder / CALLS, "crashed, was killed, or ran out of memory")
    if crash is not None:
        return StepFailed(step or "pipeline", crash.exit_code, str(crash))
    message = "ended without a message: killed, or out of memory"
    return StepFailed(step or "pipeline", 1, "\n".join([message, *(console.held if step is None else [])]))


def _conclude(run: str, request: Request, output: Path, way: Way, console: Console) -> None:
    """Check that the graph did what the gate decided, write the report anew with all timings, print where to look."""
    from latentac.pipelines.request import known_runs
    from latentac.runs.reporting.report import next_commands, write_report
    from latentac.store import open_store
    from latentac.system.commands import typed

    decision = open_store(way.store).manifest(f"{run}/gate").metrics["decision"]
    # kfp.local calls a pipeline successful that skipped a branch for a reason of its own
    if (decision == "promote") != ("deploy" in console.finished):
        remedy = "Look at the condition in pipelines/pipeline.py."
        error = ServingError(f"run {run}", f"the gate says {decision}, and the deploy step did not follow it", remedy)
        raise StepFailed("deploy", error.exit_code, str(error))
    console.count(None)
    try:
        report, summary = write_report(run, way.store, str(output))
    except LatentacError as error:
        raise StepFailed("report", error.exit_code, str(error)) from error
    lines = [*console.table(), f"gate     {decision}", f"report   {report}", f"summary  {summary}"]
    if way.keep:
        place = (run, way.store, str(output))
        if decision == "promote":
            lines.append(f"serve    {typed('serve', *place)}")
        else:
            lines.append(f"look at  {typed('serve', *place)}")
            lines.append(f"decide   {typed('gate', *place, '--dry-run', '--set', 'gate.FIELD=VALUE')}")
    commands = next_commands(run, way.store, str(output))
    if (output / run / "tensorboard").exists():
        lines.append(f"curves   {commands['tensorboard']}")
    others = [other for other in known_runs(output) if other != run and (output / other / "summary.json").exists()]
    if others and way.keep:
        lines.append(f"compare  {commands['compare'].replace('ANOTHER-RUN', others[0])}")
    for line in lines:
        console.say(line)


def _keep(failure: StepFailed, run: str, folder: Path, store: str, output: Path) -> None:
    """Leave a failure that no step could write itself, such as a kill, and let the report of the run say it."""
    from latentac.runs.reporting.report import write_report

    with contextlib.suppress(OSError, LatentacError):
        if not (folder / ERROR_FILE).exists():
            left = {"task": failure.step, "exit_code": failure.exit_code, "message": failure.message}
            write_whole(folder / ERROR_FILE, json.dumps(left, indent=2))
        if (folder / "report.html").exists():
            write_report(run, store, str(output))


def _report(message: str, exit_code: int, run: str, request: Request, output: Path) -> int:
    containers = " --containers" if request.way == CONTAINERS else ""
    from latentac.system.commands import program

    command = f"{program()} run --resume {run}{_output_argument(output)}{containers}"
    shown = EscapingStream(sys.stderr)
    shown.clear_line()
    print(f"{message}\nresume with: {command}", file=shown)
    return exit_code


def _output_argument(output: Path) -> str:
    return "" if output == Path("runs") else f" --output {shlex.quote(str(output))}"

"""`latentac sweep`: the same recipe at every point of a grid and with every seed, and one page about all of them.

A member is an ordinary run, started by the same command as any other: `latentac run` here, or
`latentac pipeline submit` on a cluster. Imports are lazy: the help must come at once.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from latentac.pipelines.grid import Member, Sweep, left, load, members, read_seeds, tally
from latentac.pipelines.request import Request, absolute, create_run, known_runs, packed, with_copies
from latentac.system.errors import ConfigError, Problem
from latentac.system.names import RULE, is_name, working_folder

_POLL_SECONDS = 0.2
_STOPPED = 130
_CLUSTER = ("host", "namespace", "ca", "cluster_settings", "release", "kube_namespace", "experiment")
_FILES = ("ca", "cluster_settings")
_EXAMPLES = """\
examples:
  latentac sweep --recipe shapes-unet --grid policy.learning_rate=3e-5,6e-5,1e-4 --seeds 0,1,2
  latentac sweep --config mine.yaml --grid 'steering.methods=[[{use: svdd}], [{use: twisted}]]' --dry-run
  latentac sweep --seeds 0-4 --parallel 2
  latentac sweep --resume sweep-shapes-unet-20260131-120000
  latentac sweep --seeds 0-2 --host http://localhost:8888 --release latentac --kube-namespace latentac"""


def main(arguments: Sequence[str]) -> int:
    """0 when every member is done, else the exit code of the first one that failed. Raises LatentacError."""
    options = _parser().parse_args(arguments)
    output = Path(options.output)
    sweep = _asked(options) if options.resume is None else load(options.resume, output)
    sweep.check()
    if options.dry_run:
        for line in _listing(sweep):
            _say(line)
        return 0
    if not 1 <= options.parallel <= 1000:
        raise ConfigError([Problem("--parallel", options.parallel, "is not from 1 to 1000", "Use 1 or more.")])
    return _run(sweep, output, options.parallel)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="latentac sweep",
        description="Run a recipe at every point of a grid with every seed, and compare the runs on a page.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="shapes-unet", help="named configuration (default: %(default)s)")
    parser.add_argument("--config", default="", metavar="FILE", help="YAML file that overrides the recipe")
    parser.add_argument("--set", metavar="PATH=VALUE", action="append", default=[], help="one field, for all runs")
    parser.add_argument(
        "--grid", metavar="PATH=V1,V2", action="append", default=[],
        help="a field and its values, or a YAML list of them; with several grids, every combination is run",
    )  # fmt: skip
    parser.add_argument("--package", default="", metavar="DIR", help="folder of your own code, kept with each run")
    parser.add_argument("--seeds", default="0", metavar="N,N", help="0,1,2 or 0-4 (default: %(default)s)")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="number of runs at a time (default: %(default)s)"
    )
    parser.add_argument("--name", help="name of the sweep (default: sweep-<recipe>-<UTC time>)")
    parser.add_argument("--resume", metavar="NAME", help="continue a sweep; finished runs are not repeated")
    parser.add_argument("--output", default="runs", metavar="FOLDER", help="working files (default: %(default)s)")
    parser.add_argument("--store", default="", metavar="URL", help="file:// or s3:// (default: file://OUTPUT/store)")
    parser.add_argument("--dry-run", action="store_true", help="only list the runs and what would be refused")
    cluster = parser.add_argument_group("on a cluster, as in `latentac pipeline submit`")
    cluster.add_argument("--host", metavar="URL", help="the API of Kubeflow Pipelines, if the runs shall run there")
    for name in _CLUSTER[1:]:
        cluster.add_argument(f"--{name.replace('_', '-')}", metavar="X")
    return parser


def _asked(options: argparse.Namespace) -> Sweep:
    name = f"sweep-{options.recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}" if options.name is None else options.name
    if not is_name(f"{name}-000") or os.path.lexists(working_folder(name, options.output)):  # members are numbered
        remedy = f"Use another name: {RULE}; --resume goes on with a sweep."
        raise ConfigError([Problem("--name", name, "cannot be the name of a new sweep", remedy)])
    given = [(each, getattr(options, each)) for each in _CLUSTER if getattr(options, each)]
    if given and not options.host:
        raise ConfigError(
            [Problem("--host", None, "no API of Kubeflow Pipelines is named", "Name it, or leave the rest out.")]
        )
    given = [(each, str(Path(value).absolute()) if each in _FILES else value) for each, value in given]
    cluster = [word for each, value in given for word in (f"--{each.replace('_', '-')}", value)]
    recipe = options.recipe
    request = absolute(Request(recipe, options.config, tuple(options.set), options.store, package=options.package))
    found = members(options.grid, read_seeds(options.seeds))
    for member in found:
        member.overrides = list(absolute(Request(recipe, overrides=tuple(member.overrides))).overrides)
    return Sweep(name, request, cluster, found)


def _listing(sweep: Sweep) -> list[str]:
    asked = sweep.request
    shared = [f"recipe {asked.recipe}", *([f"file {asked.config}"] if asked.config else []), *asked.overrides]
    where = "on the cluster" if sweep.cluster else "on this machine"
    lines = [f"{len(sweep.members)} members {where}: {', '.join(shared)}"]
    for number, member in enumerate(sweep.members, 1):
        state = "" if member.state == "waiting" else f"  {member.state} ({member.run})"
        lines.append(f"  {number:>3}  {member.point}, seed {member.seed}{state}")
    return lines


def _run(sweep: Sweep, output: Path, parallel: int) -> int:
    """Start the members that are left, `parallel` at a time, and end in the page."""
    from latentac.system.lifetime import own_descendants, run_lock, stop_on_sigterm

    own_descendants()  # whatever ends this process ends the members
    stop_on_sigterm()
    with run_lock(output / sweep.name / "sweep.lock"):
        if not sweep.exists(output):  # what is gone on with has its copies
            sweep.request = with_copies(sweep.request, output / sweep.name, packed(sweep.request))
            sweep.save(output)
        _say(f"sweep {sweep.name}, {len(sweep.members)} members, in {output / sweep.name}")
        waiting, running = list(left(sweep)), list[tuple[int, Member, subprocess.Popen[bytes], float]]()
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    number, member = waiting.pop(0)
                    running.append((number, member, _start(sweep, output, number, member), time.monotonic()))
                for each in [each for each in running if each[2].poll() is not None]:
                    running.remove(each)
                    _end(sweep, output, *each)
                time.sleep(_POLL_SECONDS if running else 0)
        except KeyboardInterrupt:
            _stop(sweep, output, [(member, process) for _, member, process, _ in running])
            print(f"stopped\nresume with: latentac sweep --resume {sweep.name}{_place(output)}", file=sys.stderr)
            return _STOPPED
        return _conclude(sweep, output)


def _start(sweep: Sweep, output: Path, number: int, member: Member) -> "subprocess.Popen[bytes]":
    asked = dataclasses.replace(sweep.request, overrides=(*sweep.request.overrides, *member.overrides))
    if sweep.cluster:
        member.run = member.run or f"{sweep.name}-{number:02d}"
        command = ["latentac.runs.cli", "pipeline", "submit", *sweep.cluster, "--run", member.run, "--follow"]
        command += ["--recipe", asked.recipe, *(["--config", asked.config] if asked.config else [])]
        command += ["--package", asked.package] if asked.package else []
        command += [word for assignment in asked.overrides for word in ("--set", assignment)]
    else:
        if member.run not in known_runs(output):
            member.run, _ = create_run(asked, output)
        command = ["pipelines", "run", "--resume", member.run, "--output", str(output)]
    member.state, member.exit_code = "running", None
    sweep.save(output)
    log = _log(sweep, output, member)
    _say(f"[{number}/{len(sweep.members)}] {member.point}, seed {member.seed}: run {member.run}, log {log}")
    with log.open("ab") as file:
        # Its own group: Ctrl-C comes here, and is passed on once.
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(
    sweep: Sweep, output: Path, number: int, member: Member, process: "subprocess.Popen[bytes]", started: float
) -> None:
    from latentac.system.progress import duration

    member.exit_code = process.returncode
    member.state = "done" if process.returncode == 0 else "failed"
    sweep.save(output)
    took, label = duration(time.monotonic() - started), f"[{number}/{len(sweep.members)}] {member.run}"
    if member.state == "done":
        _say(f"{label} done in {took}")
        return
    last = [line for line in _log(sweep, output, member).read_text(errors="replace").splitlines() if line.strip()][-3:]
    _say("\n      ".join([f"{label} failed after {took}, exit code {member.exit_code}", *last]))


def _stop(sweep: Sweep, output: Path, running: Sequence[tuple[Member, "subprocess.Popen[bytes]"]]) -> None:
    for _, process in running:
        process.send_signal(signal.SIGINT)
    for member, process in running:
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        member.state = "waiting"
    sweep.save(output)


def _conclude(sweep: Sweep, output: Path) -> int:
    from latentac.runs.reporting.compare import table, write_comparison

    counts = tally(sweep)
    _say(", ".join(f"{count} {state}" for state, count in counts.items()))
    failed = [member for member in sweep.members if member.state == "failed"]
    code = max(1, failed[0].exit_code or 1) if failed else 0  # a member that was killed has a negative one
    if failed:
        _say(f"to try the failed runs again: latentac sweep --resume {sweep.name}{_place(output)}")
    store = _store(sweep, output)
    published = _published(sweep, store)
    if len(published) < 2:
        _say("fewer than two runs have published anything, so there is no comparison")
        return code
    made = write_comparison(
        [member.run for member in published],
        store,
        str(output),
        output / sweep.name / "compare.html",
        {member.run: member.point for member in published},
    )
    for line in [*table(made.content), str(made.page), str(made.numbers)]:
        _say(line)
    return code


def _published(sweep: Sweep, store: str) -> list[Member]:
    """The members of which there is something to show."""
    from latentac.store import open_store
    from latentac.system.errors import ArtifactNotFound

    opened, found = open_store(store), []
    for member in sweep.members:
        try:
            opened.manifest(f"{member.run}/prepare")
        except ArtifactNotFound:
            continue
        found.append(member)
    return found


def _store(sweep: Sweep, output: Path) -> str:
    """Where the members have published: what was named, the cluster's own, or the folder's."""
    from latentac.runs.workspace import default_store

    if sweep.request.store or not sweep.cluster:
        return sweep.request.store or default_store(str(output))
    from latentac.pipelines.commands import cluster_settings

    return cluster_settings(sweep.cluster).store.url


def _log(sweep: Sweep, output: Path, member: Member) -> Path:
    return output / sweep.name / f"{member.run}.log"


def _place(output: Path) -> str:
    import shlex

    return "" if output == Path("runs") else f" --output {shlex.quote(str(output))}"


def _say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)

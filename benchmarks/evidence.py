"""Run the plan's units, as many at once as the machine bears, and write results as they come.

    python -m benchmarks.evidence run [--quick] [--only main,ablations] [--recipe NAME] [--budget-minutes 60]
    python -m benchmarks.evidence report [--quick]

Finished units are skipped, those that the results have from another machine too, and stopped ones go on: it can be
ended at any time (Ctrl-C, kill) and started again. With --anew what others recorded is run here.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.aggregate import aggregate, recorded
from benchmarks.plan import EXPERIMENTS, RESULT, ROOT, SCALES, Scale, Unit, require_clean_tree, units
from benchmarks.report import write_report
from latentac.sampling.devices import num_cores
from latentac.system.lifetime import own_descendants, run_lock
from latentac.system.progress import Progress, duration, progress

_GIB_A_UNIT = 3
"""A unit of the embedded recipes holds 1 GiB, that of ten times the rollouts 6 for some minutes."""

_POLL_SECONDS = 0.5


class Schedule:
    """The units that are left, those that run, and those that failed."""

    def __init__(self, scale: Scale, planned: Sequence[Unit], workers: int, *, anew: bool = False) -> None:
        """anew: units that are recorded, but did not run here, are not finished."""
        self.scale, self.planned, self.workers = scale, planned, workers
        self.recorded = frozenset() if anew else frozenset(recorded(scale))
        once = {unit.name: unit for unit in planned}
        self.left = [unit for unit in once.values() if not self.finished(unit)]
        self.total = len(once)
        self.running: dict[subprocess.Popen[bytes], Unit] = {}
        self.failed: list[Unit] = []

    def folder(self, unit: Unit) -> Path:
        return self.scale.folder / unit.name

    def finished(self, unit: Unit) -> bool:
        return unit.hash in self.recorded or (self.folder(unit) / RESULT).exists()

    def run(self, deadline: float) -> bool:
        """Until all is done, or the deadline on the monotonic clock: what runs then is ended. Whether all is done."""
        with progress(self.total, "evidence", "units") as bar:
            bar.update(self.total - len(self.left))
            try:
                while (self.left or self.running) and time.monotonic() < deadline:
                    while self.left and len(self.running) < self.workers:
                        self._start(self.left.pop(0))
                    time.sleep(_POLL_SECONDS)
                    self._collect(bar)
            finally:
                self._end()
        return not self.left

    def _start(self, unit: Unit) -> None:
        folder = self.folder(unit)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "unit.json").write_text(unit.to_json())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "benchmarks.unit", str(folder)]
        # A session of its own: Ctrl-C is for the scheduler, which then ends its units.
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.running[process] = unit

    def _collect(self, bar: Progress[int]) -> None:
        for process, unit in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[process]
            bar.update()
            if process.returncode == 0:
                refresh(self.scale, [each for each in self.planned if each.name == unit.name])
            else:
                self.failed.append(unit)
                log = self.folder(unit) / "log.txt"
                print(
                    f"{unit.name} failed ({process.returncode}): {(_lines(log) or [''])[-1]}; see {log}",
                    file=sys.stderr,
                )
        bar.note("  ".join(f"{unit.arm}-{unit.seed} {self._where(unit)}" for unit in self.running.values()))

    def _where(self, unit: Unit) -> str:
        """How far a unit is: the last iteration in its log."""
        lines = _lines(self.folder(unit) / "log.txt")
        return next((line for line in reversed(lines) if re.match(r"\d+/\d+ ", line)), "begins")

    def _end(self) -> None:
        """End what runs. It goes on from its checkpoint the next time."""
        for process in self.running:
            process.kill()
        for process, unit in self.running.items():
            process.wait()
            self.left.append(unit)
        self.running.clear()


def refresh(scale: Scale, changed: Sequence[Unit]) -> list[Path]:
    """Write the aggregated files of these units' experiments anew."""
    pairs = sorted({(unit.experiment, unit.recipe) for unit in changed})
    return [path for pair in pairs if (path := aggregate(scale, *pair))]


def default_workers() -> int:
    """A unit a core, as far as they fit into the memory."""
    return max(1, min(num_cores(), int(_free_gib() // _GIB_A_UNIT)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    scale = SCALES["quick" if options.quick else "full"]
    own_descendants()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's background job ignores Ctrl-C
        signal.signal(number, _interrupt)
    planned = units(scale, options.only, options.recipe)
    status = 0
    with run_lock(scale.folder / "lock"):
        if options.action == "run":
            require_clean_tree(scale.results)
            schedule = Schedule(scale, planned, options.workers or default_workers(), anew=options.anew)
            began, budget = time.monotonic(), 60 * options.budget_minutes if options.budget_minutes else float("inf")
            try:
                done = schedule.run(began + budget)
            except KeyboardInterrupt:
                status, done = 130, False
            took = duration(time.monotonic() - began)
            print(
                f"{schedule.total - len(schedule.left)} of {schedule.total} units are done or recorded, after {took}"
                + ("" if done else f"; `{scale.command}` goes on")
            )
            status = status or int(bool(schedule.failed))
        refresh(scale, units(scale))
        for path in write_report(scale):
            print(os.path.relpath(path))
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--quick", action="store_true", help="the small version: nothing of it is committed")
    parser.add_argument("--only", default="", type=_names, help=f"experiments, of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--recipe", default="", type=_names, help="recipes")
    parser.add_argument("--budget-minutes", type=float, help="stop then, and go on the next time")
    parser.add_argument("--workers", type=int, help="units at once")
    parser.add_argument("--anew", action="store_true", help="run here what the results have from elsewhere, too")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(EXPERIMENTS):
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}")
    return options


def _names(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def _free_gib() -> float:
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError):
        return float("inf")


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

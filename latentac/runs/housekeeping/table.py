"""The list of runs as a table for a person."""

import math
import time
from datetime import datetime

from latentac.runs.housekeeping.listing import Run


def table(runs: list[Run], now: float | None = None) -> str:
    """Two lines per run, and a third where its project is not named after its recipe. At most 80 characters wide as
    long as no name is longer than that."""
    lines = [f"{'RUN':<52}{'GATE':<9}{'SIZE':>9}{'AGE':>8}", f"  {'STATE':<25}{'RECIPE':<19}{'SEED':<8}GAIN [95 %]"]
    for run in runs:
        columns = f"{run.gate or '-':<9}{size(run.bytes):>9}{_age(run.started, now):>8}"
        lines += [f"{run.name:<52}{columns}"] if len(run.name) < 52 else [run.name, f"{'':<52}{columns}"]
        joint = {"running": "", "stopped": "in "}.get(run.state, "at ")
        state = f"{run.state} {joint}{run.step}" if run.step else run.state
        seed, recipe = "-" if run.seed is None else str(run.seed), run.recipe or "-"
        recipe = recipe if len(recipe) < 19 else f"{recipe[:15]}..."
        lines.append(f"  {state:<25}{recipe:<19}{seed:<8}{_gain(run)}".rstrip())
        if run.project not in ("", run.recipe):
            lines.append(f"  in project {run.project}")
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes as a person reads them."""
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count) // 3), 4)
    return f"{count / 1000**power:.1f} {'kMGT'[power - 1]}B"


def _gain(run: Run) -> str:
    if run.gain is None:
        return "-"
    if run.gain_low is None or run.gain_high is None:
        return f"{run.gain:+.3f}"
    return f"{run.gain:+.3f} [{run.gain_low:+.3f}, {run.gain_high:+.3f}]"


def _age(started: str, now: float | None) -> str:
    if not started:
        return "-"
    seconds = max(0.0, (now or time.time()) - datetime.fromisoformat(started).timestamp())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"

"""The commands `latentac runs`, `delete` and `prune`: their options, and what they print and ask."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentac.runs.housekeeping.clearing import Plan

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

Make = Callable[..., argparse.ArgumentParser]


def add_commands(make: Make, add: Callable[..., argparse.ArgumentParser]) -> None:
    """make: gives a parser its help, as `latentac.runs.cli` does for all commands; add: makes one of a name."""
    runs = make(add, "runs", "list the runs: state, recipe, seed, gain, gate, size, age", "latentac runs --output runs")
    runs.add_argument("--json", action="store_true", help="print JSON, with the gain's interval and exact sizes")
    runs.set_defaults(command=_runs)

    delete = make(
        add, "delete", "delete runs and everything that they published", "latentac delete shapes-unet-20260131-120000"
    )
    delete.add_argument("run", nargs="+", metavar="RUN", help="a run's id")
    delete.set_defaults(command=_delete)

    prune = make(
        add, "prune", "delete what is not needed: old or failed runs, and leftovers of killed processes",
        "latentac prune\n  latentac prune --keep 5 --older-than 7d\n  latentac prune --failed --yes",
    )  # fmt: skip
    prune.add_argument("--keep", type=_count, metavar="N", help="delete all but the newest N runs")
    prune.add_argument("--older-than", type=_seconds, metavar="7d", help="delete runs that are older: 90m, 12h, 7d, 4w")
    prune.add_argument(
        "--failed",
        action="store_true",
        help="delete runs that failed or were stopped; a run must meet all given conditions",
    )
    prune.set_defaults(command=_prune)

    for each in (runs, delete, prune):
        each.add_argument("--output", default="runs", metavar="FOLDER", help="working folders (default: %(default)s)")
        each.add_argument("--store", default="", metavar="URL", help="file:// or s3:// (default: each run's own)")
    for each in (delete, prune):
        each.add_argument("--yes", action="store_true", help="do not ask; needed if there is no terminal")


def _runs(options: argparse.Namespace) -> None:
    from latentac.runs.housekeeping.listing import list_runs
    from latentac.runs.housekeeping.table import table

    found = list_runs(Path(options.output), options.store)
    if options.json:
        print(json.dumps([run.to_dict() for run in found], indent=2), file=sys.stdout)
    else:
        print(table(found) if found else f"There are no runs in {options.output}.", file=sys.stdout)


def _delete(options: argparse.Namespace) -> None:
    from latentac.runs.housekeeping.clearing import plan_delete
    from latentac.runs.housekeeping.listing import store_of

    output = Path(options.output)
    stores: dict[str, list[str]] = {}
    for run in options.run:
        stores.setdefault(options.store or store_of(output / run), []).append(run)
    _carry_out([plan_delete(runs, output, store) for store, runs in stores.items()], options.yes)


def _prune(options: argparse.Namespace) -> None:
    from latentac.runs.housekeeping.clearing import plan_prune

    plan = plan_prune(
        Path(options.output), options.store, keep=options.keep, older_than=options.older_than, failed=options.failed
    )
    _carry_out([plan], options.yes)


def _carry_out(plans: "list[Plan]", agreed: bool) -> None:
    """Show the plans, ask, and do them."""
    from latentac.runs.housekeeping.clearing import described, remove
    from latentac.runs.housekeeping.table import size

    for plan in plans:
        print(described(plan), file=sys.stdout, flush=True)
    if not any(plan.removals for plan in plans):
        return
    if not agreed and sys.stdin.isatty() and sys.stdout.isatty():
        agreed = input("Remove it? [y/N] ").strip().lower() in ("y", "yes")
    if not agreed:
        print("Nothing was removed. Answer y, or add --yes.", file=sys.stdout)
        return
    for plan in plans:
        for removal in remove(plan):
            print(f"removed  {removal.title}", file=sys.stdout, flush=True)
    print(f"{size(sum(plan.bytes for plan in plans))} were freed", file=sys.stdout)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs, for example 5")
    return int(text)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9})([mhdw])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, for example 90m, 12h, 7d or 4w")
    return int(found[1]) * float(_UNITS[found[2]])

"""`latentac run --dry-run`: settings, steps, needs and refusals, on stdout and stderr. Nothing is written."""

import sys
from pathlib import Path

from latentac.errors import ConfigError, StoreError
from latentac.lifetime import lock_holder
from latentac.plan import Plan, plan, settings_text
from latentac.run import VERBS
from latentac.store import open_store
from latentac.task import LOCK_FILE
from pipelines.request import Request


def print_plan(request: Request, output: Path, run: str) -> int:
    """run: the one that would be resumed, or "". Returns 0, or a configuration error's code if anything is refused."""
    sys.dont_write_bytecode = True  # beside the user's own code
    store = request.store_url(output)
    made = plan(request.recipe, request.config, request.overrides, request.package, store, output)
    refused = list(made.refused)
    if run:
        holders = (lock_holder(output / run / name) for name in ("run.lock", LOCK_FILE))
        refused += [
            f"run {run}: in use by pid {holder}. Wait until it ends, or stop it." for holder in holders if holder
        ]
    if made.settings is not None:
        print(settings_text(made.settings))
    print(f"run      {run or 'a new one'}, recipe {request.recipe}, in {output / run if run else output}")
    print(f"store    {store}")
    print("steps")
    published = _published(store, run)
    for number, step in enumerate(VERBS, 1):
        note = "done already" if step in published else "if the gate promotes" if step == "deploy" else ""
        print(f"  {number} {step:<16}{note}".rstrip())
    print(f"needs    {_needs(made)}")
    sys.stdout.flush()
    for message in refused:
        print(f"refused: {message}", file=sys.stderr)
    return ConfigError.exit_code if refused else 0


def _needs(made: Plan) -> str:
    if made.settings is None:
        return "not known: the settings are refused"
    if made.needs is None:
        return "not known: the backbone is refused, or not on this machine yet"
    return "\n         ".join(made.needs)


def _published(store: str, run: str) -> set[str]:
    if not run:
        return set()
    try:
        return {key.rpartition("/")[2] for key in open_store(store).keys(run)}
    except StoreError:  # it is among the refusals
        return set()

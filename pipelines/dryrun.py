"""`latentac run --dry-run`: settings, steps, needs and refusals, on stdout and stderr. Nothing is written.

What a run would do is found out in a child process, for the user's own classes are imported and called there, and may
end it. It is made before torch is loaded.
"""

import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from latentac.pipelines.request import Request
from latentac.runs.task import LOCK_FILE
from latentac.store.sources import is_address
from latentac.system.calls import supervised
from latentac.system.commands import program
from latentac.system.errors import ConfigError, StoreError
from latentac.system.lifetime import lock_holder

if TYPE_CHECKING:
    from latentac.config.schema import Config
    from latentac.runs.plan import Plan

_PLANNED = "planned"
_STOPPED = (130, 128 + signal.SIGTERM)


def print_plan(request: Request, output: Path, run: str, gpu: str = "", price: float = 0.0) -> int:
    """run: the one that would be resumed, or "". gpu, price: to estimate time and cost for. Returns 0, or a
    configuration error's code if anything is refused."""
    sys.dont_write_bytecode = True  # beside the user's own code
    folder = Path(tempfile.mkdtemp(prefix="latentac-"))
    ended = supervised(folder)
    if ended is None:
        from latentac.runs.plan import Given, plan

        given = Given(request.recipe, request.config, request.overrides, request.package, gpu, price)
        try:
            made = plan(given, request.store_url(output), output)
        finally:  # an exception is not a crash
            (folder / _PLANNED).touch()
        return _print(made, request, output, run)
    code, crash = ended
    planned = (folder / _PLANNED).exists()
    shutil.rmtree(folder, ignore_errors=True)
    if planned or code in _STOPPED:
        return code
    problem = f"one of your classes ended the process that tried it (exit code {code}), or the process was killed"
    made = _without_classes(request, str(crash) if crash is not None else problem)
    return _print(made, request, output, run)


def _without_classes(request: Request, problem: str) -> "Plan":
    """What can be told without importing what the settings name."""
    from latentac.config.validation import resolve
    from latentac.runs.configuration import recipe_fields
    from latentac.runs.plan import Plan

    try:
        settings = resolve(recipe_fields(request.recipe, request.config, request.overrides))
    except ConfigError as error:
        return Plan(None, None, (*str(error).splitlines(), problem))
    return Plan(settings, None, (problem,))


def _print(made: "Plan", request: Request, output: Path, run: str) -> int:
    from latentac.runs.steps import FUNCTIONS

    store, refused = request.store_url(output), list(made.refused)
    if run:
        holders = (lock_holder(output / run / name) for name in ("run.lock", LOCK_FILE))
        refused += [
            f"run {run}: in use by pid {holder}. Wait until it ends, or stop it." for holder in holders if holder
        ]
    if made.settings is not None:
        print(_settings(made.settings))
    print(f"run      {run or 'a new one'}, recipe {request.recipe}, in {output / run if run else output}")
    print(f"store    {store}")
    print("steps")
    published = _published(store, run)
    for number, step in enumerate(FUNCTIONS, 1):
        note = "done already" if step in published else "if the gate promotes" if step == "deploy" else ""
        print(f"  {number} {step:<16}{note}".rstrip())
    print(f"needs    {_needs(made)}")
    sys.stdout.flush()
    for message in refused:
        print(f"refused: {message}", file=sys.stderr)
    return ConfigError.exit_code if refused else 0


def _settings(settings: "Config") -> str:
    """The settings that differ from their defaults, as YAML."""
    chosen = settings.model_dump(mode="json", exclude_defaults=True)
    for part in ("backbone", "kernel", "algorithm"):
        chosen[part] = {"use": getattr(settings, part).use} | chosen.get(part, {})
    text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)
    return f"{text}# All other settings have their defaults: `{program()} config show` prints every setting.\n"


def _needs(made: "Plan") -> str:
    if made.settings is None:
        return "unknown: the settings are refused"
    if made.needs is None and made.refused:
        return "unknown: something is refused"
    if made.needs is None:
        source = made.settings.backbone.source
        if is_address(source):
            return f"unknown: backbone.source = {source!r} is in its store, and was not copied to this machine yet"
        return (
            f"unknown: backbone.source = {source!r} is not on this machine. It counts as a model of the Hub: unchecked"
        )
    return "\n         ".join(made.needs)


def _published(store: str, run: str) -> set[str]:
    if not run:
        return set()
    from latentac.store import open_store

    try:
        return {key.rpartition("/")[2] for key in open_store(store).keys(run)}
    except StoreError:  # it is among the refusals
        return set()

"""How the command line runs one step: its lock, its temporary files, and what it says at the end."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentac.system.steps import SCORING

if TYPE_CHECKING:
    from latentac.store import Manifest


def run_step(options: argparse.Namespace) -> int | None:
    from latentac.runs.steps import FUNCTIONS
    from latentac.runs.task import LOCK_FILE
    from latentac.system.calls import CALLS, FOLDER, supervised
    from latentac.system.lifetime import own_descendants, run_lock
    from latentac.system.names import working_folder
    from latentac.system.scratch import temporary_files

    own_descendants()
    place: dict[str, Any] = {"run": options.run, "store": options.store, "output": options.output}
    if options.step == "gate" and options.dry_run:
        _decide(place, options.set)
        return None
    if options.step == "prepare":
        project = [f"project={json.dumps(options.project)}"] if options.project else []
        given = {"recipe": options.recipe, "config": options.config, "overrides": [*options.set, *project]}
        place |= {**given, "package": options.package}
    if options.step == "gate":
        place["overrides"] = options.set
    if options.step == "deploy":
        place["force"] = options.force
    folder = working_folder(options.run, options.output)
    _check_run(options, folder, place.get("overrides", []))
    if options.program and options.step in SCORING and FOLDER not in os.environ:
        ended = supervised(folder / CALLS)
        if ended is not None:
            code, crash = ended
            if crash is not None:
                raise crash
            return code
    with run_lock(folder / LOCK_FILE), temporary_files(folder):
        manifest: Manifest | None = FUNCTIONS[options.step](**place)
        if manifest is not None and (place.get("overrides") or options.step == "deploy") and options.step != "prepare":
            _tell_again(options)
    if manifest is None:
        print(json.dumps({"key": None, "metrics": {}}))
    else:
        print(json.dumps({"key": manifest.key, "metrics": manifest.metrics}, indent=2))
    return None


def _check_run(options: argparse.Namespace, folder: Path, overrides: Sequence[str]) -> None:
    """What can be wrong with a run, or with a new one's settings, before a folder is made for it."""
    from latentac.runs.configuration import resolve_recipe
    from latentac.runs.reporting.summary import prepared
    from latentac.runs.workspace import default_store
    from latentac.store import open_store
    from latentac.system.lifetime import refuse_links

    if options.step == "prepare":
        if not options.package:
            resolve_recipe(options.recipe, options.config, overrides)
    elif options.step != "finish":  # which comes last in any case, and has nothing to report of a run without a step
        prepared(open_store(options.store or default_store(options.output)), [options.run])
    refuse_links(folder)


def _tell_again(options: argparse.Namespace) -> None:
    """Where the run's report was published, let it say what a person has decided since."""
    from latentac.runs.steps import finish
    from latentac.runs.workspace import default_store
    from latentac.store import open_store

    if f"{options.run}/finish" in open_store(options.store or default_store(options.output)).keys(options.run):
        finish(options.run, options.store, options.output)


def _decide(place: dict[str, str], overrides: list[str]) -> None:
    """What the gate would say with these bounds."""
    from latentac.runs.release.gate import markdown
    from latentac.runs.steps import decide
    from latentac.runs.workspace import open_run

    print(markdown(decide(open_run(**place), overrides), place["run"]), end="")

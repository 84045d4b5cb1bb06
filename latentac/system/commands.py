"""Commands as a person can type them here: messages, reports and the driver's last lines print no others."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """How `latentac` of this installation is called from the working folder: by name where PATH leads to it."""
    own = Path(sys.prefix) / "bin" / "latentac"
    found = shutil.which("latentac")
    if not own.exists():  # a package on a path, without an environment of its own
        return "latentac" if found else "python -m latentac.runs.cli"
    if found and os.path.samefile(found, own):
        return "latentac"
    here = Path.cwd()
    return shlex.quote(str(own.relative_to(here) if own.is_relative_to(here) else own))


def typed(command: str, run: str, store: str, output: str, *words: str) -> str:
    """`latentac <command>` for a run, its places named where they are not the default ones. store: a URL, "" for the
    output's own."""
    place = ["--run", run] if run else []
    if Path(output).absolute() != Path("runs").absolute():
        place += ["--output", output]
    if store and store not in {f"file://{output}/store", f"file://{Path(output).absolute()}/store"}:
        place += ["--store", store]
    return " ".join([program(), command, *map(shlex.quote, [*place, *words])])

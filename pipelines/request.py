"""What a run was asked to do, kept in its folder, so that a resume asks for the same."""

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from latentac.errors import ConfigError, Problem, ResourceError, require

_FILE = "request.json"
_CONFIG = "given-config"
"""Folder of the copy of the configuration's file, which keeps its name: the project is called by it."""
PROCESSES, CONTAINERS = "processes", "containers"
"""The ways to run the steps on this machine."""

_HERE = ("kfp", "jinja2", "matplotlib", "PIL", "tqdm")
_NEEDED = {
    PROCESSES: (*_HERE, *"torch diffusers transformers peft safetensors torchx tensorboard kserve".split()),
    CONTAINERS: (*_HERE, "docker", "minio"),
}
"""What each way imports here, its last step included: the images hold what the steps in them need."""


@dataclass(frozen=True)
class Request:
    """recipe: name; config: path of a YAML file, or empty; overrides: `path=value`; store: URL, or empty; way: how the
    steps run."""

    recipe: str
    config: str = ""
    overrides: tuple[str, ...] = ()
    store: str = ""
    way: str = PROCESSES

    def store_url(self, output: Path) -> str:
        return self.store or f"file://{output.resolve()}/store"


def create_run(request: Request, output: Path) -> tuple[str, Request]:
    """Make `<output>/<run>/` with the request and a copy of its config file. Returns the run's id and its request.

    Raises ResourceError where no folder can be made, or where a package is not installed that the run will need.
    """
    require(*_NEEDED[request.way])
    try:
        folder = _new_folder(output, re.sub(r"[^A-Za-z0-9._-]+", "-", request.recipe).strip(".-") or "run")
    except OSError as error:
        remedy = "Choose another --output, or make it a folder that you may write to."
        raise ResourceError(str(output), f"no folder can be made in it ({error.strerror})", remedy) from None
    if request.config and Path(request.config).is_file():  # if it is not, prepare says so with all other problems
        (folder / _CONFIG).mkdir()
        copy = shutil.copyfile(request.config, folder / _CONFIG / Path(request.config).name)
        request = dataclasses.replace(request, config=str(copy))
    # request.json makes a folder a run, so it comes last and whole
    (folder / f"{_FILE}.part").write_text(json.dumps(dataclasses.asdict(request), indent=2))
    (folder / f"{_FILE}.part").rename(folder / _FILE)
    return folder.name, request


def load_run(run: str, output: Path, given: dict[str, object]) -> Request:
    """The request of the run `run`. Raises ConfigError if there is none, or if `given` (field: value) differs."""
    known = known_runs(output)
    if run not in known:
        remedy = f"Known, the newest first: {', '.join(known[:10])}." if known else "There is none: leave it out."
        raise ConfigError([Problem("--resume", run, f"no such run in {output}", remedy)])
    fields = json.loads((output / run / _FILE).read_text())
    request = Request(**{**fields, "overrides": tuple(fields["overrides"])})
    require(*_NEEDED[request.way])
    remedy = "Leave it out, or start a new run."
    problems = [
        Problem(f"--{name}", value, f"the run was started with {getattr(request, name)!r}", remedy)
        for name, value in given.items()
        if value != getattr(request, name)
    ]
    if problems:
        raise ConfigError(problems)
    return request


def known_runs(output: Path) -> list[str]:
    """The ids of the runs in `output`, the newest first."""
    files = sorted(output.glob(f"*/{_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent.name for file in files]


def _new_folder(output: Path, recipe: str) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    stem = f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            (output / f"{stem}{suffix}").mkdir()
        except FileExistsError:  # another run was started in the same second
            continue
        return output / f"{stem}{suffix}"
    raise FileExistsError(output / stem)

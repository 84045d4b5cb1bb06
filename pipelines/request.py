"""What a run was asked to do, kept in its folder, so that a resume asks for the same, wherever it is called from.

Everything that depends on the working folder is resolved once, when the run starts: the file of settings is copied,
and sources and a store that are named by a relative path get their absolute one. What lies in the output folder is
named relative to that, for the output folder may be moved.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from latentac.config.fields import read_file, read_overrides
from latentac.runs import package as packages
from latentac.store.published import problem_of
from latentac.system.errors import ConfigError, Problem, ResourceError, require
from latentac.system.reading import read_json
from latentac.system.scratch import write_whole

_FILE = "request.json"
_GIVEN, _PACKAGE = "given-config", "given-package"
_CONFIG_BEFORE = "given-config.yaml"  # what runs of earlier versions have
_OUTPUT = "file://{output}/"
_SOURCES = (("backbone", "source"), ("prompts", "source"), ("prompts", "train"), ("prompts", "held_out"))
Ways = Literal["processes", "containers"]
PROCESSES: Final = "processes"
CONTAINERS: Final = "containers"
"""The ways to run the steps on this machine."""

_HERE = ("kfp", "jinja2", "matplotlib", "PIL", "tqdm")
_NEEDED = {
    PROCESSES: (*_HERE, *"torch diffusers transformers peft safetensors torchx tensorboard kserve".split()),
    CONTAINERS: (*_HERE, "docker", "minio"),
}
"""What each way imports here, its last step included: the images hold what the steps in them need."""


@dataclass(frozen=True)
class Request:
    """recipe: name; config: path of a YAML file, or empty; overrides: `path=value`; package: folder of code, or empty;
    store: URL, or empty; way: how the steps run; folder: where the run was started, whose modules are importable."""

    recipe: str
    config: str = ""
    overrides: tuple[str, ...] = ()
    store: str = ""
    way: Ways = PROCESSES
    folder: str = ""
    package: str = ""

    def store_url(self, output: Path) -> str:
        return self.store or f"file://{output.resolve()}/store"


def absolute(request: Request) -> Request:
    """The same request, to be understood in any working folder; its file of settings is where it was."""
    scheme, _, place = request.store.partition("://")
    return dataclasses.replace(
        request,
        config=str(Path(request.config).absolute()) if request.config else "",
        overrides=tuple(map(_absolute_override, request.overrides)),
        package=str(Path(request.package).absolute()) if request.package else "",
        store=f"file://{Path(place).absolute()}" if scheme == "file" and place else request.store,
        folder=request.folder or str(Path.cwd()),
    )


def create_run(request: Request, output: Path) -> tuple[str, Request]:
    """Make `<output>/<run>/` with the request and a copy of its config file. Returns the run's id and its request.

    Raises ResourceError where no folder can be made, or where a package is not installed that the run will need.
    """
    require(*_NEEDED[request.way])
    request = absolute(request)
    code = packed(request)
    try:
        folder = _new_folder(output, re.sub(r"[^A-Za-z0-9._-]+", "-", request.recipe).strip(".-") or "run")
    except OSError as error:
        remedy = "Choose another --output, or make it a folder that you may write to."
        raise ResourceError(str(output), f"no folder can be made in it ({error.strerror})", remedy) from None
    request = with_copies(request, folder, code)
    # request.json makes a folder a run, so it comes last and whole
    write_whole(folder / _FILE, json.dumps(dataclasses.asdict(relative(request, folder)), indent=2))
    return folder.name, request


def packed(request: Request) -> bytes:
    """The request's package, b"" if it has none. Raises ConfigError where it cannot be packed."""
    return packages.pack(Path(request.package)) if request.package else b""


def with_copies(request: Request, folder: Path, code: bytes) -> Request:
    """The request with copies in `folder` of its file of settings and of its package. code: the package, packed."""
    if request.config and os.path.isfile(request.config):  # if it is not, prepare says so with all other problems
        copy = folder / _GIVEN / Path(request.config).name  # its name stays: a run may be called after it
        copy.parent.mkdir(parents=True)
        copy_settings(Path(request.config), copy)
        request = dataclasses.replace(request, config=str(copy.absolute()))
    if code:
        copy = _copy_package(code, Path(request.package), folder / _PACKAGE)
        request = dataclasses.replace(request, package=str(copy.absolute()))
    return request


def relative(request: Request, folder: Path) -> Request:
    """As it is written into `folder`, which lies in the output folder: what moves with them has a relative path."""
    config, package = (_inside(path, folder.absolute()) for path in (request.config, request.package))
    store = _relative_store(request.store, folder.parent)
    return dataclasses.replace(request, config=config, package=package, store=store)


def located(request: Request, folder: Path) -> Request:
    """What `relative` wrote, with the paths of today."""
    config, package = (path and str(folder.absolute() / path) for path in (request.config, request.package))
    store = request.store
    if store.startswith(_OUTPUT):
        store = f"file://{folder.parent.resolve()}/{store.removeprefix(_OUTPUT)}"
    return dataclasses.replace(request, config=config, package=package, store=store)


def _inside(path: str, folder: Path) -> str:
    """Relative to `folder` where it lies in it."""
    return Path(path).relative_to(folder).as_posix() if path and Path(path).is_relative_to(folder) else path


def load_run(run: str, output: Path, given: Mapping[str, object]) -> Request:
    """The request of the run `run`. Raises ConfigError if there is none, or if `given` (field: value) differs."""
    known = known_runs(output)
    if run not in known:
        remedy = f"Known, the newest first: {', '.join(known[:10])}." if known else "There is none: leave it out."
        raise ConfigError([Problem("--resume", run, f"no such run in {output}", remedy)])
    request = read_request(output / run)
    require(*_NEEDED[request.way])
    wanted = absolute(dataclasses.replace(request, **given))  # type: ignore[arg-type]
    remedy = "Leave it out, or start a new run."
    problems = [
        Problem(
            "--set" if name == "overrides" else f"--{name}",
            given[name],
            f"the run was started with {_shown(getattr(request, name))!r}",
            remedy,
        )
        for name in given
        if getattr(wanted, name) != getattr(request, name)
        and not _same(name, getattr(wanted, name), getattr(request, name))
    ]
    if problems:
        raise ConfigError(problems)
    return request


_REQUEST = TypeAdapter(Request)


def read_request(folder: Path) -> Request:
    """The request in the run's folder, its places as they are now. Raises ConfigError where it cannot be read."""
    try:
        request = _REQUEST.validate_json(json.dumps(read_json(folder / _FILE)), strict=True)
    except (OSError, ValueError) as error:
        text = problem_of(error) if isinstance(error, ValidationError) else str(error)
        remedy = "Start a new run; what this one has published stays in its store."
        raise ConfigError([Problem("--resume", folder.name, f"its {_FILE} cannot be read ({text})", remedy)]) from None
    if (folder / _CONFIG_BEFORE).is_file():
        request = dataclasses.replace(request, config=_CONFIG_BEFORE)
    return located(request, folder)


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


def _absolute_override(assignment: str) -> str:
    """`path=value` with the absolute path of a source in it; as it is where there is none, or where it is no such."""
    path = assignment.partition("=")[0]
    try:
        before = read_overrides([assignment])
    except ConfigError:  # said with all other problems
        return assignment
    after: Any = _absolute_sources(before)
    if after == before:
        return assignment
    for name in path.split("."):
        after = after[name]
    return f"{path}={json.dumps(after)}"


def _absolute_sources(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the absolute paths of backbone and prompts, where those are files or folders here."""
    result = dict(fields)
    for section, name in _SOURCES:
        below = result.get(section)
        source = below.get(name) if isinstance(below, dict) else None
        if isinstance(source, str) and source and os.path.exists(source):
            place = Path(source).absolute()
            # Where only this place is to be seen, as in a container, the way over another folder leads nowhere.
            place = place.resolve() if ".." in place.parts else place
            result[section] = {**below, name: str(place)}  # type: ignore[dict-item]
    return result


def local_sources(request: Request) -> list[str]:
    """The files and folders of this machine, by their absolute paths, that backbone and prompts come from, and the
    stores in folders that hold what was mirrored. Those that are gone are left out: a run that goes on may do without.
    """
    from latentac.runs.configuration import recipe_fields
    from latentac.runs.preparation.mirrored import addresses

    fields = recipe_fields(request.recipe, request.config, request.overrides)
    named = [str(fields[section].get(name) or "") for section, name in _SOURCES]
    named += sorted({each.store.removeprefix("file://") for _, each in addresses(fields)})
    return [source for source in named if os.path.isabs(source) and os.path.exists(source)]


def copy_settings(file: Path, copy: Path) -> None:
    """The file as it is, or with the absolute paths of its sources."""
    try:
        before = read_file(file)
    except ConfigError:  # said with all other problems
        before = {}
    after = _absolute_sources(before)
    if after == before:
        shutil.copyfile(file, copy)
    else:
        text = yaml.safe_dump(after, sort_keys=False, allow_unicode=True)
        copy.write_text(f"# {file}, with absolute paths\n{text}", encoding="utf-8")


def _relative_store(store: str, output: Path) -> str:
    """A store in the output folder moves with it."""
    place = Path(store.removeprefix("file://"))
    if store.startswith("file://") and place.resolve().is_relative_to(output.resolve()):
        return f"{_OUTPUT}{place.resolve().relative_to(output.resolve()).as_posix()}"
    return store


def _copy_package(code: bytes, given: Path, folder: Path) -> Path:
    """Unpack it so that it can be packed again to the same bytes: the folder keeps its name."""
    packages.unpack(code, folder)
    return folder / given.resolve().name


def _same(name: str, wanted: str, known: str) -> bool:
    """Whether a file of settings, or a package, says what the run's own copy says."""
    if not wanted or not known:
        return False
    if name == "package":
        return packages.pack(Path(wanted)) == packages.pack(Path(known))
    return name == "config" and _settings(wanted) == _settings(known)


def _settings(config: str) -> dict[str, Any] | None:
    try:
        return _absolute_sources(read_file(Path(config)))
    except ConfigError:
        return None


def _shown(value: object) -> object:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

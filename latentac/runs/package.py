"""Code of your own for a run: packed from a folder, kept with the run, importable in each of its steps.

`--package mine` names the folder. It is shipped under its name, so `mine/rewards.py` is `mine.rewards` in each step.
Without an `__init__.py` it is `rewards` as well, as if the folder were the working directory.
"""

import base64
import binascii
import hashlib
import importlib
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from latentac.config.schema import Config
from latentac.config.sections import Extension
from latentac.system.errors import ConfigError, Problem

INLINE = "zip:"
"""What a packed folder begins with where it is passed as text: base64 follows."""

MAX_BYTES = 64 * 2**20
MAX_FILES = 10_000
MAX_INLINE_BYTES = 48 * 2**10
"""Of the packed folder as text: Kubeflow passes a step's parameters on a command line."""

_LEFT_OUT = ("__pycache__", "node_modules")


def pack(folder: Path) -> bytes:
    """A zip archive of the folder's files, the same bytes for the same files. Hidden files, bytecode and virtual
    environments are left out. Raises ConfigError."""
    _check_folder(folder)
    base = folder.resolve()
    prefix = f"{base.name}/" if base.name else ""
    archive, total, count = io.BytesIO(), 0, 0
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in _files(base):
            total, count = total + path.stat().st_size, count + 1
            if total > MAX_BYTES or count > MAX_FILES:
                problem = f"has more than {MAX_BYTES / 2**20:.0f} MiB or {MAX_FILES} files"
                raise _refused(str(folder), problem, "Name the package's own folder, or build an image of your own.")
            entry = zipfile.ZipInfo(prefix + path.relative_to(base).as_posix(), (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            try:
                packed.writestr(entry, path.read_bytes())
            except UnicodeEncodeError:
                raise _refused(ascii(str(path)), "has a name that is not UTF-8", "Give it another name.") from None
    if not count:
        raise _refused(str(folder), "holds no files", "Name the folder of your package.")
    return archive.getvalue()


def inline(data: bytes) -> str:
    """A packed folder as text, for `read`. Raises ConfigError where it is too large for that."""
    text = INLINE + base64.b64encode(data).decode()
    if len(text) > MAX_INLINE_BYTES:
        problem = f"is {len(text) / 2**10:.0f} KiB when packed, and {MAX_INLINE_BYTES / 2**10:.0f} KiB can be submitted"
        raise _refused("the folder", problem, "Install the package in an image of your own (images/README.md).")
    return text


def read(given: str) -> bytes:
    """The packed form of what was given: a folder, or the text of `inline`. Raises ConfigError."""
    if not given.startswith(INLINE):
        return pack(Path(given))
    try:
        return base64.b64decode(given.removeprefix(INLINE), validate=True)
    except binascii.Error as error:
        raise _refused(given[:40], f"is not base64 ({error})", "Submit the run again.") from None


def digest(data: bytes) -> str:
    """sha256 of a packed folder, hex."""
    return hashlib.sha256(data).hexdigest()


def unpack(data: bytes, folder: Path) -> None:
    """Write the files of a packed folder below `folder`. Raises ConfigError for what `pack` does not make."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            entries = packed.infolist()
            if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise _refused("archive", "is larger than a package may be", "Build an image of your own.")
            for entry in entries:
                name = PurePosixPath(entry.filename)
                if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or entry.is_dir():
                    raise _refused(entry.filename[:80], "leads out of the package", "Pack the folder again.")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(packed.read(entry))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _refused("archive", f"is not a readable zip archive ({error})", "Pack the folder again.") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        named = str(error.filename)[-80:]
        raise _refused(named, "is a file and a folder in the archive", "Pack the folder again.") from None


def make_importable(folder: Path) -> None:
    """Modules in `folder` come before all others, in this process and in those that it starts. None of them writes
    bytecode: the folder stays the artifact that it is checked against when the run is opened again."""
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    place = str(folder.absolute())
    if place not in sys.path:
        sys.path.insert(0, place)
        importlib.invalidate_caches()
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != place]
    os.environ["PYTHONPATH"] = os.pathsep.join([place, *known])


def make_unpacked_importable(folder: Path) -> None:
    """Make the code importable that `unpack` wrote to `folder`."""
    found = list(folder.iterdir())
    if len(found) == 1 and found[0].is_dir():
        use_in_place(found[0])
    make_importable(folder)


def use_in_place(folder: Path) -> None:
    """Make a folder's code importable here, unpacked, under the names that it has in a run's steps. Raises ConfigError
    where there is no such folder."""
    _check_folder(folder)
    make_importable(folder.absolute().parent)
    if not (folder / "__init__.py").is_file():
        make_importable(folder)  # before what else lies beside it


def _check_folder(folder: Path) -> None:
    if not os.path.isdir(folder):  # not pathlib: it raises where a name is too long
        raise _refused(str(folder), "is not a folder", "Name the folder of your package.")


def _files(base: Path) -> list[Path]:
    """The regular files to ship, in the order of their names. Raises ConfigError for a link that leads out."""
    found = []
    for folder, folders, names in os.walk(base):
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _LEFT_OUT
            and not name.endswith(".egg-info")
            and not (here / name / "pyvenv.cfg").exists()
        )
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or name.endswith((".pyc", ".pyo")):
                continue
            try:
                place = path.resolve()
            except RuntimeError:  # links in a circle, of which a later Python says nothing: no files, as broken ones
                continue
            if not place.is_relative_to(base):
                raise _refused(str(path), "is a link that leads out of the folder", "Put the file in its place.")
            if path.is_file():
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(base).as_posix())


def _refused(value: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("--package", value, problem, remedy)])


def source_digests(config: Config) -> dict[str, str]:
    """`module:Class` -> sha256 of the file of its module, hex, for the classes of one's own in `config`.

    A module that this process has not imported is left out, and so is one without a file.
    """
    found = {}
    for address in _own_classes(config):
        file = getattr(sys.modules.get(address.partition(":")[0]), "__file__", None)
        if file is not None and Path(file).is_file():
            found[address] = digest(Path(file).read_bytes())
    return found


def changed_sources(config: Config, before: Mapping[str, str]) -> list[str]:
    """The classes whose code is not what it was. before: what `source_digests` gave then."""
    now = source_digests(config)
    return sorted(address for address, sha256 in before.items() if now.get(address, sha256) != sha256)


def _own_classes(config: Config) -> Iterator[str]:
    """The `module:Class` that `config` names."""
    single: list[Extension] = [config.backbone, config.kernel, config.algorithm, config.critic.body]
    for extension in [*single, *config.rewards, *config.tracking, *config.steering.methods]:
        if ":" in extension.use:
            yield extension.use

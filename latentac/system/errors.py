"""Every error that latentac raises on purpose, and the exit code that the command line gives it.

    LatentacError                1   anything below that has no code of its own
    +- ConfigError               2   unknown recipe or field, wrong type, impossible combination
    +- StoreError                3   the store refused or gave something unusable
    |  +- StoreAccessError       3   wrong credentials, missing bucket, no permission
    |  +- ArtifactNotFound       3   nothing was published under that key
    |  +- IntegrityError         4   size, sha256 or manifest of an artifact does not match
    |  +- StoreUnavailable       75  the store did not answer, retries included: try again later
    +- RewardError               5   a reward failed, or returned NaN or infinity
    +- ResourceError             6   disk full, port taken, device or package missing
    +- TrainingError             7   the training app failed
    |  +- Diverged               7   an update was not finite, or beyond a bound of train.divergence
    +- ServingError              8   the model server did not start or answered wrongly
    +- ClusterError              9   Kubernetes refused a call, or what was asked of it failed
       +- ClusterUnavailable     75  its API server did not answer, retries included: try again later

A message says where (a field's path, a file, a URL), what was found there, and what to do about it.
"""

import errno
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import Any


class LatentacError(Exception):
    """Root of the tree. `where`: a field path, file or URL; `problem`: what was found; `remedy`: what to do."""

    exit_code = 1

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        self.where, self.problem, self.remedy = where, problem, remedy
        super().__init__(f"{where}: {problem}. {remedy}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for another process to raise again: see `restore`."""
        return {"kind": type(self).__name__, "where": self.where, "problem": self.problem, "remedy": self.remedy}


def restore(fields: Mapping[str, Any]) -> LatentacError:
    """The error whose `to_dict` gave `fields`; an IntegrityError where none did."""
    kinds = {LatentacError.__name__: LatentacError}
    pending = [LatentacError]
    while pending:
        below = pending.pop().__subclasses__()
        pending += below
        kinds |= {kind.__name__: kind for kind in below}
    try:
        if "problems" in fields:
            return ConfigError([_restored(problem) for problem in fields["problems"]])
        where, problem, remedy = (str(fields[name]) for name in ("where", "problem", "remedy"))
        return kinds[fields["kind"]](where, problem, remedy)
    except (IndexError, KeyError, TypeError):
        return IntegrityError("the error that was left", "it does not have the expected form", "See the worker's log")


def _restored(fields: Mapping[str, Any]) -> "Problem":
    path, problem, remedy = (str(fields[name]) for name in ("path", "problem", "remedy"))
    return Problem(path, fields["value"], problem, remedy)


_MOST_SHOWN = 500
"""Characters of a value in a message."""

_MOST_PROBLEMS = 50
"""Problems in a message, each a line."""


_LONGEST_PROBLEM = 2000
"""Characters of what is wrong, which may name what a file of somebody else holds."""

_WORD = re.compile(r"[^\s\"'<>,]+")
_ADDRESS = re.compile(r"(\w:/{1,2}|(?<!/)//)(?!/)")


def without_password(value: Any) -> Any:
    """`value` without what stands before the `@` of an address, which may have any character, also deep in lists. Of a
    path that was made of an address one slash is left."""
    if isinstance(value, str):
        return _WORD.sub(_without_user, value)
    if isinstance(value, Mapping):
        return {name: without_password(below) for name, below in value.items()}
    return [without_password(below) for below in value] if isinstance(value, list) else value


def _without_user(word: re.Match[str]) -> str:
    """In time proportional to the length: one expression for all of it would try each address up to the word's end."""
    text = word[0]
    end = text.rfind("@")
    found = _ADDRESS.search(text, 0, end) if end > 0 else None
    return text if found is None else text[: found.end()] + text[end + 1 :]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: the field's path, its value as given, what is wrong, the remedy.

    Name and password of an address are left out of value and problem: these are logged.
    """

    path: str
    value: object
    problem: str
    remedy: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", without_password(self.value))
        shown = self.problem if len(self.problem) <= _LONGEST_PROBLEM else f"{self.problem[:_LONGEST_PROBLEM]}..."
        object.__setattr__(self, "problem", without_password(shown))

    def __str__(self) -> str:
        shown = repr(self.value)
        shown = f"{shown[:_MOST_SHOWN]}..." if len(shown) > _MOST_SHOWN else shown
        return f"{self.path[:_MOST_SHOWN]} = {shown}: {self.problem}. {self.remedy}"


class ConfigError(LatentacError):
    """Carries every problem of a configuration at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.path, f"{first.value!r}: {first.problem}", first.remedy)

    def __str__(self) -> str:
        more = len(self.problems) - _MOST_PROBLEMS
        lines = [str(problem) for problem in self.problems[:_MOST_PROBLEMS]]
        return "\n".join([*lines, f"... and {more} more problems"] if more > 0 else lines)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "problems": [asdict(problem) for problem in self.problems]}


class StoreError(LatentacError):
    exit_code = 3


class StoreAccessError(StoreError):
    pass


class ArtifactNotFound(StoreError):
    pass


class IntegrityError(StoreError):
    exit_code = 4


class StoreUnavailable(StoreError):
    exit_code = 75


class RewardError(LatentacError):
    exit_code = 5


class ResourceError(LatentacError):
    exit_code = 6


class TrainingError(LatentacError):
    exit_code = 7


class Diverged(TrainingError):
    """Training left the region where it can learn."""


class LeaseExpired(TrainingError):
    """A training job ended by itself, because no launching step renewed its lease."""


class ServingError(LatentacError):
    exit_code = 8


class ClusterError(LatentacError):
    """status: of the answer of the API server, 0 where the failure is not one."""

    exit_code = 9

    def __init__(self, where: str, problem: str, remedy: str, status: int = 0) -> None:
        super().__init__(where, problem, remedy)
        self.status = status


class ClusterUnavailable(ClusterError):
    exit_code = 75


_PACKAGES = {"yaml": "pyyaml", "PIL": "pillow", "torchx": "torchx-nightly", "kfp_server_api": "kfp-server-api"}
"""Whose modules are not named as they are."""

_LACKS = {
    errno.ENOSPC: ("no space is left on the device", "Free some, or choose another place, and run again"),
    errno.EDQUOT: ("the disk quota is used up", "Free some, or choose another place, and run again"),
    errno.EROFS: ("the file system is read-only", "Choose a place that can be written to"),
    errno.EACCES: ("permission is denied", "Give this user the right, or choose another place"),
    errno.EMFILE: ("too many files are open", "Raise the limit: ulimit -n 4096"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one"),
    errno.ENFILE: ("too many files are open on this machine", "End what holds them, or raise fs.file-max"),
}


def describe(error: BaseException, most: int = 500) -> str:
    """Type and text of an exception that is not ours, in one line without control characters, whatever it is."""
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - its own __str__ may raise anything
        text = ""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())[:most]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def expected(error: BaseException) -> LatentacError | None:
    """`error` as one of ours, if it is one or says that the machine lacks something: room, a right, a package.

    None is a bug, whose traceback is wanted.
    """
    if isinstance(error, LatentacError):
        return error
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, OSError) and error.errno == errno.ENOENT and "temporary directory" in str(error.strerror):
        remedy = "Name a folder with room in it, which you may write to, and run again"
        return ResourceError("TMPDIR", f"there is no folder for temporary files ({error.strerror})", remedy)
    if isinstance(error, OSError) and error.errno in _LACKS:
        problem, remedy = _LACKS[error.errno]
        return ResourceError(str(error.filename or "disk"), problem, remedy)
    if type(error).__name__ == "SafetensorError" and (said := as_os_error(error)) is not None:
        return expected(said)
    return None


def as_os_error(error: BaseException, path: str = "") -> OSError | None:
    """What the operating system said, where a library of Rust (safetensors, tokenizers) passes it on as text alone."""
    found = re.search(r"\(os error ([0-9]{1,4})\)", str(error)[-_MOST_SHOWN:])
    if found is None or isinstance(error, OSError):
        return error if isinstance(error, OSError) else None
    return OSError(int(found[1]), os.strerror(int(found[1])), path or None)


def require(*modules: str) -> None:
    """Raises ResourceError for the first of the modules that is not installed; imports none of them."""
    for module in modules:
        if util.find_spec(module) is None:
            raise _not_installed(module)


def _missing(error: ImportError) -> ResourceError | None:
    """A package that is not installed, or whose libraries are not; None where the module is one of ours."""
    module = (error.name or "").partition(".")[0]
    library = re.match(r"(lib\S+\.so\S*): cannot open shared object", str(error))
    if library:
        return ResourceError(library[1], "this library is not installed", "Install the system package that contains it")
    if not isinstance(error, ModuleNotFoundError) or not module or module == "latentac":
        return None
    return _not_installed(module)


def _not_installed(module: str) -> ResourceError:
    package = _PACKAGES.get(module, module)
    command = f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(_requirement(package))}"
    return ResourceError(f"package {package}", "is not installed, and this needs it", f"Install it: {command}")


def _requirement(package: str) -> str:
    """What to install for `package`: the extra of latentac that has it, or `package` in the versions allowed here."""
    try:
        asked = metadata.requires("latentac") or []
    except metadata.PackageNotFoundError:
        asked = []
    rows = [row for row in asked if re.match(rf"{re.escape(package)}(?![\w-])", row, re.IGNORECASE)]
    if not rows:
        return package
    extra = re.search(r"extra == ['\"](\w+)['\"]", rows[0])
    return f"latentac[{extra[1]}]" if extra else rows[0]

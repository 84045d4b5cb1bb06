"""What an artifact is, in the form of its manifest.json, and the checks that a manifest must pass to be believed."""

import hashlib
import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from latentac.store.blobs import disk_errors
from latentac.system.errors import IntegrityError, StoreError

SCHEMA: Literal["latentac/artifact/1"] = "latentac/artifact/1"
_GIT_SECONDS = 10.0
SOURCES = "sources"
"""The first part of the keys of what `latentac mirror` has put into a store: see `latentac.store.sources`."""
MOST_BYTES = 8 * 2**20
"""Of a manifest or a pointer: some 50,000 files. What it makes in memory is a multiple of it."""
_MOST_CHARACTERS = 1024
"""Of a file's path: S3 has no longer names."""
_KEY = re.compile(r"(?!.*(^|/)(\.|manifest\.json|files-))[A-Za-z0-9._-]{1,250}(/[A-Za-z0-9._-]{1,250}){,9}")


def is_key(key: str) -> bool:
    """Whether `key` may name an artifact or a pointer: safe as a path and as an object's name, and not one of ours."""
    return _KEY.fullmatch(key) is not None


def safe_key(key: str) -> str:
    if not is_key(key):
        raise ValueError(
            "it must be names of A-Z, a-z, 0-9, '_', '-', '.' joined by '/', none in '.' or 'files-' first, none long"
        )
    return key


def is_inside(path: str) -> bool:
    """Whether a relative path with '/' between names stays below the folder that it is taken from."""
    return not (set(path.split("/")) & {"", ".", ".."} or re.search(r"[\\\x00-\x1f]", path))


def _safe_path(path: str) -> str:
    if len(path) > _MOST_CHARACTERS or not is_inside(path):
        raise ValueError(
            f"a file's path must be relative, stay inside the artifact and have at most {_MOST_CHARACTERS} characters"
        )
    return path


def clashes(paths: Iterable[str]) -> list[str]:
    """Of paths with '/' between names those that are there twice, or are a folder of another one."""
    ordered = sorted(f"{path}/" for path in paths)  # whatever begins like one of them follows it at once
    return [one[:-1] for one, after in itertools.pairwise(ordered) if after.startswith(one)]


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it needs a time zone")
    return text


_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_SafeKey = Annotated[str, AfterValidator(safe_key)]


@dataclass(frozen=True)
class File:
    """One file of an artifact: path relative to its folder ('/' between names), size in bytes, sha256 in hex."""

    path: Annotated[str, AfterValidator(_safe_path)]
    size: Annotated[int, Field(ge=0, le=2**50)]
    sha256: _Sha256


@dataclass(frozen=True)
class Parent:
    """An artifact that this one was made from: its key, and the sha256 of its manifest.json."""

    key: _SafeKey
    sha256: _Sha256


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it comes from. `created` is UTC in ISO 8601; `step` is the step that made it."""

    schema: Literal["latentac/artifact/1"]
    key: _SafeKey
    run: str
    step: str
    commit: str
    config_hash: str
    created: Annotated[str, AfterValidator(_moment)]
    files: tuple[File, ...]
    parents: tuple[Parent, ...]
    metrics: dict[str, Any]

    def to_json(self) -> bytes:
        """The bytes of manifest.json: one form only, so that `digest` is the sha256 of what lies in the store."""
        return dump_json(asdict(self), f"{self.key}/manifest.json")

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def folder(self) -> str:
        """Where the files lie in the store, relative to its root; a loader of plain folders can be pointed here."""
        return f"{self.key}/files-{content_of(self.files)}"

    @staticmethod
    def from_json(raw: bytes, where: str, key: str) -> "Manifest":
        """Raises IntegrityError for anything but what `to_json` of a valid manifest of `key` gives."""
        if len(raw) > MOST_BYTES:
            raise IntegrityError(where, f"it has more than {MOST_BYTES >> 20} MiB", remedy_for(key))
        try:
            manifest = _MANIFEST.validate_json(raw, strict=True)
            problem = "" if manifest.key == key else f"it is the manifest of {manifest.key}"
            if clashes(file.path for file in manifest.files):
                problem = "it names a file twice, or as a folder too"
            elif manifest.to_json() != raw:
                problem = "it was not written by latentac, or was edited since"
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            problem = f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}, found {first['input']!r:.80}"
        except StoreError as error:  # a number that JSON has not
            problem = error.problem
        if problem:
            raise IntegrityError(where, problem, remedy_for(key))
        return manifest


_MANIFEST = TypeAdapter(Manifest)


def content_of(files: Sequence[File]) -> str:
    """A digest of the paths, sizes and sha256s of files: 16 hexadecimal digits."""
    content = json.dumps([[file.path, file.size, file.sha256] for file in files])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def describe(
    key: str,
    folder: Path,
    *,
    run: str,
    step: str,
    config_hash: str,
    parents: Sequence[Manifest] = (),
    metrics: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of every file below `folder` as the artifact `key`, made now. Raises IntegrityError for what a
    reader would refuse."""
    files, made = scan(folder), datetime.now(UTC).isoformat(timespec="seconds")
    origin = tuple(Parent(parent.key, parent.digest) for parent in parents)
    draft = Manifest(SCHEMA, key, run, step, commit(), config_hash, made, files, origin, dict(metrics or {}))
    return Manifest.from_json(draft.to_json(), str(folder), key)


def scan(folder: Path, without: str = "") -> tuple[File, ...]:
    """Every file below `folder` in the order of their paths, links to files included; anything else is refused.
    without: a folder in it that is left out."""
    with disk_errors(folder):
        found = sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
        found = [path for path in found if not without or path.relative_to(folder).parts[0] != without]
        odd = [path for path in found if not path.is_file() and (path.is_symlink() or not path.is_dir())]
        if odd:
            raise StoreError(str(odd[0]), "it is neither a file nor a real folder", "Replace it by a copy")
        files = tuple(_describe(path, path.relative_to(folder).as_posix()) for path in found if path.is_file())
    if not files:
        raise StoreError(str(folder), "it contains no file to publish", "Check that the step wrote its results")
    return files


def _describe(path: Path, name: str) -> File:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return File(name, stream.tell(), digest)


@cache
def commit() -> str:
    """The git commit of this source, with '-dirty' where files differ from it, or LATENTAC_COMMIT, or 'unknown'."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # Tracked, or else this is an installed copy that merely lies inside somebody else's checkout.
        found = [*git, "ls-files", "--error-unmatch", here.name]
        subprocess.run(found, check=True, capture_output=True, timeout=_GIT_SECONDS)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        output = subprocess.run(describe, check=True, capture_output=True, text=True, timeout=_GIT_SECONDS)
        return output.stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one that takes too long to look at
        return os.environ.get("LATENTAC_COMMIT", "").strip() or "unknown"


def dump_json(value: object, where: str) -> bytes:
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()
    except (TypeError, ValueError) as error:
        remedy = "Give numbers that are finite, or None, and plain lists, dicts and strings"
        raise StoreError(where, f"it cannot be written as JSON: {error}", remedy) from None


def remedy_for(key: str) -> str:
    if key.startswith(f"{SOURCES}/"):
        return "Run `latentac mirror --verify` again, which replaces what differs"
    return f"Delete {key} from the store and run the step that makes it, or use the one before"

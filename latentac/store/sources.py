"""Sources in a store: models, checkpoints and prompt files that `latentac mirror` has put there, by their addresses.

    <store>/sources/<name>-<content>         the address: it stands in a configuration where a hub id or a folder can
    <store>/sources/<name>-<content>/a/b     a file or folder of it

A source is an artifact, so it appears whole or not at all. `<content>` is the digest of its files' paths, sizes and
sha256s, so an address means the same bytes for ever: a copy on this machine is read without asking the store, and none
is read that the address does not name. What is known of its origin stands in the manifest's metrics (`About`).

Copies lie in LATENTAC_CACHE, by default `latentac` in XDG_CACHE_HOME or `~/.cache`.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentac.config.schema import Prompts
from latentac.store.artifacts import Store, _shown
from latentac.store.blobs import Overrun, Patience, Stream, disk_errors
from latentac.store.manifest import SCHEMA, SOURCES, File, Manifest, commit, content_of, is_inside, scan
from latentac.system.commands import program
from latentac.system.errors import ArtifactNotFound, ConfigError, IntegrityError, Problem, ResourceError
from latentac.system.names import as_name
from latentac.system.scratch import write_whole

CACHE = "LATENTAC_CACHE"
STEP = "mirror"
"""Who publishes sources, as their manifests say it."""
_QUICK = Patience(retries=2, timeout_seconds=5.0, idle_seconds=10.0)
_SCHEMES = ("file://", "s3://")
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*-([0-9a-f]{16})"
_ADDRESS = re.compile(rf"((?:file|s3)://.+?)/({SOURCES}/{_NAME})(?:/(.*))?")


@dataclass(frozen=True)
class Address:
    """store: its URL; key: of the source in it; content: the digest of its files; path: of a file or folder in it, ""
    for the whole."""

    store: str
    key: str
    content: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.store}/{self.key}{self.path and f'/{self.path}'}"

    @property
    def name(self) -> str:
        """The source's name without the digest."""
        return self.key.removeprefix(f"{SOURCES}/").removesuffix(f"-{self.content}")


def is_address(text: object) -> bool:
    """Whether a source is meant to be read from a store."""
    return isinstance(text, str) and text.startswith(_SCHEMES)


def parse_address(text: str) -> Address | None:
    """None where `text` is not the address of a source."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return None
    path = (found[4] or "").strip("/")
    return Address(found[1], found[2], found[3], path) if not path or is_inside(path) else None


def local(text: str, field: str) -> Path:
    """The path on this machine of what the address `text` names: the copy that is there, or a new one, verified.

    field: that has the address, for messages. Raises ConfigError where it names nothing in its store, StoreError,
    IntegrityError for other bytes than were mirrored, ResourceError where there is no place for a copy.
    """
    address = _parsed(text, field)
    folder = cached(text)
    if folder is None:
        folder = _fetch(address, text, field)
    path = folder / address.path if address.path else folder
    if not path.exists():
        problem = f"the source has no {address.path}"
        raise ConfigError([Problem(field, text, problem, "Correct the end of the address")])
    return path


def or_local(text: str, field: str) -> str:
    """The path on this machine if `text` is an address, else `text` itself. Raises what `local` raises."""
    return str(local(text, field)) if is_address(text) else text


def with_local_files(prompts: Prompts) -> Prompts:
    """The settings of prompts with the paths on this machine of what they have addresses of. Raises as `local`."""
    named = {field: getattr(prompts, field) for field in ("source", "train", "held_out")}
    return prompts.model_copy(update={field: or_local(text, f"prompts.{field}") for field, text in named.items()})


def cached(text: str) -> Path | None:
    """The folder of the copy on this machine, complete by the names and sizes of its files; None where there is none.
    No store is asked."""
    address = parse_address(text)
    if address is None:
        return None
    place = _place(address)
    try:
        raw = (place / "manifest.json").read_bytes()
        manifest = Manifest.from_json(raw, str(place), address.key)
        for file in manifest.files:
            if (place / "files" / file.path).stat().st_size != file.size:
                return None
    except (OSError, IntegrityError):
        return None
    return place / "files" if content_of(manifest.files) == address.content else None


def about(text: str) -> dict[str, Any]:
    """What is known of the origin of the copy on this machine: see `put`. Empty where there is no copy."""
    address = parse_address(text)
    if address is None or cached(text) is None:
        return {}
    raw = (_place(address) / "manifest.json").read_bytes()
    return dict(Manifest.from_json(raw, text, address.key).metrics)


def faults(text: str, field: str) -> list[Problem]:
    """What of the source is missing in its store, by names and sizes, all of it; nothing is fetched. Within seconds:
    where the store does not answer it raises StoreUnavailable after 20 s at most."""
    address = _parsed(text, field)
    store = Store(address.store, _QUICK)
    try:
        manifest = _manifest(store, address)
    except ArtifactNotFound:
        return [_lost(address, field)]
    except IntegrityError as error:
        return [Problem(field, text, f"its manifest cannot be used ({error.problem})", _again(address))]
    there = {name: entry.size for name, entry in store.below(f"{manifest.folder}/").items()}
    absent = [file.path for file in manifest.files if file.path not in there]
    other = [file.path for file in manifest.files if there.get(file.path, file.size) != file.size]
    remedy = _again(address, manifest.metrics.get("source"))
    found = []
    if absent:
        problem = f"is incomplete in the store. Missing: {', '.join(absent)}"
        found.append(Problem(field, text, problem, remedy))
    if other:
        found.append(Problem(field, text, f"is damaged in the store. Of another size: {', '.join(other)}", remedy))
    paths = [file.path for file in manifest.files]
    if address.path and not any(path == address.path or path.startswith(f"{address.path}/") for path in paths):
        found.append(Problem(field, text, f"the source has no {address.path}", "Correct the end of the address"))
    return found


class SourceStore(Store):
    """A store that sources are put into."""

    def put(
        self, name: str, folder: Path, origin: Mapping[str, Any], *, verify: bool = False
    ) -> tuple[Address, Manifest, Sequence[File]]:
        """Copy every file below `folder`, links to files included; its address, its manifest, and the files that were
        copied. Files that the store has are not copied again, so what was interrupted goes on.

        name: the beginning of its address; origin: what is known of it: source, revision, commit, licence. verify: read
        the files that are there and compare their sha256, instead of names and sizes. Raises as `publish`.
        """
        files = scan(folder)
        address = Address(self.url, f"{SOURCES}/{as_name(name)}-{content_of(files)}", content_of(files))
        made = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = Manifest(SCHEMA, address.key, "", STEP, commit(), "", made, files, (), dict(origin))
        published = self._published(address.key)
        there = {path: entry.size for path, entry in self.below(f"{manifest.folder}/").items()}
        lacking = [
            file for file in files if there.get(file.path) != file.size or (verify and not self._has(file, manifest))
        ]
        if lacking and published is not None:
            self._backend.remove(f"{address.key}/manifest.json")  # it says that all is there
        with _shown(f"mirror {address.name}", lacking) as moved:
            for file in lacking:
                at = f"{manifest.folder}/{file.path}"
                try:
                    self._send(folder / file.path, file, at, moved, False)
                except IntegrityError:
                    self._backend.remove(at)
                    raise
        if not lacking and published is not None and published.metrics == manifest.metrics:
            return address, published, ()
        self._put(f"{address.key}/manifest.json", manifest.to_json())
        return address, manifest, lacking

    def _has(self, file: File, manifest: Manifest) -> bool:
        """Whether the store has the bytes of `file`."""
        sink = Stream(None, limit=file.size)
        try:
            self._backend.get(f"{manifest.folder}/{file.path}", sink)
        except (FileNotFoundError, Overrun):
            return False
        return sink.sha256 == file.sha256


def _parsed(text: str, field: str) -> Address:
    address = parse_address(text)
    if address is None:
        problem = "is the address of a store, and not of a source in it"
        remedy = f"Use what `latentac mirror` has written: STORE/{SOURCES}/NAME-DIGEST. A folder goes without file://"
        raise ConfigError([Problem(field, text, problem, remedy)])
    return address


def _manifest(store: Store, address: Address) -> Manifest:
    """Raises ArtifactNotFound, and IntegrityError for a manifest of other files than the address means."""
    manifest = store.manifest(address.key)
    if content_of(manifest.files) != address.content:
        problem = "its manifest names other files than those that were mirrored under this address"
        raise IntegrityError(str(address), problem, _again(address))
    return manifest


def _fetch(address: Address, text: str, field: str) -> Path:
    store, place = Store(address.store, Patience()), _place(address)
    try:
        manifest = _manifest(store, address)
    except ArtifactNotFound:
        raise ConfigError([_lost(address, field)]) from None
    root = _root()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot hold copies of sources ({error.strerror})"
        raise ResourceError(str(root), problem, f"Name a folder that can be written to in {CACHE}") from error
    with disk_errors(place):
        try:
            store.fetch(address.key, place / "files", cache=root)
        except ResourceError:
            if not (place / "files").exists():
                raise
            shutil.rmtree(place / "files")  # a copy that somebody has changed
            store.fetch(address.key, place / "files", cache=root)
        write_whole(place / "manifest.json", manifest.to_json())
    return place / "files"


def _root() -> Path:
    named = os.environ.get(CACHE, "")
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.path.expanduser(named) if named else f"{usual}/latentac").absolute()


def _place(address: Address) -> Path:
    return _root() / address.key


def _lost(address: Address, field: str) -> Problem:
    return Problem(field, str(address), "is not in the store, or was not mirrored to its end", _again(address))


def _again(address: Address, source: object = None) -> str:
    place = f" where {str(source)!r} can be read" if source else ""
    return f"Mirror it again{place}: {program()} mirror --config FILE --to {address.store}"

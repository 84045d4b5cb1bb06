"""Plain objects of a store beside its artifacts: small JSON that points to artifacts, and files that only grow."""

from io import BytesIO
from pathlib import Path
from typing import Any

from latentac.store.blobs import Blobs, Entry, Overrun, Patience, Stream, disk_errors
from latentac.store.manifest import (
    MOST_BYTES,
    clashes,
    dump_json,
    is_inside,
    is_key,
    safe_key,
)
from latentac.store.places import connect
from latentac.system.errors import (
    ArtifactNotFound,
    ConfigError,
    IntegrityError,
    Problem,
)
from latentac.system.reading import parse_json

_MOST_COPIED_BYTES = 4 * 2**30
"""Of plain objects that are copied into a folder."""


class Objects:
    """Plain objects in a store. They have no manifest: a reader finds the old bytes or the new ones."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self._patience = url.rstrip("/"), patience
        self._backend = connect(url, patience)
        self._sent: dict[str, int] = {}

    def write_json(self, key: str, value: object) -> None:
        """Writes a pointer: readers find the old JSON or the new."""
        self._put(self._key(key), dump_json(value, f"{self.url}/{key}"))

    def read_json(self, key: str) -> Any:
        """Reads a pointer. Raises ArtifactNotFound if there is none, IntegrityError if it is not JSON."""
        raw = self._get(self._key(key), "Run the step that writes it first")
        try:
            return parse_json(raw)
        except ValueError as error:
            remedy = "Remove it and run the step that writes it"
            raise IntegrityError(f"{self.url}/{key}", f"it is not JSON ({error})", remedy) from None

    def pointers(self, prefix: str) -> list[str]:
        """Keys of all plain objects below `prefix`, sorted."""
        return sorted(name for name in self._backend.names(f"{self._key(prefix)}/") if is_key(name))

    def below(self, prefix: str) -> dict[str, Entry]:
        """What is known of the objects below `prefix`, by their paths relative to it."""
        return below(self._backend, prefix)

    def write_files(self, folder: Path | str, prefix: str, *, exact: bool = False) -> None:
        """Copies what lies below `folder` to plain objects `<prefix>/<path>`, for readers that know no manifests.

        For files that only grow (event files): one whose size this Store has sent already is not sent again. Objects
        that the folder does not have stay, unless it is to be `exact`.
        """
        self._key(prefix)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            name, data = f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes()
            if self._sent.get(name) != len(data):
                self._put(name, data)
                self._sent[name] = len(data)
        for name in self._backend.names(f"{prefix}/") if exact else ():
            if not (Path(folder) / name.removeprefix(f"{prefix}/")).is_file():
                self._backend.remove(name)

    def read_files(self, prefix: str, folder: Path | str) -> None:
        """Copies the plain objects `<prefix>/<path>` to `folder`: what `write_files` has written.

        Raises IntegrityError for more bytes than the store's own list claims, and than any run writes.
        """
        found = below(self._backend, self._key(prefix))
        if sum(entry.size for entry in found.values()) > _MOST_COPIED_BYTES:
            problem = f"there are more than {_MOST_COPIED_BYTES >> 30} GiB"
            raise IntegrityError(f"{self.url}/{prefix}", problem, "Remove the objects that no run has written")
        for relative, entry in found.items():
            target = Path(folder) / relative
            with disk_errors(target, entry.size):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    self._copy(f"{prefix}/{relative}", Stream(file, limit=entry.size))

    def _key(self, key: str) -> str:
        try:
            return safe_key(key)
        except ValueError as error:
            raise ConfigError([Problem("key", key, str(error), "Choose such a name for the run")]) from None

    def _copy(self, name: str, sink: Stream) -> None:
        try:
            self._backend.get(name, sink)
        except Overrun:
            problem, remedy = "it has more bytes than the store lists", "Run the step again, when nothing writes there"
            raise IntegrityError(f"{self.url}/{name}", problem, remedy) from None

    def _put(self, name: str, data: bytes) -> None:
        self._backend.put(name, Stream(BytesIO(data)), len(data))

    def _get(self, name: str, remedy: str) -> bytes:
        sink = BytesIO()
        try:
            self._backend.get(name, Stream(sink, limit=MOST_BYTES))
        except FileNotFoundError:
            raise ArtifactNotFound(f"{self.url}/{name}", "nothing was published there", remedy) from None
        except Overrun:
            problem = f"it has more than {MOST_BYTES >> 20} MiB, and is not a manifest or pointer of latentac"
            raise IntegrityError(f"{self.url}/{name}", problem, "Remove it and run the step that writes it") from None
        return sink.getvalue()


def below(backend: Blobs, prefix: str) -> dict[str, Entry]:
    """The blobs below a prefix by their paths relative to it, but for those that could not be files of one folder: who
    may write to a bucket may name an object anything."""
    start = f"{prefix.strip('/')}/"
    entries = {name.removeprefix(start): entry for name, entry in backend.entries(start).items()}
    sound = {path: entry for path, entry in entries.items() if is_inside(path) and entry.size >= 0 and _fits(path)}
    for path in set(clashes(sound)):
        del sound[path]
    return sound


def _fits(path: str) -> bool:
    """Whether a file system can have it: 255 bytes a name, and less than 4,096 in all."""
    return len(path) <= 1024 and all(len(name.encode()) <= 255 for name in path.split("/"))

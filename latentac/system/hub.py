"""A model hub: what its client does, within a bound.

The client bounds the silence between two bytes alone, waits for a file that another process fetches without a bound,
and leaves threads that the interpreter waits for when it ends. So it works in a process of its own, which is ended
where too little arrives. What it has fetched by then stays in its cache, and the next call goes on from there.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentac.system.errors import describe
from latentac.system.lifetime import die_with_parent
from latentac.system.waiting import TimeUp

ANSWER_SECONDS = 60.0
BYTES_PER_SECOND = 16_384.0
"""A hub that sends less, on average over ANSWER_SECONDS, counts as one that does not answer."""

_CHUNK_BYTES = 2**18
"""Of what the client keeps in memory before it writes. Its own 10 MiB would look like silence on a slow line."""

_SILENT = set[str]()
"""Hubs that did not answer: they are not asked again in this process."""

_log = logging.getLogger(__name__)


def snapshot(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the hub's cache of the repository `source`, with the files that match `patterns` downloaded where
    the hub can be reached. Raises OSError, TimeUp among them, and ValueError for a name that is not a hub id."""
    wanted: dict[str, Any] = {"source": source, "revision": revision, "patterns": list(patterns)}
    if offline():
        return Path(_snapshot(**wanted))
    try:
        return Path(_asked("snapshot", source, wanted))
    except TimeUp as error:
        try:
            folder = _snapshot(**wanted, local=True)
        except OSError:
            raise error from None
        _log.warning("%s: the cache is used", error)
        return Path(folder)


def names(source: str, revision: str) -> list[str]:
    """Names of the repository's files, asked of the hub. Raises OSError."""
    return list(_asked("names", source, {"source": source, "revision": revision}))


def offline() -> bool:
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def _asked(what: str, source: str, arguments: dict[str, Any]) -> Any:
    command = [sys.executable, "-m", "latentac.system.hub", json.dumps([what, arguments])]
    if _endpoint() in _SILENT:
        raise TimeUp(f"{_endpoint()}: did not answer before")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    before = _cached_bytes(source)
    try:
        while True:
            try:
                answer, _ = process.communicate(timeout=ANSWER_SECONDS)
                break
            except subprocess.TimeoutExpired:
                arrived = _cached_bytes(source) - before
                if arrived < ANSWER_SECONDS * BYTES_PER_SECOND:
                    _SILENT.add(_endpoint())
                    raise TimeUp(f"{_endpoint()}: {arrived} bytes came within {ANSWER_SECONDS:g} s") from None
                before += arrived
    finally:
        process.kill()
        process.wait()
    found = json.loads(answer) if answer else {"error": f"the hub's client ended with {process.returncode}"}
    if "error" in found:
        raise OSError(found["error"])
    return found["answer"]


def _cached_bytes(source: str) -> int:
    """On the disk, of the repository's files, by whichever process fetches them."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model") / "blobs"
    found = 0
    for path in blobs.glob("*"):
        try:
            found += path.stat().st_blocks * 512  # not the size, which a file may have before its bytes
        except OSError:  # renamed meanwhile
            continue
    return found


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _snapshot(source: str, revision: str | None, patterns: list[str], *, local: bool = False) -> str:
    from huggingface_hub import constants, snapshot_download

    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    return str(snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=local))


def _names(source: str, revision: str) -> list[str]:
    from huggingface_hub import HfApi

    return list(HfApi().list_repo_files(source, revision=revision))


def main(arguments: Sequence[str]) -> int:
    """One call, as JSON in the first argument; its answer or its error as JSON on stdout."""
    what, options = json.loads(arguments[0])
    calls: dict[str, Callable[..., Any]] = {"snapshot": _snapshot, "names": _names}
    try:
        answer = {"answer": calls[what](**options)}
    except Exception as error:  # noqa: BLE001 - whatever the client raises is raised in the caller
        answer = {"error": describe(error)}
    print(json.dumps(answer), file=sys.stdout, flush=True)
    return 0


if __name__ == "__main__":
    die_with_parent()
    raise SystemExit(main(sys.argv[1:]))

"""What ends a training app for good, passed on through the store: on a cluster its launcher is on another machine.

    failures/<run>.json   {"attempt", "where", "starts", "error"}

`attempt` names one submission of the app, so that what an earlier one left is not taken for news. `error` is null
while it may pass: an error that nobody expected is counted, once for each start of the workers, and is final at the
third start that meets it at the same place. An expected error is final at once, but for a store that does not answer.
"""

import os
import traceback
from pathlib import Path
from typing import Any

from latentac.store import Store
from latentac.system.errors import ArtifactNotFound, IntegrityError, LatentacError, TrainingError, restore

ATTEMPT = "LATENTAC_ATTEMPT"
"""Environment variable of the workers: the submission they belong to."""

NOTE = "unexpected.txt"
"""File beside the workers' logs on one machine."""

SAME_FAILURES = 3
_TRY_AGAIN = 75


def report(store: Store, run: str, error: Exception, iteration: int) -> None:
    """Leave `error`, met by this worker in `iteration`, for the launcher. Raises StoreError."""
    attempt = os.environ[ATTEMPT]
    before = _read(store, run, attempt)
    if before.get("error"):  # the first one is the cause
        return
    where = f"{type(error).__name__} in iteration {iteration}"
    # All workers of one start share the address that they met at, and no other start has it.
    start = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    earlier = before.get("starts") if before.get("where") == where else None
    starts = {start, *(map(str, earlier) if isinstance(earlier, list) else ())}
    final = error if isinstance(error, LatentacError) and error.exit_code != _TRY_AGAIN else None
    if final is None and len(starts) >= SAME_FAILURES:
        final = error if isinstance(error, LatentacError) else _repeated(error, iteration, len(starts))
    record = {"attempt": attempt, "where": where, "starts": sorted(starts)}
    store.write_json(_key(run), {**record, "error": final.to_dict() if final else None})


def read(store: Store, run: str, attempt: str) -> LatentacError | None:
    """The error that ended `attempt` of training `run`, if one did. Raises StoreError."""
    fields = _read(store, run, attempt).get("error")
    return restore(fields) if fields else None


def last(store: Store, run: str) -> LatentacError | None:
    """The error that ended the last attempt of training `run`, if one did. Raises StoreError."""
    try:
        left = store.read_json(_key(run))
    except (ArtifactNotFound, IntegrityError):
        return None
    fields = left.get("error") if isinstance(left, dict) else None
    return restore(fields) if isinstance(fields, dict) else None


def note(folder: Path, error: Exception, iteration: int) -> None:
    """Leave in `folder` an unexpected error of a worker of this machine. The last note counts: workers start again."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split())[:500]
    text = f"{type(error).__name__}: {reason} (in iteration {iteration}, {Path(last.filename).name}:{last.lineno})"
    (folder / NOTE).write_text(text, encoding="utf-8")


def noted(folder: Path) -> str:
    """The last note in `folder`; empty if there is none."""
    return (folder / NOTE).read_text(encoding="utf-8") if (folder / NOTE).exists() else ""


def _read(store: Store, run: str, attempt: str) -> dict[str, Any]:
    try:
        record = store.read_json(_key(run))
    except (ArtifactNotFound, IntegrityError):
        return {}
    sound = isinstance(record, dict) and record.get("attempt") == attempt
    return record if sound and _is_texts(record.get("starts")) else {}


def _is_texts(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(each, str) for each in found)


def _key(run: str) -> str:
    return f"failures/{run}.json"


def _repeated(error: Exception, iteration: int, starts: int) -> TrainingError:
    reason = " ".join(str(error).split())[:300]
    return TrainingError(
        f"iteration {iteration}",
        f"the workers were started {starts} times, and each time ended there with {type(error).__name__} ({reason})",
        "See the traceback in the workers' log. A resumed run continues from its last checkpoint",
    )

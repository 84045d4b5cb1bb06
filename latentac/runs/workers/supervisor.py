"""Supervises a worker of the training job and reports how it ended.

`python -m latentac.runs.workers.supervisor RUN STORE OUTPUT [FAILURE]` starts it.

The worker (`latentac.runs.workers.worker`) is a child, made before torch is loaded. If a reward ends it, without an
exception, this one is left to report it: in the file FAILURE, or on a cluster in the store.
"""

import contextlib
import json
import logging
import sys
from pathlib import Path

from latentac.runs import failures
from latentac.store import open_store
from latentac.system.calls import CALLS, supervised
from latentac.system.errors import RewardError, StoreError
from latentac.system.lifetime import began, die_with_parent
from latentac.system.terminal import escape_streams

_log = logging.getLogger(__name__)


def main(run: str, store: str, output: str, failure: str = "") -> int:
    """The worker's exit code; in the worker itself too."""
    if failure:  # on one machine no worker outlives the step that launched it
        die_with_parent()
    start = began()
    ended = supervised((Path(failure).parent if failure else Path(output) / run) / CALLS)
    if ended is None:
        from latentac.runs.workers.worker import main as work

        return work(run, store, output, failure, began=start)
    code, crash = ended
    if crash is None:
        return code
    _report(run, store, failure, crash)
    return crash.exit_code


def _report(run: str, store: str, failure: str, crash: RewardError) -> None:
    if failure:
        Path(failure).write_text(json.dumps(crash.to_dict()))
        return
    _log.error("%s", crash)
    with contextlib.suppress(StoreError):
        failures.report(open_store(store), run, crash, 0)


if __name__ == "__main__":
    escape_streams()
    sys.exit(main(*sys.argv[1:]))

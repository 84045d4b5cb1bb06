"""`python -m latentac.store.bootstrap`: makes an S3 store ready, or says why it is not. A cluster's chart runs it.

It waits, within a bound, for a server that is still starting, makes the bucket where there is none, and proves by an
object that the credentials can write, read and remove. Running it again changes nothing.
"""

import argparse
import sys
from collections.abc import Sequence

from latentac.store.artifacts import open_store
from latentac.store.blobs import Patience
from latentac.store.places import connect
from latentac.system.errors import ConfigError, LatentacError, Problem
from latentac.system.reading import seconds
from latentac.system.terminal import escape_streams

EXAMPLE = """example:
  python -m latentac.store.bootstrap --store s3://latentac/store

exit codes: 0 the store is ready, 2 wrong arguments or environment, 3 it refuses, 75 it does not answer
"""
BACK_OFF_SECONDS = 2.0


def patience_of(wait_seconds: float) -> Patience:
    """No attempt begins later than `wait_seconds` after the first."""
    return Patience(
        retries=max(1, round(wait_seconds / BACK_OFF_SECONDS)),
        back_off_seconds=BACK_OFF_SECONDS / 2,
        back_off_max_seconds=BACK_OFF_SECONDS,
        timeout_seconds=10.0,
        idle_seconds=wait_seconds,
    )


def bootstrap(url: str, wait_seconds: float, *, make: bool = True) -> bool:
    """Whether the bucket was made now. Raises ConfigError, StoreAccessError and StoreUnavailable."""
    patience = patience_of(wait_seconds)
    if not url.startswith("s3://"):
        raise ConfigError(
            [Problem("--store", url, "is not s3://<bucket>/<prefix>", "This command is only for buckets")]
        )
    made = False
    if make:
        from latentac.store.bucket import Bucket

        backend = connect(url, patience)
        made = isinstance(backend, Bucket) and backend.make()
    open_store(url, patience).probe()
    return made


def main(arguments: Sequence[str]) -> int:
    """The exit code. One line on stdout, or one error on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m latentac.store.bootstrap",
        description="Make an S3 store ready: wait for it, make its bucket, write and read an object.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", required=True, metavar="URL", help="s3://<bucket>/<prefix>")
    parser.add_argument("--wait-seconds", type=seconds, default=30.0, metavar="S", help="for a starting server (30)")
    parser.add_argument("--check", action="store_true", help="make nothing, only write and read an object")
    options = parser.parse_args(arguments)
    try:
        made = bootstrap(options.store, options.wait_seconds, make=not options.check)
    except LatentacError as error:
        print(f"bootstrap: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(f"{options.store}: {'made, ' if made else ''}written and read", file=sys.stdout, flush=True)
    return 0


if __name__ == "__main__":
    escape_streams()
    raise SystemExit(main(sys.argv[1:]))

"""Faults of a store, in numbers: is a partial artifact ever visible, and does every wait end within its bound?

    python -m benchmarks.chaos [--faults 50] [--seed 0]

A real MinIO behind a proxy, on loopback. Each fault meets a publish or a fetch of 12 MiB while it moves. Afterwards the
store is whole again, a reader with fresh eyes verifies every artifact that is listed, and the same operation is done
once more and has to succeed. A wait is counted from the fault to the error.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.plan import FULL, require_clean_tree
from latentac.runs.preparation.prepare import environment
from latentac.store import Store, open_store
from latentac.store.blobs import Patience
from latentac.system.errors import ResourceError, StoreError
from latentac.system.progress import progress
from tests.proxy import Proxy
from tools.minio import Server

PATIENCE = Patience(back_off_seconds=0.1, timeout_seconds=2.0, idle_seconds=4.0, bytes_per_second=1_000_000)
MARGIN_SECONDS = 1.0
"""Of a busy machine."""
RECOVERY_SECONDS = 30.0
SIZES = (3_000_000, 9_000_000)
DISK_MIB = 192
USUAL_BYTES_PER_SECOND = 20_000_000.0
"""Of the proxy: an operation takes half a second, so that a fault finds it moving."""


@dataclass
class Scene:
    """A server on a small disk of its own, and the proxy in front of it."""

    server: Server
    proxy: Proxy
    disk: Path | None

    @contextmanager
    def kill(self) -> Iterator[None]:
        """kill -9; it comes back when the operation is over."""
        self.server.kill()
        yield
        self.server.start()

    @contextmanager
    def restart(self) -> Iterator[None]:
        """kill -9, and back at once."""
        self.server.kill()
        self.server.start()
        yield

    @contextmanager
    def reset(self) -> Iterator[None]:
        """Every connection ends with RST."""
        self.proxy.reset = True
        yield
        self.proxy.reset = False

    @contextmanager
    def silence(self) -> Iterator[None]:
        """It accepts everything and says nothing."""
        self.proxy.silent = True
        yield
        self.proxy.silent = False

    @contextmanager
    def slow(self) -> Iterator[None]:
        """It says 2 kB per second."""
        self.proxy.bytes_per_second = 2_000
        yield
        self.proxy.bytes_per_second = USUAL_BYTES_PER_SECOND

    @contextmanager
    def full(self) -> Iterator[None]:
        """No byte of its disk is free."""
        assert self.disk is not None
        filler = self.disk / "filler"
        with filler.open("wb") as stream:
            try:
                while True:
                    stream.write(bytes(2**20))
            except OSError:
                pass
        yield
        filler.unlink()

    @property
    def faults(self) -> dict[str, Callable[[], Any]]:
        kinds = [self.kill, self.restart, self.reset, self.silence, self.slow, *([self.full] if self.disk else [])]
        return {kind.__name__: kind for kind in kinds}


@dataclass
class Tally:
    """Of one kind of fault. waits: seconds from the fault to the error."""

    faults: int = 0
    failed: int = 0
    partial: int = 0
    late: int = 0
    waits: list[float] = field(default_factory=list)


@contextmanager
def scene(folder: Path, disk_mib: int = DISK_MIB) -> Iterator[Scene]:
    """Sets the environment for it. Only root has a small disk."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk_mib}m", "tmpfs", disk], check=True)
    with ExitStack() as stack:
        if mounted:
            stack.callback(lambda: subprocess.run(["umount", "-l", disk], check=True))
        server = Server(disk / "minio").start()
        stack.callback(server.stop)
        proxy = stack.enter_context(Proxy(("127.0.0.1", server.port)))
        os.environ |= {**server.environment, "LATENTAC_S3_ENDPOINT": f"http://{proxy.address}"}
        proxy.bytes_per_second = USUAL_BYTES_PER_SECOND
        yield Scene(server, proxy, disk if mounted else None)


def one(scene: Scene, kind: str, number: int, choice: random.Random, folder: Path, tally: Tally) -> None:
    """Let one fault meet one operation, and look at what is left."""
    url, source = f"s3://{scene.server.bucket}/chaos", folder / "source"
    store, publishes, target = open_store(url, PATIENCE), kind == "full" or choice.random() < 0.5, folder / "out"
    key = f"run-{number}/train" if publishes else "run/train"
    ended: list[tuple[float, Exception | None]] = []

    def operate() -> None:
        error = None
        try:
            work(store, key, source if publishes else None, target)
        except (StoreError, ResourceError) as caught:
            error = caught
        ended.append((time.monotonic(), error))

    shutil.rmtree(target, ignore_errors=True)
    thread = threading.Thread(target=operate)
    thread.start()
    time.sleep(choice.uniform(0.0, 0.4))
    with scene.faults[kind]():
        met = time.monotonic()
        thread.join(120)
    at, error = ended[0] if ended else (time.monotonic(), TimeoutError("it still waits"))
    bound = PATIENCE.bound_seconds * (2 if kind == "slow" else 1) + MARGIN_SECONDS
    tally.faults += 1
    tally.failed += error is not None
    tally.waits += [max(0.0, at - met)] if error is not None else []
    tally.late += error is not None and not isinstance(error, ResourceError) and at - met > bound
    tally.partial += partial(open_store(url), target, source)
    shutil.rmtree(target, ignore_errors=True)
    recovered(lambda: work(open_store(url), key, source if publishes else None, target))
    if publishes:  # the small disk has room for a few
        made = [name for name in open_store(url).entries() if name.startswith(f"{key}/")]
        open_store(url).remove(sorted(made, reverse=True))  # the manifest first


def work(store: Store, key: str, source: Path | None, target: Path) -> None:
    if source is None:
        store.fetch(key, target)
    else:
        store.publish(key, source, run="run", step="train", config_hash="0")


def recovered(operation: Callable[[], None]) -> None:
    """It succeeds; MinIO takes some seconds to see that its disk has room again."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while True:
        try:
            return operation()
        except ResourceError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def partial(store: Store, target: Path, source: Path) -> int:
    """Artifacts that are listed and are not whole, and 1 for a folder that appeared and is not the artifact."""
    found = 0
    for key in store.keys(""):
        try:
            store.verify(store.manifest(key))
        except StoreError:
            found += 1
    names = [path.name for path in source.iterdir()]
    whole = not target.exists() or all((target / each).read_bytes() == (source / each).read_bytes() for each in names)
    return found + (not whole)


def measure(faults: int, seed: int) -> dict[str, Any]:
    choice = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "source").mkdir()
        for number, size in enumerate(SIZES):
            (folder / "source" / f"{number}.safetensors").write_bytes(choice.randbytes(size))
        with scene(folder) as stage:
            work(open_store(f"s3://{stage.server.bucket}/chaos"), "run/train", folder / "source", folder / "out")
            tallies = {kind: Tally() for kind in stage.faults}
            with progress(faults, "chaos", "faults") as bar:
                for number in range(faults):
                    kind = list(tallies)[number % len(tallies)]
                    one(stage, kind, number, choice, folder, tallies[kind])
                    bar.update()
    found = environment()
    return {
        "command": "make chaos-store",
        "commit": found["commit"],
        "machine": found["machine"],
        "seed": seed,
        "bound_seconds": PATIENCE.bound_seconds,
        "faults": faults,
        "partial": sum(each.partial for each in tallies.values()),
        "late": sum(each.late for each in tallies.values()),
        "kinds": {
            kind: {"faults": each.faults, "failed": each.failed, "longest_wait": round(max(each.waits, default=0.0), 2)}
            for kind, each in tallies.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FULL.results / "chaos" / "store.json")
    options = parser.parse_args(arguments)
    require_clean_tree(options.output)
    found = measure(options.faults, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    for kind, row in found["kinds"].items():
        print(
            f"{kind:<8} {row['faults']:>3} faults, {row['failed']:>3} errors, longest wait {row['longest_wait']:.1f} s"
        )
    print(f"partial artifacts visible: {found['partial']}; waits above their bound: {found['late']}")
    return int(bool(found["partial"] or found["late"]))


if __name__ == "__main__":
    sys.exit(main())

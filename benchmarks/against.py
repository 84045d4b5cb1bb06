"""Throughput of the endpoint and of the store against an earlier commit: `make bench-against COMMIT=966fe4c`.

Both versions run beside each other on one machine and take turns; which one begins alternates. Each round gives a
ratio of this version to the earlier one, above 1 where this one is faster. The environment is the same for both.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.plan import FULL, require_clean_tree
from latentac.evaluation.measures import median
from latentac.runs.preparation.prepare import environment
from latentac.serving.client import Client
from latentac.system.progress import progress
from tools.minio import Server

ROOT = Path(__file__).parents[1]
BOUND = 0.97
"""A ratio from here on counts as unchanged."""
CALLERS = 8
IMAGES = 64
QUESTIONS = 400
LARGE_BYTES, SMALL_FILES, SMALL_BYTES = 32_000_000, 100, 20_000
"""Of the artifact: one file as weights are, and many as a report has."""
_BOOTSTRAP = 2000

Measurement = tuple[str, Callable[[int], list[float]]]
"""Its name, and what gives the rates of (now, before) for a round."""


class Side:
    """A version, in a process of its own with `tree` as its code."""

    def __init__(self, tree: Path) -> None:
        command = [sys.executable, "-P", str(Path(__file__).with_name("side.py"))]
        self._process = subprocess.Popen(
            command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, *words: str) -> Any:
        """The answer to one line. Raises RuntimeError if the process has ended; it has said why on stderr."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{words[0]} failed: see above")
        return json.loads(answer)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def images(address: str, turn: int) -> float:
    """Images per second, with CALLERS requests under way at any time."""

    def draw(number: int) -> None:
        Client(address).predict({"prompt": "two red squares", "method": "none", "seed": 1000 * turn + number})

    began = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(draw, range(IMAGES)))
    return IMAGES / (time.perf_counter() - began)


def questions(address: str, turn: int) -> float:
    """Requests per second for the options, over CALLERS connections that stay open. No image is drawn."""
    place = urlsplit(address)

    def caller(number: int) -> None:
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        for _ in range(QUESTIONS // CALLERS):
            connection.request("GET", "/v1/images/options")
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"{address} answered {response.status}")
            response.read()
        connection.close()

    began = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(caller, range(CALLERS)))
    return QUESTIONS / (time.perf_counter() - began)


def endpoint(now: Side, before: Side, folder: Path, recipe: str) -> Iterator[Measurement]:
    """How fast the endpoint draws, and how fast it answers what needs no image."""
    addresses = [side.ask("serve", recipe, str(folder / name)) for side, name in ((now, "now"), (before, "before"))]
    for name, measured in (("images", images), ("questions", questions)):
        yield name, partial(_both, addresses, measured)


def store(now: Side, before: Side, folder: Path, name: str, url: str) -> Iterator[Measurement]:
    """Artifacts per second. A fetch is of what the same version published in the round before."""
    sides = {"now": now, "before": before}

    def publish(side: str, turn: int) -> float:
        return 1 / sides[side].ask("publish", url, f"{side}/{turn}/train", str(folder / "source"))

    def fetch(side: str, turn: int) -> float:
        target = folder / "out"
        seconds = sides[side].ask("fetch", url, f"{side}/{turn}/train", str(target))
        shutil.rmtree(target)
        return 1 / seconds

    for operation, measured in (("publish", publish), ("fetch", fetch)):
        yield f"{operation} {name}", partial(_both, list(sides), measured)


def _both(sides: Sequence[str], measured: Callable[[str, int], float], turn: int) -> list[float]:
    """The number of each side, in the order of `sides`; every other turn the last is measured first."""
    order = sides if turn % 2 else list(reversed(sides))
    found = {side: measured(side, turn) for side in order}
    return [found[side] for side in sides]


@contextmanager
def tree(commit: str, folder: Path) -> Iterator[Path]:
    """A checkout of `commit` in `folder`, for the time of the context."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def write_source(folder: Path) -> None:
    """The files of an artifact, the same each time."""
    folder.mkdir()
    choice = random.Random(0)
    (folder / "weights.safetensors").write_bytes(choice.randbytes(LARGE_BYTES))
    for number in range(SMALL_FILES):
        (folder / f"{number}.json").write_bytes(choice.randbytes(SMALL_BYTES))


def measure(commit: str, recipe: str, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        write_source(folder / "source")
        server = Server(folder / "minio").start()
        stack.callback(server.stop)
        os.environ |= server.environment
        now, before = Side(ROOT), Side(stack.enter_context(tree(commit, folder / "tree")))
        stack.callback(now.end)
        stack.callback(before.end)
        measurements = [
            *endpoint(now, before, folder, recipe),
            *store(now, before, folder, "S3", f"s3://{server.bucket}/against"),
            *store(now, before, folder, "file", f"file://{folder}/files"),
        ]
        with progress(rounds + 1, "against", "rounds") as bar:
            for turn in range(rounds + 1):
                for name, measured in measurements:
                    pair = measured(turn)
                    if turn:  # the first round only warms
                        rates.setdefault(name, []).append(pair)
                bar.update()
    found = environment()
    return {
        "command": f"make bench-against COMMIT={commit}",
        "commit": found["commit"],
        "before": commit,
        "machine": found["machine"],
        "bound": BOUND,
        "rates": {name: np.median(np.array(each), 0).round(2).tolist() for name, each in rates.items()},
        "ratios": {
            name: median(np.array(each)[:, 0] / np.array(each)[:, 1], _BOOTSTRAP, 0) for name, each in rates.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__.partition("\n")[0])
    parser.add_argument("commit", help="the earlier version; its dependencies must be those of this one")
    parser.add_argument("--recipe", default="shapes-unet")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--output", type=Path, default=FULL.results / "against" / "throughput.json", help="file of the figures"
    )
    options = parser.parse_args(arguments)
    require_clean_tree(options.output)
    found = measure(options.commit, options.recipe, options.rounds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    for name, ratio in found["ratios"].items():
        now, before = found["rates"][name]
        print(
            f"{name:<14} {now:8.2f} per second, {before:8.2f} before: {ratio['median']:.3f} "
            f"[{ratio['low']:.3f}, {ratio['high']:.3f}], {ratio['n']} rounds"
        )
    below = [name for name, ratio in found["ratios"].items() if ratio["median"] < BOUND]
    if below:
        print(f"below {BOUND}: {', '.join(below)}")
    return int(bool(below))


if __name__ == "__main__":
    sys.exit(main())

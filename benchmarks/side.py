"""One of two versions that `benchmarks.against` compares: it runs in that version's tree and obeys lines of JSON.

It imports only what both versions have. Each line is `[operation, argument, ...]`; each answer is one line of JSON.
"""

import json
import sys
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from latentac.serving.process import ServerProcess
from latentac.store import open_store

# Looked up when it runs: where `resolve_recipe` lies differs between versions, and this module imports it in each.
_bench: Any = import_module("benchmarks.serving" if Path("benchmarks").is_dir() else "tests.bench.serving")


def main() -> None:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        for line in sys.stdin:
            operation, *arguments = json.loads(line)
            print(json.dumps(obey(stack, operation, *arguments)), flush=True)


def obey(stack: ExitStack, operation: str, *arguments: str) -> Any:
    """serve: the address of a server; publish, fetch: seconds."""
    if operation == "serve":
        recipe, folder = arguments
        exported = _bench.export_base(_bench.resolve_recipe(recipe, "", []), Path(folder))
        return stack.enter_context(ServerProcess(exported, ready_seconds=240.0)).address
    url, key, folder = arguments
    store, began = open_store(url), time.perf_counter()
    if operation == "publish":
        store.publish(key, Path(folder), run="run", step="train", config_hash="0")
    else:
        store.fetch(key, Path(folder))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

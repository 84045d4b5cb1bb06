"""Layers of a docker daemon of this machine, read from its folder without asking it.

`docker save` writes all layers of an image to a temporary folder before it sends the first byte: minutes for 5 GB,
also when one small layer is wanted. The daemon keeps a layer as a folder of files and a recipe of the archive that it
came from (all headers and paddings in order), from which the very same bytes are put together again.
"""

import base64
import gzip
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.docker import Docker

_CHUNK = 2**20
_FILE = 1


class Layers:
    """The images of one daemon whose storage driver is overlay2, below its data folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def of(cls, docker: Docker) -> "Layers | None":
        """None where the daemon is another machine's, or keeps its layers in another way."""
        ask = ["docker", "--host", docker.host, "info", "--format", "{{.Driver}} {{.DockerRootDir}}"]
        driver, _, root = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip().partition(" ")
        found = Path(root)
        known = driver == "overlay2" and docker.host.startswith("unix:") and (found / "image/overlay2/layerdb").is_dir()
        return cls(found) if known else None

    def config(self, image: str) -> bytes:
        """An image's configuration, byte for byte; image: its id, which is the configuration's digest."""
        return (self.root / "image/overlay2/imagedb/content/sha256" / image.removeprefix("sha256:")).read_bytes()

    def size(self, layers: list[str]) -> int:
        """Bytes of the archive of the last of `layers` (digests of an image's lowest layers, in order)."""
        entries = self._recipe(_chain(layers))
        return sum(int(entry["size"]) if _is_file(entry) else len(_raw(entry)) for entry in entries)

    def read(self, layers: list[str]) -> Iterator[bytes]:
        """That archive. The reader compares its digest with the layer's."""
        chain = _chain(layers)
        files = self.root / "overlay2" / (self._folder(chain) / "cache-id").read_text() / "diff"
        for entry in self._recipe(chain):
            if not _is_file(entry):
                yield _raw(entry)
                continue
            name = base64.b64decode(entry["name_raw"]).decode() if "name_raw" in entry else entry["name"]
            with (files / name.lstrip("/")).open("rb") as source:
                while part := source.read(_CHUNK):
                    yield part

    def _folder(self, chain: str) -> Path:
        return self.root / "image/overlay2/layerdb/sha256" / chain.removeprefix("sha256:")

    def _recipe(self, chain: str) -> Iterator[dict[str, Any]]:
        with gzip.open(self._folder(chain) / "tar-split.json.gz", "rt") as lines:
            for line in lines:
                yield json.loads(line)


def _is_file(entry: dict[str, Any]) -> bool:
    return bool(entry["type"] == _FILE and entry.get("size"))


def _raw(entry: dict[str, Any]) -> bytes:
    """Bytes of the archive that are not a file's content; an entry of an empty file has none."""
    return b"" if entry["type"] == _FILE else base64.b64decode(entry["payload"])


def _chain(layers: list[str]) -> str:
    """The name of a stack of layers, as the OCI image specification defines ChainID."""
    chain = layers[0]
    for layer in layers[1:]:
        chain = f"sha256:{hashlib.sha256(f'{chain} {layer}'.encode()).hexdigest()}"
    return chain

"""A real image registry on loopback, and small images in it that no docker has to build."""

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.binaries import program
from tools.golang import Unavailable
from tools.minio import free_port

START_SECONDS = 30.0
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


class Registry:
    """One registry with its data in `folder`. Docker and cosign speak HTTP with it, for it is on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.host = folder, f"127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Registry":
        """Starts it and waits until it answers. Raises Unavailable with the end of its log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = {"filesystem": {"rootdirectory": str(self.folder / "data")}, "delete": {"enabled": True}}
        settings = {"version": 0.1, "storage": storage, "http": {"addr": self.host}, "log": {"level": "warn"}}
        (self.folder / "settings.yml").write_text(json.dumps(settings))
        quiet = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
        command = [str(program("registry")), "serve", str(self.folder / "settings.yml")]
        log = self.folder / "log"
        with log.open("ab") as sink:
            self.process = subprocess.Popen(command, env=quiet, stdout=sink, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.ask("GET", "")
                return self
            except OSError:
                time.sleep(0.05)
        self.stop()
        raise Unavailable(f"no registry came up at {self.host}:\n{log.read_text()[-2000:]}")

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> Mapping[str, str]:
        """The headers of an answer of its API, at /v2/<path> or at a whole address."""
        address = path if path.startswith("http") else f"http://{self.host}/v2/{path}"
        headers = {"Content-Type": kind or "application/octet-stream", "Accept": MANIFEST}
        request = urllib.request.Request(address, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return dict(answer.headers)

    def push(self, repository: str, tag: str, labels: Mapping[str, str] | None = None) -> str:
        """Push an image of one file, and give its digest."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            content = f"{repository}:{tag}".encode()
            about = tarfile.TarInfo("name")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
        layer = packed.getvalue()
        config = {"architecture": "amd64", "os": "linux", "config": {"Labels": dict(labels or {})}}
        config |= {"rootfs": {"type": "layers", "diff_ids": [_digest(layer)]}}
        described = [self._blob(repository, *each) for each in ((json.dumps(config).encode(), CONFIG), (layer, LAYER))]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[0], "layers": described[1:]}
        return self.ask("PUT", f"{repository}/manifests/{tag}", json.dumps(manifest).encode(), MANIFEST)[
            "Docker-Content-Digest"
        ]

    def _blob(self, repository: str, content: bytes, kind: str) -> dict[str, Any]:
        digest = _digest(content)
        place = self.ask("POST", f"{repository}/blobs/uploads/", b"")["Location"]
        self.ask("PUT", f"{place}{'&' if '?' in place else '?'}digest={digest}", content)
        return {"mediaType": kind, "digest": digest, "size": len(content)}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"

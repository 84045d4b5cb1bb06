"""The built images, and containers as hardened as a cluster's `restricted` namespace makes them."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient
from docker.errors import APIError
from docker.models.containers import Container
from docker.models.images import Image

from images.provenance import provenance
from images.publish import cosign_program
from tests.latentac.serving.conftest import config, exported_folder  # noqa: F401  # a model to serve
from tests.registry import Registry
from tools.docker import Docker
from tools.golang import Unavailable

RUN_SECONDS = 240
PASSWORD = "marker-password"
INIT = ["/usr/bin/tini", "--"]
HARDENED: dict[str, Any] = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "rw,mode=1777", "/work": "rw,mode=0770,uid=65532,gid=65532"},  # noqa: S108  # in the container
    "network_mode": "host",
    "detach": True,
}


@dataclass(frozen=True)
class Images:
    """What `make images` built. By name: torch, train, serve, pipeline, minio."""

    client: DockerClient

    def image(self, name: str) -> Image:
        return self.client.images.get(f"latentac/{name}:dev")

    @contextlib.contextmanager
    def started(self, name: str, *command: str, **options: Any) -> Iterator[Container]:
        """A container for as long as the context lasts; gone with its volumes afterwards."""
        container = self.client.containers.run(f"latentac/{name}:dev", list(command), **{**HARDENED, **options})
        try:
            yield container
        finally:
            with contextlib.suppress(APIError):
                container.remove(force=True, v=True)

    def run(self, name: str, *command: str, **options: Any) -> tuple[int, str]:
        """(exit code, stdout and stderr) of a command in a container of its own."""
        with self.started(name, *command, **options) as container:
            code = container.wait(timeout=RUN_SECONDS)["StatusCode"]
            return int(code), container.logs().decode(errors="replace")


@pytest.fixture(scope="session")
def images(docker_daemon: Docker) -> Iterator[Images]:
    try:
        for name in ("torch", "train", "serve", "pipeline", "minio"):
            docker_daemon.image(f"latentac/{name}:dev")
    except Unavailable as error:
        pytest.skip(str(error))
    with contextlib.closing(docker_daemon.client()) as client:
        yield Images(client)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A real registry on loopback, empty at first."""
    try:
        running = Registry(tmp_path_factory.mktemp("registry")).start()
    except Unavailable as error:
        pytest.skip(str(error))
    yield running
    running.stop()


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a private key of cosign, or gives the one of that name again."""
    monkeypatch.setenv("COSIGN_PASSWORD", PASSWORD)
    try:
        program = cosign_program()
    except Unavailable as error:
        pytest.skip(str(error))

    def pair(name: str) -> Path:
        file = tmp_path / f"{name}.key"
        if not file.exists():
            command = [program, "generate-key-pair", "--output-key-prefix", str(file.with_suffix(""))]
            subprocess.run(command, check=True, capture_output=True)
        return file

    return pair


@pytest.fixture
def predicates(tmp_path: Path) -> dict[str, Path]:
    """What is attested to an image: a small bill of materials, and a real provenance."""
    bill = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": []}
    written = {"cyclonedx": bill, "slsaprovenance1": provenance("train", {})}
    for name, content in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return {name: tmp_path / f"{name}.json" for name in written}

"""`make images` builds on a base by the digest that its registry gave it, and says which; with a real registry."""

import contextlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker import DockerClient
from docker.errors import APIError, ImageNotFound

from images import build
from images.build import Base, make, repository, wanted
from tests.registry import Registry
from tools.docker import Docker
from tools.golang import Unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PREFIX, NAME = "latentac-test-bases", "latentac-test-bases/minio:t"


def least() -> bytes:
    """A tar of what minio.Dockerfile runs on a base: a shell, three commands, and something that is called tini."""
    programs = {f"usr/bin/{name}": str(shutil.which(name)) for name in ("sh", "mkdir", "chown", "chmod")}
    output = "".join(subprocess.check_output(["ldd", path], text=True) for path in programs.values())
    libraries = {word for word in output.split() if word.startswith("/")}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", dereference=True) as archive:
        for target, path in {**programs, "usr/bin/tini": programs["usr/bin/sh"], "etc/passwd": "/dev/null"}.items():
            archive.add(Path(path).resolve(), target)
        for path in libraries:
            archive.add(Path(path).resolve(), path.lstrip("/"))
        link = tarfile.TarInfo("bin")
        link.type, link.linkname = tarfile.SYMTYPE, "usr/bin"
        archive.addfile(link)
        archive.add("/etc/hostname", "etc/group")
    return packed.getvalue()


@pytest.fixture
def client(docker_daemon: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerClient]:
    """A client, and nothing of these tests left in the daemon; images.json goes elsewhere, MinIO is any program."""
    monkeypatch.setattr(build, "OUTPUT", tmp_path / "images")
    monkeypatch.setenv("MINIO_BIN", str(shutil.which("true")))
    monkeypatch.delenv("TORCH_IMAGE", raising=False)
    with contextlib.closing(docker_daemon.client()) as found:
        yield found
        for image in found.images.list():
            for name in [*image.tags, *(image.attrs["RepoDigests"] or [])]:
                if name.startswith((PREFIX, "127.0.0.1:")):
                    with contextlib.suppress(ImageNotFound, APIError):
                        found.images.remove(name, force=True)


def listed(tmp_path: Path) -> dict[str, str]:
    base: dict[str, str] = json.loads((tmp_path / "images" / "images.json").read_text())["minio"]["base"]
    return base


def test_a_base_of_a_registry_is_used_by_its_digest(
    docker_daemon: Docker, client: DockerClient, registry: Registry, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is pulled, built on by digest, and named in labels and images.json: those of the base itself do not count."""
    name = f"{registry.host}/bases/least:1"
    of_its_own = ["LABEL org.opencontainers.image.base.name=else", "LABEL org.opencontainers.image.base.digest=else"]
    client.api.import_image_from_data(least(), name.rpartition(":")[0], "1", changes=of_its_own)
    pushed = client.api.push(name.rpartition(":")[0], "1", stream=True, decode=True)
    (digest,) = [line["aux"]["Digest"] for line in pushed if "aux" in line]
    client.images.remove(name)

    make(docker_daemon, client, ["minio"], PREFIX, "t", name)

    pinned = f"{registry.host}/bases/least@{digest}"
    output = capfd.readouterr().out
    assert f"base: {pinned}" in output
    below, built = (client.images.get(each).attrs["RootFS"]["Layers"] for each in (pinned, NAME))
    assert built[: len(below)] == below
    labels = client.images.get(NAME).labels
    assert labels["org.opencontainers.image.base.name"] == name
    assert labels["org.opencontainers.image.base.digest"] == digest
    assert listed(tmp_path) == {"name": name, "digest": digest}


def test_a_tag_that_moves_moves_no_image(
    docker_daemon: Docker, client: DockerClient, registry: Registry, tmp_path: Path
) -> None:
    """A base that is given by digest is that one, whatever its tag has become since."""
    place = f"{registry.host}/bases/moving"
    digests = []
    for which in ("first", "second"):
        client.api.import_image_from_data(least(), place, "1", changes=[f"ENV WHICH={which}"])
        pushed = client.api.push(place, "1", stream=True, decode=True)
        digests += [line["aux"]["Digest"] for line in pushed if "aux" in line]
    client.images.remove(f"{place}:1")
    assert digests[0] != digests[1]

    make(docker_daemon, client, ["minio"], PREFIX, "t", f"{place}@{digests[0]}")

    assert listed(tmp_path) == {"name": place, "digest": digests[0]}
    assert client.images.get(f"{PREFIX}/base:t").attrs["Config"]["Env"] == ["WHICH=first"]


def test_a_base_of_no_registry_is_said_to_be_one(
    docker_daemon: Docker, client: DockerClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An image that was made here has no digest: the output says so, and labels and images.json claim none."""
    client.api.import_image_from_data(least(), f"{PREFIX}/made", "1")
    make(docker_daemon, client, ["minio"], PREFIX, "t", f"{PREFIX}/made:1")
    assert f"base: {PREFIX}/made:1, without a digest: it comes from no registry" in capfd.readouterr().out
    assert client.images.get(NAME).labels["org.opencontainers.image.base.digest"] == ""
    assert listed(tmp_path) == {"name": f"{PREFIX}/made:1", "digest": ""}


def test_a_base_that_nobody_has_is_refused_before_a_build(
    docker_daemon: Docker, client: DockerClient, registry: Registry
) -> None:
    """With its name and what to correct."""
    with pytest.raises(Unavailable, match=f"no image {registry.host}/bases/none:1 here.*BASE"):
        make(docker_daemon, client, ["minio"], PREFIX, "t", f"{registry.host}/bases/none:1")
    with pytest.raises(ImageNotFound):
        client.images.get(NAME)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("python", "python"),
        ("python:3.11-slim", "python"),
        ("registry.example.com:5000/ml/python", "registry.example.com:5000/ml/python"),
        ("registry.example.com:5000/ml/python:3.11", "registry.example.com:5000/ml/python"),
        ("registry.example.com/python:3.11@sha256:ab", "registry.example.com/python"),
    ],
)
def test_a_repository_is_the_name_without_tag_and_digest(name: str, plain: str) -> None:
    """A registry's port is not a tag."""
    assert repository(name) == plain
    assert Base(name, "sha256:cd").reference == f"{plain}@sha256:cd"


def test_a_torch_layer_that_is_given_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCH_IMAGE stays as it is, also where all images are wanted; without it the layer is built below its users."""
    monkeypatch.delenv("TORCH_IMAGE", raising=False)
    assert wanted(["serve"]) == ["torch", "serve"]
    monkeypatch.setenv("TORCH_IMAGE", "registry.example.com/torch@sha256:ab")
    assert "torch" not in wanted(build.NAMES)

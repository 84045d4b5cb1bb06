"""A whole release with a real docker daemon, registry and cosign: what is pushed, signed and written."""

import contextlib
import io
import json
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from docker import DockerClient
from docker.errors import APIError, ImageNotFound

from images import publish, sbom
from images.build import OCI, revision
from images.publish import Signer, missing, push, release, verify
from tests.images.conftest import Images
from tests.registry import Registry
from tools.docker import Docker
from tools.golang import Unavailable
from tools.minio import free_port

pytestmark = pytest.mark.timeout(600)

TAG = "test"


@pytest.fixture
def prefix(registry: Registry) -> str:
    return f"{registry.host}/{uuid.uuid4().hex}"


@pytest.fixture
def client(docker_daemon: Docker, prefix: str) -> Iterator[DockerClient]:
    """A client, and nothing of the test left in the daemon."""
    with contextlib.closing(docker_daemon.client()) as found:
        yield found
        for image in found.images.list():
            for name in [*image.tags, *(image.attrs["RepoDigests"] or [])]:
                if name.startswith(prefix):
                    with contextlib.suppress(ImageNotFound, APIError):
                        found.images.remove(name, force=True)


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the release is written, instead of build/images of this checkout."""
    monkeypatch.setattr(publish, "OUTPUT", tmp_path)
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    return tmp_path


def built(client: DockerClient, repository: str, commit: str) -> None:
    """An image of one file that says it was built from that commit."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("file"), io.BytesIO())
    client.api.import_image_from_data(packed.getvalue(), repository, TAG, changes=[f"LABEL {OCI}revision={commit}"])


def check(registry: Registry, signer: Signer, output: Path, prefix: str, name: str) -> None:
    """What was written names what is in the registry, and that verifies."""
    about = json.loads((output / "release.json").read_text())
    digest = registry.ask("HEAD", f"{prefix.partition('/')[2]}/{name}/manifests/{TAG}")["Docker-Content-Digest"]
    assert about["revision"] == revision()
    assert about["images"][name]["reference"] == f"{prefix}/{name}@{digest}"
    written = yaml.safe_load((output / "values.yaml").read_text())
    assert written["images"] == {
        name: {"registry": registry.host, "repository": f"{prefix.partition('/')[2]}/{name}", "digest": digest}
    }
    assert written["imagePolicy"] == {
        "images": [name],
        "transparencyLog": False,
        "publicKey": signer.public_key(),
    }
    origin = {"slsaprovenance1": output / f"{name}.provenance.json"}
    verify(signer, f"{prefix}/{name}@{digest}", origin)


@pytest.mark.slow
def test_a_release_names_what_is_in_the_registry(
    docker_daemon: Docker,
    client: DockerClient,
    registry: Registry,
    prefix: str,
    key: Callable[[str], Path],
    predicates: dict[str, Path],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """release.json and values.yaml have the digest that the registry answers, and all of it verifies. The bill of
    materials is a small one here: a real one needs a real image, below."""
    monkeypatch.setattr(sbom, "write", lambda *_: predicates["cyclonedx"])
    built(client, f"{prefix}/pipeline", revision())
    signer = Signer(str(key("ours")), log=False)
    release(docker_daemon, client, signer, ["pipeline"], prefix=prefix, tag=TAG, builder="")
    check(registry, signer, output, prefix, "pipeline")


@pytest.mark.cluster
def test_a_built_image_is_released(
    docker_daemon: Docker,
    images: Images,
    client: DockerClient,
    registry: Registry,
    prefix: str,
    key: Callable[[str], Path],
    output: Path,
) -> None:
    """What `make images` built, with its real bill of materials."""
    for name in ("pipeline", "base"):
        images.image(name).tag(f"{prefix}/{name}", TAG)
    signer = Signer(str(key("ours")), log=False)
    release(docker_daemon, client, signer, ["pipeline"], prefix=prefix, tag=TAG, builder="")
    check(registry, signer, output, prefix, "pipeline")


@pytest.mark.slow
def test_only_images_of_this_commit_are_released(client: DockerClient, prefix: str) -> None:
    """One that is not there, or was built from another commit or a tree with changes, is named with its remedy."""
    (reported,) = missing(client, ["serve"], prefix, TAG)
    assert (
        reported
        == f"there is no image {prefix}/serve:{TAG}: `make images IMAGES=serve PREFIX={prefix} TAG={TAG}` builds it"
    )
    for commit in ("0" * 40, f"{revision()}-dirty"):
        built(client, f"{prefix}/serve", commit)
        (reported,) = missing(client, ["serve"], prefix, TAG)
        assert f"{prefix}/serve:{TAG} was built from {commit}, and this is {revision()}" in reported
    built(client, f"{prefix}/serve", revision())
    built(client, f"{prefix}/minio", "its-own")
    assert not missing(client, ["serve", "minio"], prefix, TAG)


@pytest.mark.slow
def test_a_push_that_fails_is_reported(client: DockerClient) -> None:
    """With the image and the registry's own words, before anything is signed."""
    nobody = f"127.0.0.1:{free_port()}/ours/pipeline"
    built(client, nobody, revision())
    try:
        with pytest.raises(Unavailable, match=f"{nobody}:{TAG} was not pushed"):
            push(client, nobody, TAG)
    finally:
        client.images.remove(f"{nobody}:{TAG}", force=True)

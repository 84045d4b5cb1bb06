"""The proof that deploy asks for: a real server, a steered image, checked."""

import hashlib
import io
import shutil
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentac.backbones import load_backbone
from latentac.config.extensions import ALLOWED
from latentac.config.sections import Extension
from latentac.critic import Critic
from latentac.serving.deployment import serve_and_check
from latentac.serving.generator import Generator, png
from latentac.serving.server import bind
from latentac.system.errors import ResourceError, ServingError
from tests.latentac.serving.conftest import changed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

READY_SECONDS = 240.0
REQUEST = {"prompt": "two red squares", "seed": 11}


def test_a_good_folder_is_served_and_checked(exported_folder: Path, generator: Generator) -> None:
    """What it returns is what the generator draws; the port is free again afterwards."""
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    deployment = serve_and_check(exported_folder, REQUEST, READY_SECONDS, port)
    print(f"ready after {deployment.ready_seconds:.1f} s, all checks after {deployment.seconds:.1f} s")
    images = generator.generate("two red squares", 11)
    assert deployment.image == png(images.images[0])
    assert deployment.image_sha256 == hashlib.sha256(deployment.image).hexdigest()
    assert Image.open(io.BytesIO(deployment.image)).size == (32, 32)
    assert deployment.values["shapes_verifier"] == pytest.approx(images.values[0, :, 0].tolist())
    assert (deployment.version, deployment.nfe, deployment.request) == ("some-version", 30, REQUEST)
    assert deployment.endpoint == f"http://127.0.0.1:{port}/v1/models/latentac:predict"
    bind("127.0.0.1", port).close()


def test_a_critic_that_steers_nothing_is_found_out(exported_folder: Path, tmp_path: Path) -> None:
    """Untrained heads are zero, so the steered image is the plain one."""
    folder = tmp_path / "exported"
    shutil.copytree(exported_folder, folder)
    critic = Critic.load(folder / "critic", load_backbone(Extension(use="unet"), folder, torch.device("cpu")))
    torch.nn.init.zeros_(critic.heads.weight)
    critic.save(folder / "critic")
    with pytest.raises(ServingError, match="the steered image is the unsteered one"):
        serve_and_check(folder, REQUEST, READY_SECONDS)


def test_a_server_that_ends_early_is_reported_with_its_last_words(exported_folder: Path, tmp_path: Path) -> None:
    """At once, not after the time-out."""
    folder = tmp_path / "exported"
    shutil.copytree(exported_folder, folder)
    (folder / "critic" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ServingError, match=r"ended before it was ready; it ended with exit code 8.*cannot be loaded"):
        serve_and_check(folder, REQUEST, ready_seconds=1e6)


def test_a_server_that_is_never_ready_is_stopped(exported_folder: Path) -> None:
    """The time-out is told, and no process is left."""
    with pytest.raises(ServingError, match=r"was not ready within 0\.2 s"):
        serve_and_check(exported_folder, REQUEST, ready_seconds=0.2)


def test_what_can_be_checked_without_a_server_is(exported_folder: Path, tmp_path: Path) -> None:
    """No exported folder, and a port that somebody has."""
    with pytest.raises(ServingError, match=r"is not an exported model"):
        serve_and_check(tmp_path, REQUEST, READY_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ResourceError, match="the port is in use"):
        serve_and_check(exported_folder, REQUEST, READY_SECONDS, taken.getsockname()[1])


def test_a_class_of_ones_own_is_served_where_somebody_allows_it(
    exported_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator by the environment, or the run that deploys its own model: both together, and neither for the
    other."""
    kernel, backbone = "latentac.sampling.kernels:DDIM", "latentac.backbones.unet:UNetBackbone"
    folder = changed(exported_folder, tmp_path / "own", kernel={"use": kernel}, backbone={"use": backbone})
    monkeypatch.setenv(ALLOWED, backbone)
    with pytest.raises(ServingError, match=rf"exit code 8.*names a kernel that is not built in.*{kernel}"):
        serve_and_check(folder, REQUEST, READY_SECONDS)
    assert serve_and_check(folder, REQUEST, READY_SECONDS, allowed=[kernel]).version == "some-version"

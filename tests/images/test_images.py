"""Each image does its work as the least of users: a number without rights, on a root that cannot be written."""

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from docker.models.containers import Container

from tests.images.conftest import INIT, Images
from tools.minio import Server, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NAMES = ("train", "serve", "pipeline", "minio")
LATENTAC = NAMES[:3]
WAIT_SECONDS = 240.0
# The imports that a container pays for at its start, by image.
IMPORTS = {
    "train": "torch.distributed.run, latentac.runs.workers.worker, diffusers, peft, "
    "transformers.models.clip.modeling_clip",
    "serve": "latentac.serving.generator, latentac.serving.server, kserve.model_server",
    "pipeline": "kfp.dsl.executor_main, torchx.schedulers.kubernetes_scheduler, kubernetes, minio, kfp.kubernetes",
}
LEAST = """
id -u; cat /proc/1/comm; grep CapEff /proc/self/status | cut -f 2; grep NoNewPrivs /proc/self/status | cut -f 2
touch /anything /opt/anything /etc/anything 2>/dev/null && echo "the root can be written"
touch /tmp/anything && echo written
"""
UNCOMPILED = """
import importlib.util, os, sys
import {modules}
for name, module in sorted(sys.modules.items()):
    source = getattr(module, "__file__", None) or ""
    if source.startswith("/opt/latentac/") and source.endswith(".py"):
        compiled = importlib.util.cache_from_source(source)
        fresh = os.path.exists(compiled) and int.from_bytes(open(compiled, "rb").read(16)[8:12], "little")
        if not fresh or fresh != int(os.stat(source).st_mtime) & 0xFFFFFFFF:
            print("uncompiled", name)
"""
COMPONENT = """
from kfp import dsl
from kfp.dsl import *

def greet(name: str) -> str:
    from latentac import __version__
    return f"{name} {__version__}"
"""


def wait_for(container: Container, address: str, check: Callable[[bytes], bool]) -> bytes:
    """The body of the first answer that passes the check. Fails with the container's log when it ends, or with the
    last answer after WAIT_SECONDS."""
    deadline, last = time.monotonic() + WAIT_SECONDS, "nothing"
    while time.monotonic() < deadline:
        container.reload()
        assert container.status in ("created", "running"), container.logs().decode()
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                body = answer.read()
                if check(body):
                    return bytes(body)
                last = body[:200]
        except OSError as error:
            last = str(error)
        time.sleep(0.3)
    raise AssertionError(f"{address}: {last}")


@pytest.mark.parametrize("name", NAMES)
def test_an_image_says_what_it_is_and_who_runs_it(images: Images, name: str) -> None:
    """A user by number, so that a cluster can check that it is not root; an init; the labels of the OCI."""
    about = images.image(name).attrs["Config"]
    assert about["User"] == "65532:65532"
    assert about["Entrypoint"][:2] == INIT
    prefix = "org.opencontainers.image."
    labels = {key.removeprefix(prefix): text for key, text in about["Labels"].items() if key.startswith(prefix)}
    assert labels["title"] == f"latentac {name}"
    assert {"description", "version", "revision", "source", "licenses"} <= labels.keys()
    assert all(labels.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_container_needs_no_rights(images: Images, name: str) -> None:
    """No capability, no way to gain one, nothing writable but /tmp and the volume, and an init as first process."""
    code, output = images.run(name, "sh", "-c", LEAST, entrypoint=INIT)
    assert (code, output.split()) == (0, ["65532", "tini", "0" * 16, "1", "written"])


@pytest.mark.parametrize("name", LATENTAC)
def test_a_container_runs_under_any_number(images: Images, name: str) -> None:
    """As OpenShift starts it: a user that no file of the image knows, in the root group."""
    code, output = images.run(name, "latentac", "--version", entrypoint=INIT, user="1000770000:0")
    assert code == 0, output


@pytest.mark.parametrize("name", LATENTAC)
def test_a_start_compiles_nothing(images: Images, name: str) -> None:
    """Everything that a start imports has its bytecode in the image: on a read-only root no start could keep it."""
    code, output = images.run(name, "python3", "-c", UNCOMPILED.format(modules=IMPORTS[name]), entrypoint=INIT)
    assert code == 0, output
    assert "uncompiled" not in output, output


@pytest.mark.parametrize("name", LATENTAC)
def test_kfp_runs_a_component(images: Images, name: str, tmp_path: Path) -> None:
    """KFP's own executor calls a component's function in the image and writes what it returned."""
    (tmp_path / "component.py").write_text(COMPONENT)
    tmp_path.chmod(0o777)
    given = {
        "inputs": {"parameterValues": {"name": "hello"}},
        "outputs": {"parameters": {"Output": {"outputFile": "/out/Output"}}, "outputFile": "/out/all.json"},
    }
    command = ["python3", "-m", "kfp.dsl.executor_main", "--component_module_path", "/out/component.py"]
    command += ["--function_to_execute", "greet", "--executor_input", json.dumps(given)]
    volumes = {str(tmp_path): {"bind": "/out", "mode": "rw"}}
    runtime = {"_KFP_RUNTIME": "true"}
    code, output = images.run(name, *command, entrypoint=INIT, volumes=volumes, environment=runtime)
    assert code == 0, output
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["parameterValues"]["Output"].startswith("hello 0.")


def test_the_pipeline_image_has_no_torch(images: Images) -> None:
    """And all that the steps import there works without it: launching, deciding, releasing, reporting."""
    probe = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ('torch', 'diffusers', 'transformers'))))"
    code, output = images.run("pipeline", "python3", "-c", probe)
    assert code == 0, output
    modules = (
        "latentac.runs.steps, latentac.runs.release.gate, latentac.runs.release.deploy, "
        "latentac.runs.reporting.report, latentac.runs.reporting.charts, torchx.runner"
    )
    rewards = "from latentac.rewards import REWARDS; "
    rewards += (
        "[REWARDS.build(name) for name in REWARDS if name not in ('aesthetic', 'remote', 'hpsv2', 'image_reward')]"
    )
    code, output = images.run("pipeline", "python3", "-c", f"import {modules}; {rewards}")
    assert code == 0, output


def test_the_torch_layer_is_shared(images: Images) -> None:
    """train and serve begin with the very layers of torch, and add little: a node pulls the 5 GB once."""
    torch = images.image("torch")
    below = torch.attrs["RootFS"]["Layers"]
    for name in ("train", "serve"):
        image = images.image(name)
        assert image.attrs["RootFS"]["Layers"][: len(below)] == below
        assert image.attrs["Size"] - torch.attrs["Size"] < 400e6


@pytest.mark.parametrize("name", NAMES)
def test_an_image_says_nothing_of_where_it_was_built(images: Images, name: str) -> None:
    """No mirror's address and no setting of the builder is in its history or its environment."""
    image = images.image(name)
    reported = json.dumps([image.history(), image.attrs["Config"]])
    for setting in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_EXTRA_INDEX_URL"):
        assert setting not in reported
        assert not os.environ.get(setting) or os.environ[setting] not in reported


def test_train_prepares_a_run(images: Images, minio_server: Server) -> None:
    """The first step of a run, from the image, against a real store; the commit is that of the image. The pipeline
    image then reads that run without torch, and says what is missing."""
    store = f"s3://{minio_server.bucket}/images"
    place = ("--run", "smoke", "--store", store, "--output", "/work")
    environment = minio_server.environment
    command = ("latentac", "prepare", *place, "--recipe", "shapes-unet-smoke")
    code, output = images.run("train", *command, environment=environment)
    assert code == 0, output
    stored = minio_server.client().get_object(minio_server.bucket, "images/smoke/prepare/manifest.json")
    commit = images.image("train").labels["org.opencontainers.image.revision"]
    assert json.loads(stored.data)["commit"] == commit
    code, output = images.run("pipeline", "latentac", "gate", *place, environment=environment)
    assert (code, "smoke/evaluate" in output) == (3, True), output
    assert minio_server.secret_key not in output


def test_serve_paints(images: Images, exported_folder: Path) -> None:
    """The server's arguments follow the image's name; a model that is mounted read-only answers with an image, and
    SIGTERM ends it in good order."""
    subprocess.run(["chmod", "-R", "a+rX", str(exported_folder)], check=True)
    port = free_port()
    volumes = {str(exported_folder): {"bind": "/mnt/models", "mode": "ro"}}
    options = ("--model", "/mnt/models", "--port", str(port), "--name", "painter")
    with images.started("serve", *options, volumes=volumes) as container:
        wait_for(container, f"http://127.0.0.1:{port}/v2/models/painter/ready", bool)
        body = json.dumps({"instances": [{"prompt": "a red circle", "seed": 3, "num_steps": 2}]}).encode()
        address = f"http://127.0.0.1:{port}/v1/models/painter:predict"
        kind = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address, body, kind), timeout=120) as answer:
            painted: dict[str, Any] = json.load(answer)["predictions"][0]
        assert painted["images"]
        container.stop(timeout=60)
        assert container.wait()["StatusCode"] == 0


def test_minio_keeps_and_tensorboard_reads(images: Images, tmp_path: Path) -> None:
    """The MinIO image answers its probe on a volume of its own, and the pipeline image's TensorBoard shows a curve that
    the mirror fetched from its bucket."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "curves")) as writer:
        writer.add_scalar("reward", 0.5, 1)
    server = Server(tmp_path / "unused")  # its names and credentials; the container is the server
    secret = {"MINIO_ROOT_USER": server.access_key, "MINIO_ROOT_PASSWORD": server.secret_key}
    volume = images.client.volumes.create()
    command = ("server", "/data", "--quiet", f"--address=127.0.0.1:{server.port}", "--certs-dir=/tmp/certs")
    options: dict[str, Any] = {"environment": secret, "volumes": {volume.name: {"bind": "/data", "mode": "rw"}}}
    port = free_port()
    mirror = f"latentac.store.mirror --store s3://{server.bucket} --prefix tensorboard --to /tmp/logs"
    board = f"tensorboard --logdir /tmp/logs --host=127.0.0.1 --port={port} --reload_interval=1"
    both = ("sh", "-c", f"python3 -m {mirror} --every-seconds 1 & exec {board}")
    try:
        with images.started("minio", *command, **options) as container:
            wait_for(container, f"{server.endpoint}/minio/health/ready", lambda _: True)
            client = server.client()
            client.make_bucket(server.bucket)
            (events,) = (tmp_path / "curves").iterdir()
            client.fput_object(server.bucket, f"tensorboard/some-run/{events.name}", str(events))
            with images.started("pipeline", *both, environment=server.environment) as shown:
                tags = wait_for(
                    shown, f"http://127.0.0.1:{port}/data/plugin/scalars/tags", lambda body: b"reward" in body
                )
                assert list(json.loads(tags)) == ["some-run"]
    finally:
        volume.remove(force=True)

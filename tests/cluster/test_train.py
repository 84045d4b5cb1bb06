"""Training in real pods: they find each other, lose one, go on, and the step follows them to the end.

Volcano's controller is not on the node; `tests/cluster/volcano.py` does with the submitted job what it would do.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from latentac.components.cluster.api import PODS, VOLCANO_JOBS, Api
from latentac.components.cluster.settings import Cluster, resolve
from latentac.components.train.job import job_name
from latentac.components.train.volcano import Volcano, abort
from latentac.runs import steps
from latentac.runs.workspace import Workspace, open_run
from latentac.system.errors import TrainingError
from tests.cluster.node import Node
from tests.cluster.volcano import Controller
from tools.docker import Docker
from tools.minio import Server

IMAGE = "latentac/train:dev"
ITERATIONS = 10

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@dataclass
class Site:
    """A namespace with everything that the chart gives to training, and a store that pods and machine reach."""

    api: Api
    settings: Cluster
    store: str
    output: Path

    def prepare(self, run: str) -> Workspace:
        """The steps before training, on this machine."""
        overrides = [f"train.num_iterations={ITERATIONS}", "backbone.device=cpu"]
        steps.prepare(run, self.store, str(self.output), "shapes-unet-smoke", overrides=overrides)
        steps.pretrain_value(run, self.store, str(self.output))
        return open_run(run, self.store, str(self.output))

    def pods(self) -> dict[str, dict[str, Any]]:
        return {pod["metadata"]["name"]: pod for pod in self.api.find(PODS, labels="app.kubernetes.io/component=train")}

    def phase(self, space: Workspace) -> str:
        job = self.api.get(VOLCANO_JOBS, job_name(self.api.namespace, space.run, space.config.hash)) or {}
        return str(job.get("status", {}).get("state", {}).get("phase", ""))


@pytest.fixture
def site(
    node: Node,
    crds: list[Path],
    docker_daemon: Docker,
    tmp_path: Path,
    minio_binary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Site]:
    node.load([IMAGE], docker_daemon)
    namespace = node.namespace("train", restricted=True)
    server = Server(tmp_path / "minio", address=node.ip).start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    secret = {name: value for name, value in server.environment.items() if name.startswith("AWS_")}
    objects = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "train"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": secret},
    ]
    listing = {"apiVersion": "v1", "kind": "List", "items": objects}
    node.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(listing))
    settings = resolve(
        {
            "release": "latentac",
            "namespace": namespace,
            "images": {"pipeline": "unused", "train": IMAGE, "serve": "unused"},
            "store": {"url": f"s3://{server.bucket}/store", "endpoint": server.endpoint, "secret": "s3"},
            "steps": {"namespace": namespace, "service_account": "train"},
            "train": {
                "service_account": "train",
                "max_replicas": 2,
                "resources": {"requests": {"cpu": "300m", "memory": "512Mi"}, "limits": {"memory": "3Gi"}},
                "pending_seconds": 120.0,
                "grace_seconds": 30,
            },
            "deploy": {"runtime": "unused", "service_account": "unused"},
        },
        "cluster.yaml",
    )
    configuration = client.Configuration()
    config.load_kube_config(str(node.kubeconfig), client_configuration=configuration)
    api = Api(configuration, namespace)
    with Controller(api):
        yield Site(api, settings, settings.store.url, tmp_path / "work")
        node.kubectl("delete", "-n", namespace, "jobs.batch.volcano.sh", "--all")
    node.delete_namespace(namespace)
    server.stop()


class Training(threading.Thread):
    """The train step at work, as it is on a cluster."""

    def __init__(self, site: Site, space: Workspace) -> None:
        super().__init__(daemon=True)
        self.volcano, self.space = Volcano(site.settings, site.api, poll_seconds=0.5), space
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.volcano(self.space)
        except Exception as error:  # noqa: BLE001 - the test asks for it
            self.error = error

    def until(self, look: Callable[[], Any], seconds: float = 300.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := look()):
            assert self.is_alive(), f"it ended: {self.error}"
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.2)
        return found


def checkpoints(space: Workspace) -> list[int]:
    return [int(key.rpartition("/")[2]) for key in space.store.keys(f"checkpoints/{space.run}")]


def test_two_pods_train_lose_one_and_finish(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The workers meet by DNS over gloo; a deleted pod comes back; the artifact is whole."""
    caplog.set_level(logging.INFO, "latentac")
    space = site.prepare("first")
    training = Training(site, space)
    training.until(lambda: max(checkpoints(space), default=0) >= 2)
    name = job_name(site.api.namespace, space.run, space.config.hash)
    second = f"{name}-worker-1-0"
    lost = site.pods()[second]["metadata"]["uid"]
    site.api.delete(PODS, second)
    began = time.monotonic()
    training.until(lambda: site.pods().get(second, {"metadata": {"uid": lost}})["metadata"]["uid"] != lost)
    at = max(checkpoints(space))
    training.until(lambda: max(checkpoints(space)) > at)
    seconds = time.monotonic() - began
    training.join(400)

    assert training.error is None, training.error
    assert not training.is_alive()
    assert seconds < 180, "the next iteration after the loss"
    assert site.phase(space) == "Completed"
    done = space.finished("train")
    assert done is not None
    history = json.loads((space.artifact("train") / "history.json").read_text())
    assert [entry["iteration"] for entry in history] == list(range(1, ITERATIONS + 1))
    assert done.metrics["max_world_size"] == 2
    names = {file.name for file in (space.folder / "train").iterdir()}
    assert names == {"policy", "critic", "history.json"}
    shown = [record.getMessage() for record in caplog.records if record.name == "latentac.train"]
    assert [line for line in shown if re.match(r"train  \d+/10 ", line)], shown
    assert not [line for line in shown if os.environ["AWS_SECRET_ACCESS_KEY"] in line]


def test_cancelled_run_leaves_a_checkpoint_and_no_pods(site: Site) -> None:
    """Aborted between two checkpoints, the workers write one more before they end; a resumed run goes on from there."""
    space = site.prepare("second")
    training = Training(site, space)
    training.until(lambda: max(checkpoints(space), default=0) >= 1)
    abort(site.settings, "second", site.api)
    training.join(60)

    assert isinstance(training.error, TrainingError)
    assert site.phase(space) == "Aborted"
    deadline = time.monotonic() + 60
    while any(pod["status"]["phase"] in ("Running", "Pending") for pod in site.pods().values()):
        assert time.monotonic() < deadline, "its pods live on"
        time.sleep(0.5)
    reached = max(checkpoints(space))
    again = Training(site, space)
    again.join(400)
    assert again.error is None, again.error
    history = json.loads((space.artifact("train") / "history.json").read_text())
    assert len(history) == ITERATIONS
    assert reached < ITERATIONS

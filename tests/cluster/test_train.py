"""Training in real pods under the real Volcano: they find each other, lose some, go on, and the step follows them."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from latentac.components.cluster.api import PODS, VOLCANO_JOBS, Api
from latentac.components.cluster.settings import Cluster, resolve
from latentac.components.train.job import ATTEMPT, job_name
from latentac.components.train.volcano import Volcano, abort
from latentac.runs import failures, steps
from latentac.runs.workspace import Workspace, open_run
from latentac.system.errors import LeaseExpired, TrainingError
from tests.cluster.node import Node
from tools.docker import Docker
from tools.minio import Server

IMAGE = "latentac/train:dev"
ITERATIONS = 10
LEASE = 60

STEP = """\
import json, sys
from latentac.components.cluster.api import connect
from latentac.components.cluster.settings import resolve
from latentac.components.train.volcano import Volcano
from latentac.runs.workspace import open_run
settings = resolve(json.loads(sys.argv[1]), "cluster.yaml")
Volcano(settings, connect(settings.namespace), poll_seconds=0.5)(open_run(*sys.argv[2:]))
"""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@dataclass
class Site:
    """A namespace with everything that the chart gives to training, and a store that pods and machine reach."""

    api: Api
    settings: Cluster
    store: str
    output: Path

    def prepare(self, run: str, iterations: int = ITERATIONS) -> Workspace:
        """The steps before training, on this machine."""
        overrides = [f"train.num_iterations={iterations}", "backbone.device=cpu"]
        steps.prepare(run, self.store, str(self.output), "shapes-unet-smoke", overrides=overrides)
        steps.pretrain_value(run, self.store, str(self.output))
        return open_run(run, self.store, str(self.output))

    def pods(self) -> dict[str, dict[str, Any]]:
        return {pod["metadata"]["name"]: pod for pod in self.api.find(PODS, labels="app.kubernetes.io/component=train")}

    def active_pods(self) -> list[str]:
        """Names of those that run, or will."""
        return [name for name, pod in self.pods().items() if pod["status"]["phase"] in ("Running", "Pending")]

    def has(self, pod: str) -> bool:
        return pod in self.pods()

    def lose(self, pod: str) -> Callable[[], bool]:
        """Delete a pod; what is returned says whether another one has taken its place."""
        uid = self.pods()[pod]["metadata"]["uid"]
        self.api.delete(PODS, pod)
        return lambda: self.pods().get(pod, {"metadata": {"uid": uid}})["metadata"]["uid"] != uid

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
                "lease_seconds": LEASE,
            },
            "deploy": {"runtime": "unused", "service_account": "unused"},
        },
        "cluster.yaml",
    )
    configuration = client.Configuration()
    config.load_kube_config(str(node.kubeconfig), client_configuration=configuration)
    api = Api(configuration, namespace)
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

    def iterates(self, beyond: int) -> None:
        """Returns when a later iteration than that has a checkpoint."""
        self.until(lambda: max(checkpoints(self.space), default=0) > beyond)


def within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
        time.sleep(0.5)


def checkpoints(space: Workspace) -> list[int]:
    return [int(key.rpartition("/")[2]) for key in space.store.keys(f"checkpoints/{space.run}")]


def test_two_pods_train_lose_one_and_finish(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The workers meet by DNS over gloo; a deleted pod comes back; the artifact is whole."""
    caplog.set_level(logging.INFO, "latentac")
    space = site.prepare("first")
    training = Training(site, space)
    training.until(lambda: max(checkpoints(space), default=0) >= 2)
    name = job_name(site.api.namespace, space.run, space.config.hash)
    began = time.monotonic()
    training.until(site.lose(f"{name}-worker-1-0"))
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
    assert [line for line in shown if re.match(r"training starts after iteration 0, with 2 worker", line)], shown
    assert not [line for line in shown if os.environ["AWS_SECRET_ACCESS_KEY"] in line]


@pytest.mark.timeout(1800)
def test_five_pods_are_lost_one_after_another(site: Site) -> None:
    """Each time another iteration is done, a pod is deleted: the second one (a new pod joins), or the first one, which
    holds the rendezvous (the job restarts). All iterations are done in the end, and each loss costs at most one."""
    iterations = ITERATIONS + 6
    space = site.prepare("losses", iterations)
    training = Training(site, space)
    name = job_name(site.api.namespace, space.run, space.config.hash)
    seconds, at = [], 0
    for victim in (1, 0, 1, 0, 1):
        training.iterates(beyond=at)
        pod = f"{name}-worker-{victim}-0"
        training.until(partial(site.has, pod))
        at, began = max(checkpoints(space)), time.monotonic()
        training.until(site.lose(pod))
        training.iterates(beyond=at)
        seconds.append(time.monotonic() - began)
        at = max(checkpoints(space))
    training.join(600)
    print(f"seconds to the next iteration: {', '.join(f'{each:.0f}' for each in seconds)}")

    assert training.error is None, training.error
    assert not training.is_alive()
    assert site.phase(space) == "Completed"
    history = json.loads((space.artifact("train") / "history.json").read_text())
    assert [entry["iteration"] for entry in history] == list(range(1, iterations + 1))


def test_cancelled_run_leaves_a_checkpoint_and_no_pods(site: Site) -> None:
    """Aborted between two checkpoints, the workers write one more before they end; a resumed run goes on from there."""
    space = site.prepare("second")
    training = Training(site, space)
    training.until(lambda: max(checkpoints(space), default=0) >= 1)
    abort(site.settings, "second", site.api)
    training.join(60)

    assert isinstance(training.error, TrainingError)
    assert site.phase(space) == "Aborted"
    within(60, lambda: not site.active_pods())
    reached = max(checkpoints(space))
    again = Training(site, space)
    again.join(400)
    assert again.error is None, again.error
    history = json.loads((space.artifact("train") / "history.json").read_text())
    assert len(history) == ITERATIONS
    assert reached < ITERATIONS


@pytest.mark.timeout(1800)
def test_a_job_whose_step_is_lost_ends_by_itself(site: Site, node: Node) -> None:
    """The launching step is killed and nothing aborts its job, as after a cancel whose exit handler cannot start.
    Within the lease, and what a last checkpoint and the next start need, nothing of the job runs any more."""
    space = site.prepare("orphan", 100 * ITERATIONS)
    command = [sys.executable, "-c", STEP, site.settings.model_dump_json(), space.run, site.store, str(site.output)]
    with subprocess.Popen(command, env={**os.environ, **node.environment}) as step:
        try:
            within(600, lambda: max(checkpoints(space), default=0) >= 1)
        finally:
            step.kill()
    began = time.monotonic()
    within(LEASE + 180, lambda: site.phase(space) in ("Completed", "Failed"))
    within(60, lambda: not site.active_pods())
    print(f"nothing runs any more after {time.monotonic() - began:.0f} s; the lease lasts {LEASE} s")
    job = site.api.get(VOLCANO_JOBS, job_name(site.api.namespace, space.run, space.config.hash))
    assert job is not None
    attempt = job["metadata"]["annotations"][ATTEMPT]
    assert isinstance(failures.read(space.store, space.run, attempt), LeaseExpired)
    assert max(checkpoints(space)) < 100 * ITERATIONS

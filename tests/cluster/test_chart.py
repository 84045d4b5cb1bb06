"""The chart on a real node: what `helm install` starts runs, does its work in a restricted namespace, and goes."""

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from latentac.store import open_store
from tests.cluster.control_plane import KubectlError
from tests.cluster.node import Node
from tests.cluster.releases import helm, objects_in, until
from tests.helm.chart import CHART, CI
from tools.docker import Docker
from tools.golang import Unavailable

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

IMAGES = ("pipeline", "train", "serve", "minio")
NEEDED = ("latentac/pipeline:dev", "latentac/minio:dev")


class Release(NamedTuple):
    node: Node
    namespace: str
    values: dict[str, Any]

    def get(self, *arguments: str) -> Any:
        """Objects of the namespace, decoded."""
        return json.loads(self.node.kubectl("get", "-n", self.namespace, *arguments, "-o", "json"))

    def address(self, service: str) -> str:
        """http://<ip>:<port> of a Service, which this machine reaches directly."""
        spec = self.get("service", service)["spec"]
        return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"

    def helm(self, verb: str, *arguments: str, values: dict[str, Any] | None = None) -> str:
        return helm(self.node, verb, "rel", *arguments, "-n", self.namespace, "--timeout=300s", values=values)


@pytest.fixture(scope="module")
def release(node: Node, crds: list[Path], docker_daemon: Docker) -> Iterator[Release]:
    """The evaluation values with the images built here, in a namespace that enforces `restricted`."""
    try:
        for image in NEEDED:
            docker_daemon.image(image)
    except Unavailable as reason:
        pytest.skip(str(reason))
    node.load(NEEDED, docker_daemon)
    local = {name: {"registry": "", "repository": f"latentac/{name}", "tag": "dev", "digest": ""} for name in IMAGES}
    values = yaml.safe_load(CI["evaluation"].read_text())
    values["images"] = local
    values["tensorboard"]["pollSeconds"] = 2
    installed = Release(node, node.namespace("chart", restricted=True), values)
    try:
        installed.helm("install", str(CHART), "--wait", values=values)
        yield installed
    except BaseException:
        print(described(installed))
        raise
    finally:
        node.delete_namespace(installed.namespace, wait=False)


def described(release: Release) -> str:
    """Why an installation does not come up: pods, events, logs."""
    label = "--selector=app.kubernetes.io/part-of=latentac"
    commands = (
        ("get", "pods", "-o", "wide"),
        ("get", "events", "--sort-by=.lastTimestamp"),
        ("logs", label, "--all-containers", "--prefix", "--tail=20"),
    )
    parts = []
    for command in commands:
        try:
            parts.append(release.node.kubectl(command[0], "-n", release.namespace, *command[1:]))
        except KubectlError as error:
            parts.append(str(error))
    return "\n".join(parts)


def store_of(release: Release, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store's URL, with this process's environment set to reach it."""
    data = release.get("secret", "rel-s3")["data"]
    for name, value in data.items():
        monkeypatch.setenv(name, base64.b64decode(value).decode())
    monkeypatch.setenv("LATENTAC_S3_ENDPOINT", release.address("rel-minio"))
    return "s3://latentac/store"


def test_installed_pods_are_ready(release: Release) -> None:
    """Store and TensorBoard run and are ready under `restricted`; the bootstrap Job has done its work and is gone."""
    pods = {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for pod in release.get("pods")["items"]}
    assert pods.keys() == {"store", "tensorboard"}
    for pod in pods.values():
        assert pod["status"]["phase"] == "Running"
        assert all(status["ready"] for status in pod["status"]["containerStatuses"])
        assert not any(status["restartCount"] for status in pod["status"]["containerStatuses"])
    assert release.get("jobs")["items"] == []
    assert release.get("servingruntime", "rel")["spec"]["containers"][0]["image"] == "latentac/serve:dev"


def test_the_bucket_is_there_and_usable(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket that the Job made takes and gives objects with the credentials of the chart's Secret."""
    open_store(store_of(release, monkeypatch)).probe()


def test_tensorboard_shows_what_is_in_the_store(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that training puts into the store appear in TensorBoard's answers, later ones too."""
    store = open_store(store_of(release, monkeypatch))
    writer = EventFileWriter(str(tmp_path))

    def write(step: int) -> None:
        summary = Summary(value=[Summary.Value(tag="train/reward_mean", simple_value=float(step))])
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
        writer.flush()
        store.write_files(tmp_path, "tensorboard/run-1")

    def steps() -> list[int]:
        query = "/data/plugin/scalars/scalars?run=run-1&tag=train%2Freward_mean"
        try:
            with urllib.request.urlopen(release.address("rel-tensorboard") + query, timeout=10) as answer:
                return [int(step) for _, step, _ in json.load(answer)]
        except urllib.error.HTTPError:  # 404 until it has read the run
            return []

    write(1)
    until(lambda: steps() == [1], "the first event")
    write(2)
    until(lambda: steps() == [1, 2], "the second event")
    writer.close()


def test_helm_test_passes(release: Release) -> None:
    """The chart's own tests: store, settings and TensorBoard, and their pods are gone afterwards."""
    said = release.helm("test")
    assert said.count("Succeeded") == 3
    until(lambda: "test" not in str([pod["metadata"]["name"] for pod in release.get("pods")["items"]]), "test pods")


def test_upgrade_and_rollback(release: Release) -> None:
    """An upgrade reaches pods and settings, a rollback takes both back, and the store's password stays what it was."""

    def state() -> tuple[str, list[str]]:
        settings = release.get("configmap", "rel-cluster")["data"]["cluster.yaml"]
        container = release.get("deployment", "rel-tensorboard")["spec"]["template"]["spec"]["containers"][0]
        return str(settings), list(container["args"])

    before, secret = state(), release.get("secret", "rel-s3")["data"]
    values = {**release.values, "tensorboard": {**release.values["tensorboard"], "pollSeconds": 3}}
    values["train"] = {**release.values["train"], "replicas": {"min": 1, "max": 2}}
    release.helm("upgrade", str(CHART), "--wait", values=values)
    after = state()
    assert "max_replicas: 2" in after[0]
    assert "--reload_interval=3" in after[1]
    release.helm("rollback", "1", "--wait")
    assert state() == before
    assert release.get("secret", "rel-s3")["data"] == secret
    until(lambda: urllib.request.urlopen(release.address("rel-tensorboard"), timeout=10).status == 200, "TensorBoard")


def test_a_store_that_refuses_fails_the_installation_with_its_reason(release: Release) -> None:
    """Wrong credentials: the bootstrap Job ends with the endpoint and the bucket in its log, and never the keys."""
    values = {
        **release.values,
        "minio": {"enabled": False},
        "tensorboard": {"enabled": False},
        "serving": {"enabled": False},
        "store": {
            "url": "s3://latentac/store",
            "endpoint": f"http://rel-minio.{release.namespace}.svc:9000",
            "accessKey": "nobody",
            "secretKey": "wrong-secret-word",
        },
    }
    options = ("-n", release.namespace, "--timeout=120s")
    with pytest.raises(AssertionError, match="refused-bootstrap"):
        helm(release.node, "install", "refused", str(CHART), *options, values=values)
    log = release.node.kubectl("logs", "-n", release.namespace, "job/refused-bootstrap", "--tail=20")
    assert f"rel-minio.{release.namespace}.svc:9000" in log
    assert "bucket latentac" in log
    assert "wrong-secret-word" not in log
    helm(release.node, "uninstall", "refused", "-n", release.namespace)
    release.node.kubectl("delete", "job", "refused-bootstrap", "-n", release.namespace, "--cascade=foreground")


def test_uninstall_leaves_nothing(release: Release) -> None:
    """Everything that came with the release, its upgrade and its tests is gone from the namespace."""
    release.helm("uninstall")
    until(lambda: not objects_in(release.node, release.namespace), "an empty namespace")

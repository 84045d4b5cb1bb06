"""The whole smoke pipeline on a real node: the chart installed, each step a pod as Kubeflow Pipelines would make it.

The pods come from the compiled pipeline: image, command and platform settings of each executor, under the chart's
service account, in a namespace that enforces `restricted`. What KFP itself does around them (its launcher, artifacts
of its own) is left out; Volcano and KServe are the real ones.
"""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from latentac.components.cluster.api import VOLCANO_JOBS
from latentac.components.cluster.objects import CONTAINER_SECURITY
from latentac.components.cluster.settings import KEY, Cluster, resolve
from latentac.pipelines.cluster import compile_pipeline
from latentac.serving.client import Client
from latentac.system.steps import NAMES as STEPS
from tests.cluster.kserve import administrator
from tests.cluster.node import Node
from tests.cluster.releases import helm
from tests.helm.chart import CHART, CI
from tools.docker import Docker

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

RUN = "whole"
IMAGES = ("pipeline", "train", "serve", "minio")
STEP_SECONDS = 420.0
WORK = {"output": "/work"}


@pytest.fixture
def settings(node: Node, crds: list[Path], docker_daemon: Docker) -> Iterator[Cluster]:
    """The chart's settings, as installed with the evaluation values and the images built here."""
    node.load([f"latentac/{name}:dev" for name in IMAGES], docker_daemon)
    namespace = node.namespace("steps", restricted=True)
    values = yaml.safe_load(CI["evaluation"].read_text())
    values["images"] = {
        name: {"registry": "", "repository": f"latentac/{name}", "tag": "dev", "digest": ""} for name in IMAGES
    }
    try:
        helm(node, "install", "latentac", str(CHART), "-n", namespace, "--wait", "--timeout=300s", values=values)
        found = json.loads(node.kubectl("get", "-n", namespace, "configmap", "latentac-cluster", "-o", "json"))
        yield resolve(yaml.safe_load(found["data"][KEY]), KEY)
    finally:
        node.delete_namespace(namespace, wait=False)


def test_each_step_does_its_work_as_a_pod(node: Node, settings: Cluster, tmp_path: Path) -> None:
    """From prepare to a deployed endpoint and the report: each step ends well, the training job completed, and the
    endpoint paints. No step needs more than the chart granted, and no secret is in what the pods say or are told."""
    compile_pipeline(settings, tmp_path / "pipeline.yaml")
    executors = Executors(tmp_path / "pipeline.yaml")
    said = ""
    for step in STEPS:
        pod = executors.pod(step, settings)
        node.kubectl("create", "-n", settings.namespace, "-f", "-", stdin=json.dumps(pod))
        phase, log = ended(node, settings.namespace, pod["metadata"]["name"])
        assert phase == "Succeeded", f"{step}: {phase}\n{log[-4000:]}"
        said += json.dumps(pod) + log

    api = administrator(node.kubeconfig, settings.namespace)
    (job,) = api.find(VOLCANO_JOBS)
    assert job["status"]["state"]["phase"] == "Completed"
    service = json.loads(node.kubectl("get", "-n", settings.namespace, "service", "latentac-predictor", "-o", "json"))
    answer = Client(f"http://{service['spec']['clusterIP']}", settings.deploy.name).predict({"prompt": "a red circle"})
    assert answer["version"].startswith(RUN)
    assert base64.b64decode(answer["images"][0]).startswith(b"\x89PNG")

    secret = json.loads(node.kubectl("get", "-n", settings.namespace, "secret", settings.store.secret, "-o", "json"))
    assert base64.b64decode(secret["data"]["AWS_SECRET_ACCESS_KEY"]).decode() not in said + json.dumps(job)


class Executors:
    """The compiled pipeline, read as the backend reads it."""

    def __init__(self, file: Path) -> None:
        spec, platform = yaml.safe_load_all(file.read_text())
        self._containers = spec["deploymentSpec"]["executors"]
        self._components = spec["components"]
        self._platform = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    def pod(self, step: str, settings: Cluster) -> dict[str, Any]:
        """The pod of `step`, without KFP's own containers."""
        executor = f"exec-{step}"
        container, platform = self._containers[executor]["container"], self._platform[executor]
        found = json.dumps(self._input(step, settings))
        arguments = [found if part == "{{$}}" else part for part in container["args"]]
        secrets = [
            {
                "name": entry["envVar"],
                "valueFrom": {"secretKeyRef": {"name": each["secretName"], "key": entry["secretKey"]}},
            }
            for each in platform["secretAsEnv"]
            for entry in each["keyToEnv"]
        ]
        volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
        mounts = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the pod's own
        for number, each in enumerate(platform["configMapAsVolume"]):
            volumes.append({"name": f"config-{number}", "configMap": {"name": each["configMapName"]}})
            mounts.append({"name": f"config-{number}", "mountPath": each["mountPath"]})
        for each in platform["emptyDirMounts"]:
            volume = {"medium": each.get("medium", ""), "sizeLimit": each["sizeLimit"]}
            volumes.append({"name": each["volumeName"], "emptyDir": volume})
            mounts.append({"name": each["volumeName"], "mountPath": each["mountPath"]})
        security = platform["securityContext"]
        resources = container.get("resources", {})
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"step-{step}", "labels": platform["podMetadata"]["labels"]},
            "spec": {
                "serviceAccountName": settings.steps.service_account,
                "restartPolicy": "Never",
                "securityContext": {
                    "runAsUser": int(security["runAsUser"]),
                    "runAsGroup": int(security["runAsGroup"]),
                    "fsGroup": int(security["runAsGroup"]),
                    "runAsNonRoot": security["runAsNonRoot"],
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "volumes": volumes,
                "containers": [
                    {
                        "name": "main",
                        "image": container["image"],
                        "imagePullPolicy": "Never",
                        "command": container["command"],
                        "args": arguments,
                        "env": [*container.get("env", []), *secrets],
                        "resources": {"limits": {"memory": resources["resourceMemoryLimit"]}} if resources else {},
                        "securityContext": CONTAINER_SECURITY,
                        "volumeMounts": mounts,
                    }
                ],
            },
        }

    def _input(self, step: str, settings: Cluster) -> dict[str, Any]:
        """What KFP's driver hands to the executor; a step's input artifacts are lineage, which no step reads."""
        component = self._components[f"comp-{step}"]
        parameters: dict[str, Any] = {"run": RUN, "store": settings.store.url, **WORK}
        if step == "prepare":
            parameters |= {"recipe": "shapes-unet-smoke", "config": "", "overrides": []}
        taken = component["inputDefinitions"].get("artifacts", {})
        made = component.get("outputDefinitions", {}).get("artifacts", {})
        returned = component.get("outputDefinitions", {}).get("parameters", {})
        return {
            "inputs": {
                "parameterValues": parameters,
                "artifacts": {name: {"artifacts": [_artifact(name, kind)]} for name, kind in taken.items()},
            },
            "outputs": {
                "outputFile": "/tmp/outputs/executor_output.json",  # noqa: S108 - in the pod
                "artifacts": {name: {"artifacts": [_artifact(name, kind)]} for name, kind in made.items()},
                "parameters": {name: {"outputFile": f"/tmp/outputs/{name}"} for name in returned},  # noqa: S108
            },
        }


def _artifact(name: str, kind: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "uri": f"/tmp/artifacts/{name}", "type": kind["artifactType"], "metadata": {}}  # noqa: S108


def ended(node: Node, namespace: str, name: str) -> tuple[str, str]:
    """Phase and log of a pod, when it has ended or the bound is reached."""
    deadline = time.monotonic() + STEP_SECONDS
    phase = ""
    while phase not in ("Succeeded", "Failed") and time.monotonic() < deadline:
        time.sleep(1)
        phase = node.kubectl("get", "-n", namespace, "pod", name, "-o", "jsonpath={.status.phase}")
    try:
        return phase, node.kubectl("logs", "-n", namespace, name)
    except RuntimeError as error:  # it never started
        return phase, f"{error}\n{node.kubectl('describe', 'pod', '-n', namespace, name)}"

"""The real controllers of the node: Volcano runs and repairs a gang of pods, KServe serves and refuses."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.control_plane import KubectlError
from tests.cluster.node import Node
from tests.cluster.test_node import PROBE, create, probe
from tools.binaries import program

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SECONDS = 90.0
LOST = ["PodFailed", "PodEvicted"]


@pytest.fixture
def namespace(node: Node) -> Iterator[str]:
    """A namespace that enforces `restricted`, on a node that has the image of these tests."""
    node.containerd.add(PROBE, program("probe"))
    name = node.namespace("controllers", restricted=True)
    yield name
    node.delete_namespace(name, wait=False)


def job(**spec: Any) -> dict[str, Any]:
    """Two tasks of one pod each, with the policies of a training job."""
    pod = probe("unused", "serve", ":8080", "hello", terminationGracePeriodSeconds=5)["spec"]
    pod["containers"][0]["resources"] = {"requests": {"cpu": "10m"}}  # pods without requests are not part of a gang
    tasks = [
        {"name": f"worker-{index}", "replicas": 1, "minAvailable": 1 - index, "template": {"spec": pod}}
        | {"policies": [{"events": LOST, "action": "RestartPod" if index else "RestartJob"}]}
        for index in (0, 1)
    ]
    found = {"schedulerName": "volcano", "queue": "default", "minAvailable": 1, "maxRetry": 5, "tasks": tasks, **spec}
    return {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "metadata": {"name": "gang"}, "spec": found}


def uids(node: Node, namespace: str) -> dict[str, str]:
    """Of the pods that run and are not about to end."""
    pods = json.loads(node.kubectl("get", "pods", "-n", namespace, "-o", "json"))["items"]
    alive = [each for each in pods if each["status"]["phase"] == "Running"]
    return {
        each["metadata"]["name"]: each["metadata"]["uid"]
        for each in alive
        if "deletionTimestamp" not in each["metadata"]
    }


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {SECONDS:.0f} s"
        time.sleep(0.5)


def test_volcano_replaces_a_pod_and_restarts_a_job(node: Node, namespace: str) -> None:
    """The loss of the second pod costs that pod; the loss of the first one, which holds the rendezvous, costs both."""
    create(node, namespace, job())
    until(lambda: len(uids(node, namespace)) == 2, "a start")
    before = uids(node, namespace)
    node.kubectl("delete", "pod", "gang-worker-1-0", "-n", namespace, "--wait=false")
    until(lambda: len({*uids(node, namespace).values()} - {*before.values()}) == 1, "a new pod")
    after = uids(node, namespace)
    assert after["gang-worker-0-0"] == before["gang-worker-0-0"]
    node.kubectl("delete", "pod", "gang-worker-0-0", "-n", namespace, "--wait=false")
    until(lambda: len({*uids(node, namespace).values()} - {*after.values()}) == 2, "a restart of the job")
    phase = ["get", "-n", namespace, "jobs.batch.volcano.sh", "gang", "-o", "jsonpath={.status.state.phase}"]
    until(lambda: node.kubectl(*phase) == "Running", "the phase Running")


def test_volcano_starts_a_gang_only_whole(node: Node, namespace: str) -> None:
    """A job of which one pod has no room starts none of them, and its pod group says so."""
    wanted = job(minAvailable=2)
    _, second = wanted["spec"]["tasks"]
    second["minAvailable"] = 1
    second["template"] = {"spec": {**second["template"]["spec"], "nodeSelector": {"nobody": "has-this"}}}
    create(node, namespace, wanted)
    reasons = "jsonpath={.items[*].status.conditions[*].reason}"
    groups = ["get", "-n", namespace, "podgroups.scheduling.volcano.sh", "-o", reasons]
    until(lambda: "NotEnoughResources" in node.kubectl(*groups), "a reason")
    assert uids(node, namespace) == {}


def test_volcano_refuses_a_job_of_an_unknown_queue(node: Node, namespace: str) -> None:
    with pytest.raises(KubectlError, match=r"admission webhook .*volcano.* denied.*nowhere"):
        create(node, namespace, job(queue="nowhere"))


def test_kserve_serves_what_a_runtime_names(node: Node, namespace: str) -> None:
    """A Deployment and a Service of the runtime's container, and Ready when it answers; removed with their owner."""
    pod = probe("unused", "serve", ":8080", "hello")["spec"]["containers"][0]
    runtime = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": "probes"},
        "spec": {
            "supportedModelFormats": [{"name": "probe", "version": "1"}],
            "containers": [{**pod, "name": "kserve-container"}],
        },
    }
    notes = {"serving.kserve.io/deploymentMode": "Standard", "serving.kserve.io/autoscalerClass": "none"}
    # With this name KServe injects nothing of its own.
    fetch = {"name": "storage-initializer", "image": PROBE, "args": ["file", "/nothing"]}
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "greeter", "annotations": notes},
        "spec": {
            "predictor": {
                "initContainers": [{**fetch, "securityContext": pod["securityContext"]}],
                "model": {"modelFormat": {"name": "probe"}, "runtime": "probes", "storageUri": "s3://bucket/model"},
            }
        },
    }
    create(node, namespace, runtime, service)
    kind = "inferenceservices.serving.kserve.io/greeter"
    node.kubectl("wait", "-n", namespace, "--for=condition=Ready", kind, f"--timeout={SECONDS:.0f}s")
    create(node, namespace, probe("client", "get", f"http://greeter-predictor.{namespace}.svc.cluster.local/"))
    node.kubectl("wait", "-n", namespace, "--for=jsonpath={.status.phase}=Succeeded", "pod/client", "--timeout=60s")
    assert node.kubectl("logs", "-n", namespace, "client") == "hello\n"
    node.kubectl("delete", "-n", namespace, kind)
    node.kubectl("wait", "-n", namespace, "--for=delete", "deployment/greeter-predictor", "--timeout=60s")

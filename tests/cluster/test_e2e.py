"""The parts of `make e2e` that need no Kubeflow Pipelines: how it finds things, and how it tells of a failure."""

import json
from pathlib import Path

import pytest

from tests.cluster import e2e
from tests.cluster.control_plane import ControlPlane
from tools.binaries import program


@pytest.mark.parametrize(
    ("endpoint", "service"),
    [
        ("http://latentac-minio.demo.svc.cluster.local:9000", ("latentac-minio", "demo", "9000")),
        ("http://store.demo.svc:9000", ("store", "demo", "9000")),
        ("https://s3.eu-central-1.amazonaws.com", None),
        ("http://minio.example:9000", None),
        ("http://10.0.0.7:9000", None),
    ],
)
def test_a_store_in_the_cluster_is_known_by_its_name(endpoint: str, service: tuple[str, str, str] | None) -> None:
    """Only that one needs a port-forward; any other is asked as it is."""
    match = e2e.IN_CLUSTER.fullmatch(endpoint)

    assert (match and (match[2], match[3], match[4])) == service


def test_every_wait_has_a_bound(tmp_path: Path) -> None:
    """A command that hangs and a state that never comes both end, with what they were."""
    with pytest.raises(e2e.Failed, match="sleep 60: not within 0 s"):
        e2e.run(["sleep", "60"], 0.2)
    with pytest.raises(e2e.Failed, match="the moon: not within 0 s"):
        e2e.wait("the moon", lambda: False, 0.1)
    with pytest.raises(e2e.Failed, match="ended with 3: no luck"):
        e2e.run(["sh", "-c", "echo no luck >&2; exit 3"], 10)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_failure_is_reported_with_objects_and_events(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever of it cannot be read is said instead, and hides nothing else."""
    namespace = control_plane.namespace("e2e")
    for name, value in control_plane.environment.items():
        monkeypatch.setenv(name, value)
    event = {
        "kind": "Event",
        "apiVersion": "v1",
        "metadata": {"name": "told"},
        "involvedObject": {"kind": "Pod", "name": "serve", "namespace": namespace},
        "reason": "FailedMount",
        "message": "secret latentac-s3 not found",
        "type": "Warning",
    }
    pod = {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": "serve", "labels": {"app.kubernetes.io/part-of": "latentac"}},
        "spec": {"containers": [{"name": "main", "image": "none"}]},
    }
    for body in (event, pod):
        control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(body))

    e2e.explain(e2e.Tools(str(program("kubectl")), "helm", namespace), namespace)
    output = capsys.readouterr().err
    assert "secret latentac-s3 not found" in output
    assert f"--- {namespace}: log of serve" in output

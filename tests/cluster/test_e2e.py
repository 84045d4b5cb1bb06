"""The parts of `make e2e` that need no node: how it finds things, and what it does when the run fails, from the
installation of the chart by a real Helm on a real API server on. Kubeflow Pipelines is a stand-in."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster import e2e
from tests.cluster.control_plane import ControlPlane
from tests.components.test_finish import JOB
from tests.latentac.test_store import eventually
from tests.pipelines.kfp_server import Frame, Kfp, serving
from tools.binaries import program
from tools.golang import Unavailable


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


WITHOUT_PODS = {
    "store": {
        "url": "s3://latentac/x",
        "endpoint": "https://s3.example.internal:9000",
        "accessKey": "key",
        "secretKey": "secret",
        "bootstrap": {"enabled": False},
    },
    "tensorboard": {"enabled": False},
}
"""Values with which the chart starts nothing: no pod runs on the control plane of these tests."""


class Failing:
    """`make e2e` at work on a run that does not succeed."""

    def __init__(self, plane: ControlPlane, kfp: Kfp, folder: Path, namespace: str) -> None:
        self.plane, self.kfp, self.folder, self.namespace = plane, kfp, folder, namespace

    def start(self, **variables: str) -> "subprocess.Popen[str]":
        (self.folder / "values.yaml").write_text(yaml.safe_dump(WITHOUT_PODS))
        homes = {f"HELM_{each}_HOME": str(self.folder / each) for each in ("CACHE", "CONFIG", "DATA")}
        programs = self.folder / "programs"
        programs.mkdir()
        for name in ("kubectl", "helm"):
            try:
                (programs / name).symlink_to(program(name))
            except Unavailable as reason:
                pytest.skip(str(reason))
        given = {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "NAMESPACE": self.namespace,
            "KFP_NAMESPACE": self.namespace,
            "KFP_HOST": self.kfp.url,
            "VALUES": str(self.folder / "values.yaml"),
            "MINUTES": "5",
        }
        environment = {**os.environ, **self.plane.environment, **homes, **given, **variables}
        environment.pop("LATENTAC_CLUSTER", None)
        with (self.folder / "said").open("w") as said:
            command = [sys.executable, "-m", "tests.cluster.e2e"]
            return subprocess.Popen(
                command, cwd=e2e.ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, text=True
            )

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def leave_job(self) -> None:
        """The training job of the run, once it has started, as its step would have made it."""
        eventually(lambda: bool(self.kfp.runs), 240)
        (run,) = self.kfp.runs.values()
        name = run["runtime_config"]["parameters"]["run"]
        labels = {"latentac.io/run": name, "app.kubernetes.io/component": "train"}
        metadata = {"name": "latentac-1", "labels": labels, "annotations": {"latentac.io/run": name}}
        self.plane.kubectl("apply", "-n", self.namespace, "-f", "-", stdin=json.dumps({**JOB, "metadata": metadata}))
        status = json.dumps({"status": {"state": {"phase": "Running"}, "minAvailable": 1}})
        self.plane.kubectl("patch", *self.job, "--subresource=status", "--type=merge", "-p", status)

    @property
    def job(self) -> list[str]:
        return ["jobs.batch.volcano.sh", "latentac-1", "-n", self.namespace]

    def phase(self) -> str:
        return self.plane.kubectl("get", *self.job, "-o", "jsonpath={.status.state.phase}")


@pytest.fixture
def failing(control_plane: ControlPlane, crds: list[Path], tmp_path: Path) -> Iterator[Failing]:
    with serving() as kfp:
        kfp.script = [Frame("RUNNING", {"train": "RUNNING"})]
        yield Failing(control_plane, kfp, tmp_path, control_plane.namespace("e2e"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("end", ["failed", "too long", "interrupted"])
def test_a_run_that_does_not_succeed_is_explained_cancelled_and_taken_away(failing: Failing, end: str) -> None:
    """Its training job is stopped, whatever became of its step `finish`; the release goes; the exit code says it."""
    process = failing.start(**({"MINUTES": "0.1"} if end == "too long" else {}))
    try:
        failing.leave_job()
        (run,) = failing.kfp.runs.values()
        if end == "failed":
            failing.kfp.nodes = {
                "a": {
                    "type": "Pod",
                    "displayName": "train(0)",
                    "phase": "Failed",
                    "message": "main: Error (exit code 7)",
                }
            }
            run["frames"][:] = [Frame("FAILED", {"train(0)": "FAILED"}, ("RUNNING", "FAILED"))]
        if end == "interrupted":
            process.send_signal(signal.SIGINT)
        process.wait(240)
    finally:
        process.kill()
        process.wait()
    said = failing.said
    assert process.returncode == (130 if end == "interrupted" else 1), said
    assert "training job" in said
    assert failing.phase() == "Aborted", said
    assert "e2e: helm uninstall latentac" in said
    assert failing.plane.kubectl("get", "configmaps,secrets", "-n", failing.namespace, "-o", "name").split() == [
        "configmap/kube-root-ca.crt"
    ]
    terminated = [line for line in failing.kfp.requests if line.endswith(":terminate")]
    assert len(terminated) == (0 if end == "failed" else 1), said
    if end == "failed":
        assert "train: Error (exit code 7)" in said
        assert "finish did not run: a training job and an unfinished release may be left" in said
    if end != "interrupted":
        assert "e2e: the run did not succeed; it said last:" in said
        assert f"--- {failing.namespace}: objects" in said
        assert "latentac-1" in said.partition(f"--- {failing.namespace}: objects")[2], said

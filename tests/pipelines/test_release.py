"""What `latentac pipeline` reads of the cluster itself, from a real API server: a release's settings, and the pods."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentac.pipelines.__main__ import SETTINGS
from latentac.runs.cli import main
from tests.cluster.control_plane import ControlPlane
from tests.pipelines.kfp_server import Frame, Kfp, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def namespace(control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> str:
    """A namespace with the ConfigMap that the chart would render for a release `mine`."""
    name = control_plane.namespace("pipelines")
    settings = SETTINGS.read_text().replace("namespace: latentac", f"namespace: {name}")
    config = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "mine-cluster"}}
    control_plane.kubectl(
        "apply", "-n", name, "-f", "-", stdin=json.dumps({**config, "data": {"cluster.yaml": settings}})
    )
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    monkeypatch.delenv("LATENTAC_CLUSTER", raising=False)
    return name


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kfp]:
    with serving() as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        yield server


def test_settings_are_read_from_the_release(namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its name and namespace; one that is not there is one message."""
    to = ["--to", str(tmp_path / "p.yaml"), "--manifests", str(tmp_path / "m.yaml")]
    release = ["--kube-namespace", namespace]

    assert main(["pipeline", "compile", "--release", "mine", *release, *to]) == 0
    assert f"namespace: {namespace}" in (tmp_path / "m.yaml").read_text()
    assert main(["pipeline", "compile", "--release", "other", *release, *to]) == 2
    assert f"there is no ConfigMap {namespace}/other-cluster with cluster.yaml" in capsys.readouterr().err


def test_what_a_pod_waits_for_is_reported(
    namespace: str, control_plane: ControlPlane, kfp: Kfp, capsys: pytest.CaptureFixture[str]
) -> None:
    """KFP says RUNNING of a pod that no node has room for; the pod itself says why, within a look."""
    pod = {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": "step", "labels": {"pipeline/runid": "run-1"}},
        "spec": {"containers": [{"name": "main", "image": "none", "resources": {"requests": {"cpu": "1000"}}}]},
    }
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))
    status = {"status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes have room"}]}}
    patch = ["patch", "pod", "step", "-n", namespace, "--subresource=status", "--type=merge", "-p", json.dumps(status)]
    control_plane.kubectl(*patch)
    kfp.script = [Frame("RUNNING", {"prepare": "RUNNING"})]
    kfp.add_run("run-1")
    release = ["--release", "mine", "--kube-namespace", namespace]
    bounds = ["--poll-seconds", "0.05", "--pending-seconds", "0.5"]

    assert main(["pipeline", "follow", "run-1", *release, *bounds]) == 9
    said = capsys.readouterr()
    assert said.out.count("waits: step: ") == 1
    assert "waits for 0 s: step: " in said.err
    assert "latentac pipeline cancel run-1" in said.err


def test_pods_that_may_not_be_read_do_not_end_the_following(
    namespace: str,
    control_plane: ControlPlane,
    kfp: Kfp,
    tmp_path: Path,
) -> None:
    """Not everybody who may use KFP may look at pods: that is told once."""
    (tmp_path / "cluster.yaml").write_text(
        SETTINGS.read_text().replace("namespace: latentac", f"namespace: {namespace}")
    )
    control_plane.kubectl("create", "serviceaccount", "nobody", "-n", namespace)
    nobody = str(control_plane.kubeconfig_of(namespace, "nobody"))
    kfp.script = [Frame("RUNNING", {"prepare": "RUNNING"})] * 3 + [Frame("SUCCEEDED", {"prepare": "SUCCEEDED"})]
    kfp.add_run("run-1")
    settings = ["--cluster-settings", str(tmp_path / "cluster.yaml")]

    # In a process of its own: the client reads KUBECONFIG when it is imported.
    command = [
        sys.executable,
        "-m",
        "latentac.runs.cli",
        "pipeline",
        "follow",
        "run-1",
        *settings,
        "--poll-seconds",
        "0.05",
    ]
    environment = {**os.environ, "KUBECONFIG": nobody}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot find out what pods wait for") == 1

"""The step that ends a run, as its pod does it: nothing is left running on the cluster, and the report is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentac.pipelines.__main__ import SETTINGS
from tests.cluster.control_plane import ControlPlane
from tests.latentac.test_finish import published

STEP = """\
import sys
from types import SimpleNamespace as Place
from latentac.components.finish.component import finish
run, store, output = sys.argv[1:]
places = {name: Place(path=f"{output}/artifacts/{name}") for name in ("manifest", "report", "card")}
finish.python_func(run=run, store=store, output=output, **places)
"""
JOB = {
    "apiVersion": "batch.volcano.sh/v1alpha1",
    "kind": "Job",
    "metadata": {
        "name": "latentac-1",
        "labels": {"latentac.io/run": "run-1", "app.kubernetes.io/component": "train"},
        "annotations": {"latentac.io/run": "run-1"},
    },
    "spec": {
        "minAvailable": 1,
        "queue": "default",
        "tasks": [
            {
                "name": "worker-0",
                "replicas": 1,
                "template": {"spec": {"containers": [{"name": "worker-0", "image": "none"}]}},
            }
        ],
    },
}


def step(folder: Path, url: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    (folder / "runs" / "artifacts").mkdir(parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if name != "LATENTAC_CLUSTER"}
    command = [sys.executable, "-c", STEP, "run-1", url, str(folder / "runs")]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)


def shown(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs" / "artifacts").iterdir())


def test_report_and_card_are_shown(tmp_path: Path) -> None:
    """The page and the card are artifacts of the step; off a cluster there is nothing else to do."""
    _, url = published(tmp_path, "gate")
    done = step(tmp_path, url)

    assert done.returncode == 0, done.stderr
    assert shown(tmp_path) == ["card", "manifest", "report"]
    assert "<html" in (tmp_path / "runs" / "artifacts" / "report").read_text()[:200]
    assert (tmp_path / "runs" / "artifacts" / "card").read_text().startswith("# run-1")


def test_a_run_that_published_nothing_ends_quietly(tmp_path: Path) -> None:
    """Whatever failed before has said why."""
    done = step(tmp_path, f"file://{tmp_path}/store")

    assert (done.returncode, done.stderr) == (0, "")
    assert shown(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_still_runs_is_stopped(control_plane: ControlPlane, crds: list[Path], tmp_path: Path) -> None:
    """As after a cancel: the step that started it got no time to stop it."""
    namespace = control_plane.namespace("finish")
    settings = tmp_path / "cluster.yaml"
    settings.write_text(SETTINGS.read_text().replace("namespace: latentac", f"namespace: {namespace}"))
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(JOB))
    status = {"status": {"state": {"phase": "Running"}, "minAvailable": 1}}
    job = ["jobs.batch.volcano.sh", "latentac-1", "-n", namespace]
    control_plane.kubectl("patch", *job, "--subresource=status", "--type=merge", "-p", json.dumps(status))
    _, url = published(tmp_path, "prepare")

    done = step(tmp_path, url, LATENTAC_CLUSTER=str(settings), KUBECONFIG=str(control_plane.kubeconfig))
    assert done.returncode == 0, done.stderr
    assert control_plane.kubectl("get", *job, "-o", "jsonpath={.status.state.phase}") == "Aborted"
    assert shown(tmp_path) == ["card", "manifest", "report"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cluster_that_does_not_answer_hides_no_report(tmp_path: Path) -> None:
    """The step fails, for a job may be left running, and the report is written all the same."""
    nowhere = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "x", "user": {}}],
    }
    (tmp_path / "config").write_text(json.dumps(nowhere))
    _, url = published(tmp_path, "prepare")

    done = step(tmp_path, url, LATENTAC_CLUSTER=str(SETTINGS), KUBECONFIG=str(tmp_path / "config"))
    assert done.returncode == 75
    assert "the API server does not answer" in done.stderr
    assert shown(tmp_path) == ["card", "manifest", "report"]

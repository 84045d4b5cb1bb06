"""`latentac pipeline cancel`, `runs`, and what `follow` shows of a failure, against stand-ins for the APIs of Kubeflow
Pipelines and Kubernetes. The second knows no schema: tests/components has the same calls against a real API server."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from latentac.components.deploy.inference_service import REVISION
from latentac.components.deploy.rollout import BEFORE, PROMOTES
from latentac.pipelines.__main__ import SETTINGS
from latentac.runs.cli import main
from latentac.system.steps import NAMES as STEPS
from tests.components.kubernetes_server import Kubernetes, kubernetes
from tests.pipelines.kfp_server import Frame, Kfp, serving

JOBS = "/apis/batch.volcano.sh/v1alpha1/namespaces/latentac/jobs"
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/latentac/inferenceservices"
PODS = "/api/v1/namespaces/latentac/pods"
CLUSTER = ["--cluster-settings", str(SETTINGS)]
QUICK = ["--poll-seconds", "0.01"]
TERMINATED = "POST /apis/v2beta1/runs/run-1:terminate"


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kfp]:
    for name in ("LATENTAC_KFP_TOKEN", "LATENTAC_KFP_COOKIE", "KF_PIPELINES_SA_TOKEN_PATH", "LATENTAC_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        server.script = [Frame("RUNNING", {"train": "RUNNING"})]
        yield server


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    with kubernetes() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


def add_run(kfp: Kfp, run_id: str, name: str, **fields: Any) -> None:
    kfp.add_run(run_id, display_name=name, runtime_config={"parameters": {"run": name}}, **fields)


def add_job(cluster: Kubernetes, run: str, phase: str = "Running") -> str:
    """The path of a training job of `run`."""
    labels = {"latentac.io/run": run, "app.kubernetes.io/component": "train"}
    metadata = {"name": f"job-{run}", "labels": labels, "annotations": {"latentac.io/run": run}}
    cluster.add(JOBS, {"metadata": metadata, "status": {"state": {"phase": phase}}})
    return f"{JOBS}/job-{run}"


def phase(cluster: Kubernetes, path: str) -> str:
    return str(cluster.objects[path]["status"]["state"]["phase"])


def pipeline(*arguments: str) -> int:
    return main(["pipeline", *arguments])


# Cancelling


def test_cancelling_stops_the_training_job_without_the_exit_handler(
    kfp: Kfp, cluster: Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Argo may never run `finish`. A job of another run goes on."""
    add_run(kfp, "run-1", "first")
    job, other = add_job(cluster, "first"), add_job(cluster, "second")
    assert pipeline("cancel", "run-1", *CLUSTER) == 0

    assert (phase(cluster, job), phase(cluster, other)) == ("Aborted", "Running")
    assert kfp.requests.count(TERMINATED) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == ["run run-1: is cancelled", "training job latentac/job-first is stopped"]


def test_an_unfinished_release_is_undone(kfp: Kfp, cluster: Kubernetes, capsys: pytest.CaptureFixture[str]) -> None:
    """The service that was being promoted goes, since nothing served before; that of another run's release stays."""
    add_run(kfp, "run-1", "first")
    revision = {REVISION: "r2"}
    notes = {BEFORE: "null", PROMOTES: "r2"}
    green = {"name": "latentac-green", "labels": {"latentac.io/run": "first"}, "annotations": notes}
    cluster.add(SERVICES, {"metadata": green})
    cluster.add(SERVICES, {"metadata": {"name": "latentac", "annotations": revision}})
    add_run(kfp, "run-2", "second")
    assert pipeline("cancel", "run-2", *CLUSTER) == 0
    assert f"{SERVICES}/latentac-green" in cluster.objects
    assert "no training job and no unfinished release of second is left" in capsys.readouterr().out

    assert pipeline("cancel", "run-1", *CLUSTER) == 0
    assert cluster.below(SERVICES) == []
    assert "the unfinished release of latentac is undone" in capsys.readouterr().out


def test_what_a_run_left_that_is_over_is_stopped(
    kfp: Kfp, cluster: Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run itself is not asked to end again."""
    kfp.script = [Frame("FAILED", {"train": "FAILED"}, ("RUNNING", "CANCELING", "FAILED"))]
    add_run(kfp, "run-1", "first")
    job = add_job(cluster, "first")
    assert pipeline("cancel", "run-1", *CLUSTER) == 0

    assert phase(cluster, job) == "Aborted"
    assert TERMINATED not in kfp.requests
    assert capsys.readouterr().out.startswith("run run-1: CANCELED already\n")


def test_a_run_that_another_one_continues_keeps_its_job(
    kfp: Kfp, cluster: Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A known id continues a run: the job of that id belongs to the one that is not over."""
    kfp.script = [Frame("FAILED", {"train": "FAILED"})]
    add_run(kfp, "run-1", "first")
    kfp.script = [Frame("RUNNING", {"train": "RUNNING"})]
    add_run(kfp, "run-2", "first")
    job = add_job(cluster, "first")
    assert pipeline("cancel", "run-1", *CLUSTER) == 9

    assert phase(cluster, job) == "Running"
    assert "run run-2 continues first: its training job is that one's. To stop it, cancel run-2" in (
        capsys.readouterr().err
    )


def test_without_a_release_the_command_says_what_it_did_not_stop(
    kfp: Kfp, cluster: Kubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who may use Kubeflow Pipelines need not know the release."""
    add_run(kfp, "run-1", "first")
    job = add_job(cluster, "first")
    assert pipeline("cancel", "run-1") == 0
    assert phase(cluster, job) == "Running"
    said = capsys.readouterr().out
    assert "run run-1: is cancelled" in said
    assert "no release is named (--release, --kube-namespace)" in said
    assert "train.leaseSeconds" in said


def test_a_cluster_that_refuses_is_reported_after_the_run_is_cancelled(
    kfp: Kfp, cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code says that something may be left."""
    add_run(kfp, "run-1", "first")
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    assert pipeline("cancel", "run-1", *CLUSTER) == 2
    output = capsys.readouterr()
    assert "run run-1: is cancelled" in output.out
    assert "KUBECONFIG = " in output.err


def test_a_scheduled_run_is_cancelled_by_the_id_that_kfp_gave_it(kfp: Kfp, cluster: Kubernetes) -> None:
    """Its parameter says `-`, and its job has that id."""
    add_run(kfp, "run-1", "-")
    job = add_job(cluster, "run-1")
    assert pipeline("cancel", "run-1", *CLUSTER) == 0
    assert phase(cluster, job) == "Aborted"


@pytest.mark.parametrize(
    ("finish", "words"),
    [
        ({"finish": "FAILED"}, "finish failed"),
        ({"finish": "PENDING"}, "finish did not run"),
        ({}, "finish did not run"),
    ],
)
def test_following_says_that_the_exit_handler_did_not_succeed(
    kfp: Kfp, capsys: pytest.CaptureFixture[str], finish: dict[str, str], words: str
) -> None:
    """After a cancel, the pod of `finish` may have been pending when Argo looked: it is failed, and never runs."""
    kfp.script = [Frame("FAILED", {"train": "FAILED", **finish}, ("RUNNING", "CANCELING", "FAILED"))]
    add_run(kfp, "run-1", "first")
    assert pipeline("follow", "run-1", *QUICK) == 9

    said = capsys.readouterr().out
    assert (
        f"      {words}: a training job and an unfinished release may be left. `latentac pipeline cancel run-1`" in said
    )
    assert said.endswith("run run-1: CANCELED\n")


# Listing


@pytest.mark.parametrize("lists_history", [True, False])
def test_runs_are_listed_as_what_they_are(kfp: Kfp, capsys: pytest.CaptureFixture[str], lists_history: bool) -> None:
    """A cancelled one ends as FAILED, and a scheduled one has no name of its own. A list need not have the history."""
    kfp.lists_history = lists_history
    over = dict.fromkeys(STEPS, "SUCCEEDED")
    kfp.script = [Frame("SUCCEEDED", over)]
    add_run(kfp, "run-1", "first")
    kfp.script = [Frame("FAILED", {}, ("RUNNING", "CANCELING", "FAILED"))]
    add_run(kfp, "run-2", "second")
    kfp.script = [Frame("FAILED", {}, ("RUNNING", "FAILED"))]
    add_run(kfp, "run-3", "third")
    kfp.script = [Frame("RUNNING")]
    kfp.add_run("run-4", display_name="mondays-x7", runtime_config={"parameters": {"run": "-"}})
    assert pipeline("runs") == 0

    rows = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], *row[3:]) for row in rows] == [
        ("run-4", "RUNNING", "mondays-x7 (scheduled)"),
        ("run-3", "FAILED", "third"),
        ("run-2", "CANCELED", "second"),
        ("run-1", "SUCCEEDED", "first"),
    ]


# The words of a failure


def add_pod(cluster: Kubernetes, folder: Path, name: str, node: str, log: str, codes: Mapping[str, int]) -> None:
    """A failed pod as KFP makes it. codes: exit code of each container."""
    states = [{"name": each, "state": {"terminated": {"exitCode": code}}} for each, code in codes.items()]
    metadata = {
        "name": name,
        "labels": {"pipeline/runid": "run-1"},
        "annotations": {"workflows.argoproj.io/node-name": node},
    }
    cluster.add(PODS, {"metadata": metadata, "status": {"phase": "Failed", "containerStatuses": states}})
    (folder / f"{name}.log").write_text(log)
    cluster.logs[name] = folder / f"{name}.log"


LAUNCHER = """\
I1128 07:49:54.123456      18 launcher_v2.go:90] input ComponentSpec:{
I1128 07:49:55.000001      18 object_store.go:305] Cannot detect minioServiceHost from environment variables
time="2026-11-28T07:49:53.010Z" level=info msg="capturing logs" argo=true
[KFP Executor 2026-11-28 07:49:56,632 INFO]: Looking for component `prepare` in --component_module_path
backbone.source = 'x/y': does not exist. Name a folder, or a repository of the hub.
F1128 07:50:00.123456      18 main.go:57] failed to execute component: exit status 2
time="2026-11-28T07:50:00.500Z" level=info msg="sub-process exited" argo=true error="<nil>"
"""


def fail(kfp: Kfp, **nodes: dict[str, Any]) -> None:
    kfp.script = [Frame("FAILED", {"prepare": "FAILED", "finish": "SUCCEEDED"})]
    kfp.nodes = nodes
    add_run(kfp, "run-1", "first")


def test_a_failed_step_shows_its_own_lines_under_its_name(
    kfp: Kfp, cluster: Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Argo numbers the attempts of nodes. What init, wait, KFP's launcher and its drivers log is not the step's."""
    fail(
        kfp,
        a={"type": "DAG", "displayName": "prepare(0)", "phase": "Failed", "message": "child 'x' failed"},
        b={
            "type": "Pod",
            "displayName": "executor(0)",
            "boundaryID": "a",
            "phase": "Failed",
            "message": "main: Error (exit code 2)",
        },
    )
    codes = {"wait": 0, "main": 2}
    add_pod(cluster, tmp_path, "wf-impl-1", "wf.root(0).prepare(0).executor(0)", LAUNCHER, codes)
    add_pod(cluster, tmp_path, "wf-system-container-driver-2", "wf.root(0).prepare-driver(0)", LAUNCHER, codes)
    assert pipeline("follow", "run-1", *CLUSTER, *QUICK) == 9

    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("      ")]
    assert said == [
        "      prepare: Error (exit code 2)",
        "      prepare: backbone.source = 'x/y': does not exist. Name a folder, or a repository of the hub.",
    ]


def test_what_failed_around_a_step_is_shown_where_the_step_said_nothing(
    kfp: Kfp, cluster: Kubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver that fails, and the launcher that cannot upload: their lines are the only reason there is."""
    fail(kfp)
    said = "F1128 07:50:00.123456 18 main.go:57] failed to execute component: failed to upload an artifact: no bucket\n"
    add_pod(cluster, tmp_path, "wf-impl-1", "wf.root.train.executor", said, {"main": 1, "wait": 0})
    assert pipeline("follow", "run-1", *CLUSTER, *QUICK) == 9
    assert f"      train: {said}" in capsys.readouterr().out

    cluster.objects.clear()
    kfp.runs.clear()
    fail(kfp)
    told = "I1128 07:50:00.123456 18 main.go:57] KFP driver: failed to get the config map\n"
    add_pod(cluster, tmp_path, "wf-system-dag-driver-2", "wf.root-driver", told, {"main": 1, "wait": 0})
    assert pipeline("follow", "run-1", *CLUSTER, *QUICK) == 9
    assert f"      wf-system-dag-driver-2/main: {told}" in capsys.readouterr().out


def test_an_attempt_that_fails_and_the_next_one_are_both_told(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """The entries of one step are told apart by the number of the attempt; the newest counts."""
    kfp.script = [
        Frame("RUNNING", {"prepare(0)": "RUNNING"}),
        Frame("RUNNING", {"prepare(0)": "FAILED"}),
        Frame("RUNNING", {"prepare(1)": "RUNNING", "prepare(0)": "FAILED"}),
        Frame("SUCCEEDED", {**{f"{step}(0)": "SUCCEEDED" for step in STEPS}, "prepare(1)": "SUCCEEDED"}),
    ]
    add_run(kfp, "run-1", "first")
    assert pipeline("follow", "run-1", *QUICK) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1/8]")]
    assert [line.partition(" in ")[0] for line in said] == [
        "[1/8] prepare",
        "[1/8] prepare failed",
        "[1/8] prepare again",
        "[1/8] prepare done",
    ]

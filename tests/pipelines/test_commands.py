"""`latentac pipeline ...` against a server that speaks the API of Kubeflow Pipelines: what a person types and reads."""

import json
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from latentac.pipelines.__main__ import SETTINGS
from latentac.runs import package
from latentac.runs.cli import main
from latentac.store import open_store
from latentac.system.steps import NAMES as STEPS
from tests.pipelines.kfp_server import Frame, Kfp, serving

ALL = dict.fromkeys(STEPS, "SUCCEEDED")
COMMANDS = ["compile", "upload", "submit", "follow", "report", "cancel", "schedule", "runs"]
QUICK = ["--poll-seconds", "0.01"]


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kfp]:
    for name in ("LATENTAC_KFP_TOKEN", "LATENTAC_KFP_COOKIE", "KF_PIPELINES_SA_TOKEN_PATH", "LATENTAC_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    with serving() as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        yield server


def pipeline(*arguments: str) -> int:
    return main(["pipeline", *arguments])


def submit(*arguments: str) -> int:
    return pipeline("submit", "--cluster-settings", str(SETTINGS), "--recipe", "shapes-unet-smoke", *QUICK, *arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What its help shows can be typed."""
    with pytest.raises(SystemExit) as ended:
        pipeline(command, "--help")

    assert ended.value.code == 0
    assert f"example:\n  latentac pipeline {command} --" in capsys.readouterr().out


def test_compile_writes_for_the_named_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The version that it prints is that of an upload of the same."""
    settings = yaml.safe_load(SETTINGS.read_text())
    settings["images"]["train"] = "mirror/train:7"
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(settings))
    to = ["--to", str(tmp_path / "p.yaml"), "--manifests", str(tmp_path / "m.yaml")]

    assert pipeline("compile", "--cluster-settings", str(tmp_path / "cluster.yaml"), *to) == 0
    assert len(capsys.readouterr().out.strip()) == 12
    assert "image: mirror/train:7" in (tmp_path / "p.yaml").read_text()
    assert "kind: PipelineVersion" in (tmp_path / "m.yaml").read_text()


def test_the_same_pipeline_is_uploaded_once(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """A version is its content: without a change there is nothing to upload."""
    assert pipeline("upload", "--cluster-settings", str(SETTINGS)) == 0
    assert pipeline("upload", "--cluster-settings", str(SETTINGS)) == 0

    first, second = capsys.readouterr().out.splitlines()
    assert second == f"{first} (there already)"
    assert len(kfp.uploads) == len(kfp.versions) == 1
    assert b"exec-pretrain-value" in kfp.uploads[0]


def test_submit_starts_a_run_under_the_releases_account(
    kfp: Kfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of configuration stays here: its fields go along. The store is the release's."""
    (tmp_path / "mine.yaml").write_text("train: {num_iterations: 2}\nseed: 3\n")
    assert submit("--config", str(tmp_path / "mine.yaml"), "--set", "seed=4", "--run", "first") == 0

    (run,) = kfp.runs.values()
    assert run["service_account"] == "latentac-pipeline"
    assert run["display_name"] == "first"
    assert run["runtime_config"]["parameters"] == {
        "run": "first",
        "recipe": "shapes-unet-smoke",
        "overrides": ["train.num_iterations=2", "seed=3", "seed=4", 'project="mine"'],
        "store": "s3://latentac/latentac",
        "output": "/work",
    }
    assert run["pipeline_version_reference"]["pipeline_version_id"] == "version-0"
    assert "follow with: latentac pipeline follow run-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "train.num_iteration=2"], "train.num_iteration = 2: unknown field"),
        (["--recipe", "shapes"], "recipe = 'shapes': does not exist"),
        (["--run", "../x"], "run = '../x': cannot be the id of a run"),
        (["--run", ""], "run = '': cannot be the id of a run"),
        (["--run", "x" * 300], "cannot be the id of a run"),
    ],
)
def test_a_mistake_costs_no_run(kfp: Kfp, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """The configuration is checked before anything is uploaded."""
    assert submit(*arguments) == 2
    assert words in capsys.readouterr().err
    assert kfp.requests == []


def test_a_request_that_is_too_large_for_a_step_is_refused(
    kfp: Kfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parameters come on a step's command line: a pod would die of it without a word."""
    assert submit("--set", f"prompts.source={'x' * 120_000}") == 2
    assert "parameters hold 100000" in capsys.readouterr().err
    assert kfp.runs == {}


def test_a_package_goes_along_as_text(kfp: Kfp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster cannot read the folder. What the text holds is what the folder held."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").touch()
    (tmp_path / "own" / "rewards.py").write_text("class Bright:\n    def __call__(self, images, prompts): ...\n")
    rewards = 'rewards=[{use: "own.rewards:Bright"}]'
    assert submit("--package", str(tmp_path / "own"), "--set", rewards, "--set", "gate.reward=Bright") == 0

    (run,) = kfp.runs.values()
    package.unpack(package.read(run["runtime_config"]["parameters"]["package"]), tmp_path / "pod")
    files = {path.relative_to(tmp_path / "pod").as_posix() for path in (tmp_path / "pod").rglob("*.py")}
    assert files == {"own/__init__.py", "own/rewards.py"}


def test_a_package_that_is_too_large_for_a_step_is_refused(
    kfp: Kfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its size and the limit, before anything is uploaded."""
    (tmp_path / "weights.bin").write_bytes(random.Random(0).randbytes(60_000))
    assert submit("--package", str(tmp_path)) == 2
    assert "KiB when packed, and 48 KiB can be submitted" in capsys.readouterr().err
    assert kfp.requests == []


def test_following_prints_each_step_as_it_begins_and_ends(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """With its seconds, each line once; in the end where to find the report."""
    kfp.script = [
        Frame("PENDING"),
        Frame("RUNNING", {"prepare": "RUNNING"}),
        Frame("RUNNING", {"prepare": "RUNNING"}),
        Frame("RUNNING", {"prepare": "SUCCEEDED", "pretrain-value": "RUNNING"}),
        Frame("RUNNING", {**ALL, "finish": "RUNNING"}),
        Frame("SUCCEEDED", ALL),
    ]
    assert submit("--follow") == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("[", "run run-1: "))]
    assert lines[:4] == [
        "[1/8] prepare",
        "[1/8] prepare done in 7 s",
        "[2/8] pretrain-value",
        "[2/8] pretrain-value done in 7 s",
    ]
    assert lines[-3:] == ["[8/8] finish", "[8/8] finish done in 7 s", "run run-1: SUCCEEDED"]
    assert len(lines) == 2 * len(STEPS) + 1


def test_a_model_that_is_held_is_a_success_without_deploy(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """The gate's no is a result, not a failure."""
    tasks = {step: "SUCCEEDED" for step in STEPS if step != "deploy"}
    kfp.script = [Frame("SUCCEEDED", {**tasks, "condition-2": "SKIPPED"})]
    assert submit("--follow") == 0
    assert "[7/8] deploy skipped" in capsys.readouterr().out


def test_a_failure_is_reported_with_the_reason_of_the_step(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """The newer API leaves errors empty: the reason is in the workflow's nodes, whose pods are called `executor`."""
    kfp.script = [
        Frame("RUNNING", {"prepare": "SUCCEEDED", "train": "RUNNING"}),
        Frame("FAILED", {"prepare": "SUCCEEDED", "train": "FAILED", "finish": "SUCCEEDED"}),
    ]
    kfp.nodes = {
        "a": {"type": "DAG", "displayName": "train", "phase": "Failed", "message": "child 'b' failed"},
        "b": {
            "type": "Pod",
            "displayName": "executor",
            "boundaryID": "a",
            "phase": "Failed",
            "message": "OOMKilled (exit code 137)",
        },
    }
    assert submit("--follow") == 9

    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert "[3/8] train failed in 7 s" in lines
    assert "      train: OOMKilled (exit code 137)" in lines
    assert not [line for line in lines if "child 'b' failed" in line]
    assert "run run-1: failed; the reasons are above. Submit it again with the same --run" in output.err


def test_a_run_that_waits_for_ever_is_given_up(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """KFP itself counts no time before a pod has a node: without a bound one would wait as long."""
    kfp.script = [Frame("RUNNING", {"prepare": "PENDING"})]
    kfp.nodes = {
        "a": {"type": "Pod", "displayName": "prepare", "phase": "Pending", "message": "ImagePullBackOff: no such image"}
    }
    assert submit("--follow", "--pending-seconds", "0.2") == 9

    error = capsys.readouterr().err
    assert "waits for 0 s: prepare: ImagePullBackOff: no such image" in error
    assert "latentac pipeline cancel run-1" in error


def test_a_run_that_takes_too_long_is_left(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """A bound for scripts that must end; the run itself goes on."""
    kfp.script = [Frame("RUNNING", {"prepare": "RUNNING"})]
    assert submit("--follow", "--total-seconds", "0.1") == 9
    assert "has not ended in 0 s. It goes on" in capsys.readouterr().err


def test_a_cancelled_run_is_distinguished_from_a_failed_one(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """Both end as FAILED: the history tells them apart. The exit handler still runs."""
    kfp.script = [Frame("RUNNING", {"prepare": "RUNNING"})]
    kfp.add_run("run-1")

    assert pipeline("cancel", "run-1") == 0
    assert pipeline("follow", "run-1", *QUICK) == 9
    output = capsys.readouterr()
    assert "run run-1: CANCELED" in output.out
    assert "[8/8] finish done" in output.out
    assert "was cancelled" in output.err
    assert pipeline("cancel", "run-1") == 0
    assert "already" in capsys.readouterr().out
    assert kfp.requests.count("POST /apis/v2beta1/runs/run-1:terminate") == 1


def test_an_outage_does_not_end_the_following(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is restarted answers 503 for a while; the run knows nothing of it."""
    kfp.script = [Frame("RUNNING", {"prepare": "RUNNING"}), Frame("SUCCEEDED", ALL)]
    kfp.add_run("run-1")
    kfp.fail_next = [503] * 5

    assert pipeline("follow", "run-1", *QUICK) == 0
    assert "trying again" in capsys.readouterr().out


def test_a_schedule_lets_kfp_name_each_run(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a version of its own, and never two of its runs at once."""
    arguments = ["--cluster-settings", str(SETTINGS), "--recipe", "shapes-unet-smoke"]
    assert pipeline("schedule", *arguments, "--cron", "0 0 3 * * 1", "--name", "mondays") == 0

    (schedule,) = kfp.schedules
    assert schedule["display_name"] == "mondays"
    assert schedule["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1"
    assert (schedule["max_concurrency"], schedule["mode"], schedule["no_catchup"]) == ("1", "ENABLE", True)
    assert b"pipeline_job_uuid" in kfp.uploads[0]
    assert pipeline("schedule", *arguments, "--cron", "0 3 * * 1") == 2
    assert "has not six fields" in capsys.readouterr().err


def test_runs_are_listed_with_their_names(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest first, with the id that the other commands take."""
    for run_id, name in (("1", "first"), ("2", "second")):
        kfp.add_run(run_id, display_name=name, runtime_config={"parameters": {"run": name}})
    assert pipeline("runs") == 0

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(words[0], words[-1]) for words in lines] == [("2", "second"), ("1", "first")]


def test_the_report_is_fetched_from_the_runs_own_store(
    kfp: Kfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the id that KFP knows; the run's parameters say where it lies."""
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "report.html").write_text("<p>the report</p>")
    store = f"file://{tmp_path}/store"
    open_store(store).publish("first/finish", tmp_path / "page", run="first", step="finish", config_hash="x")
    kfp.add_run("run-1", runtime_config={"parameters": {"run": "first", "store": store}})
    kfp.add_run("run-2", runtime_config={"parameters": {"run": "second", "store": store}})

    assert pipeline("report", "run-1", "--to", str(tmp_path / "r.html")) == 0
    assert (tmp_path / "r.html").read_text() == "<p>the report</p>"
    assert pipeline("report", "run-2", "--to", str(tmp_path / "s.html")) == 3
    assert "nothing was published there" in capsys.readouterr().err


def test_no_answer_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The code says that it may pass, the message what to look at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert pipeline("runs", "--host", f"http://127.0.0.1:{port}") == 75

    error = capsys.readouterr().err
    assert "Kubeflow Pipelines does not answer" in error
    assert "port-forward" in error
    assert pipeline("runs", "--host", "localhost:8888") == 2


def test_a_token_comes_from_the_environment_and_is_never_shown(
    kfp: Kfp, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the right one the message says where it belongs."""
    kfp.token = "right-and-secret"
    assert pipeline("runs") == 9
    assert "401 Request not authenticated. Export a valid token in LATENTAC_KFP_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("LATENTAC_KFP_TOKEN", "right-and-secret")
    assert pipeline("runs") == 0
    monkeypatch.setenv("LATENTAC_KFP_TOKEN", "wrong-and-secret")
    assert pipeline("runs") == 9
    output = capsys.readouterr()
    assert "secret" not in output.out + output.err


def test_a_token_with_a_line_break_is_a_token(
    kfp: Kfp, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its end it is dropped; within, it is one message without the token."""
    kfp.token = "right-and-secret"
    monkeypatch.setenv("LATENTAC_KFP_TOKEN", "right-and-secret\r\n")
    assert pipeline("runs") == 0
    for name in ("LATENTAC_KFP_TOKEN", "LATENTAC_KFP_COOKIE"):
        monkeypatch.delenv("LATENTAC_KFP_TOKEN", raising=False)
        monkeypatch.setenv(name, "two-and\nsecret")
        assert pipeline("runs") == 2
        output = capsys.readouterr().err
        assert f"{name} = '***': has a character that cannot be sent" in output
        assert "secret" not in output


def test_a_token_of_a_pod_is_read_from_its_file(kfp: Kfp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KFP's own variable names the projected file."""
    kfp.token = "projected"
    (tmp_path / "token").write_text("projected\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert pipeline("runs") == 0


@pytest.mark.parametrize("content", [b"\xff\xfet", "schlüssel".encode(), b"two\nlines", b"a\0b"])
def test_a_file_that_holds_no_token_is_reported_by_its_variable(
    kfp: Kfp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """What it holds is not shown: it may be a secret all the same."""
    (tmp_path / "token").write_bytes(content)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    assert pipeline("runs") == 2
    output = capsys.readouterr().err
    assert f"KF_PIPELINES_SA_TOKEN_PATH = '{tmp_path}/token': " in output
    assert "lines" not in output


@pytest.mark.parametrize("command", ["follow", "cancel", "report"])
def test_an_unknown_run_is_one_message(
    kfp: Kfp, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """With what lists the known ones."""
    to = ["--to", str(tmp_path / "r.html")] if command == "report" else []
    assert pipeline(command, "nobody", *to) == 9
    error = capsys.readouterr().err
    assert "run nobody: 404 nobody not found. See what there is with `latentac pipeline runs`" in error
    assert "Traceback" not in error


def test_a_start_without_an_answer_is_not_asked_for_twice(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody knows whether the first one was heard, and two runs of one id would write over each other."""
    assert pipeline("upload", "--cluster-settings", str(SETTINGS)) == 0
    kfp.experiments["latentac"] = "experiment-0"
    before = len(kfp.requests)
    kfp.fail_next = []
    original = kfp.fail_next

    class Last(list[int]):
        """Refuses the one request that starts the run."""

        def __bool__(self) -> bool:
            return kfp.requests[-1] == "POST /apis/v2beta1/runs"

        def pop(self, index: int = -1) -> int:  # type: ignore[override]
            return 503

    kfp.fail_next = Last(original)
    assert submit() == 75
    assert kfp.requests[before:].count("POST /apis/v2beta1/runs") == 1


def test_an_endpoint_of_another_project_is_refused_at_once(
    kfp: Kfp, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the chart says whose it is: before hours of training, and nothing is started. `--project` names it."""
    settings = yaml.safe_load(SETTINGS.read_text())
    settings["deploy"]["project"] = "mine"
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(settings))
    command = ["submit", "--cluster-settings", str(tmp_path / "cluster.yaml"), "--recipe", "shapes-unet-smoke"]
    assert pipeline(*command) == 2
    found = "project = 'shapes-unet-smoke': the endpoint latentac of release latentac is that of project mine"
    assert found in capsys.readouterr().err
    assert not kfp.runs
    assert pipeline(*command, "--project", "mine") == 0
    (run,) = kfp.runs.values()
    assert run["runtime_config"]["parameters"]["overrides"] == ['project="mine"']


def test_no_cluster_is_named(kfp: Kfp, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither file nor release nor environment."""
    assert pipeline("upload") == 2
    assert "--cluster-settings = None: no cluster is named" in capsys.readouterr().err


def test_settings_travel_as_text(kfp: Kfp) -> None:
    """Numbers of a configuration come back as they were: KFP makes an integer of a parameter that is 1.0."""
    assert submit("--set", "policy.learning_rate=1.0e-5") == 0
    (run,) = kfp.runs.values()
    assert json.loads(json.dumps(run["runtime_config"]["parameters"]["overrides"])) == ["policy.learning_rate=1.0e-5"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[", b"a: b: c", b"\x1b[2J", b"7", b"clusters: 7", None])
def test_a_kubeconfig_that_is_none_is_reported_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    """Whatever the file holds, and where it is not there."""
    if content is not None:
        (tmp_path / "config").write_bytes(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    assert pipeline("compile", "--release", "latentac", "--to", str(tmp_path / "a.yaml")) == 2
    assert "KUBECONFIG = " in capsys.readouterr().err

"""A step as a pipeline task, in a process of its own: what it leaves behind when it ends well and when it does not."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from latentac.runs.task import ERROR_FILE, EVENT_MARK, EVENTS
from latentac.system.calls import FOLDER
from latentac.system.lifetime import OWNERS
from tests.latentac.test_lifetime import gone, pid_in

MANIFEST = """
from latentac.store import Manifest
publish(Manifest('latentac/artifact/1', 'run-1/train', 'run-1', 'train', 'commit', 'hash', {created!r}, (), (), {{}}))
"""


def task(
    body: str, output: Path, name: str = "train", run: str = "run-1", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run `body` as a task of `run`."""
    clean = {key: value for key, value in os.environ.items() if key not in (EVENTS, OWNERS, FOLDER)}
    command = command_of(body, output, name, run)
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)


def command_of(body: str, output: Path, name: str, run: str = "run-1") -> list[str]:
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    source = (
        "import sys\nfrom latentac.system.errors import *\nfrom latentac.runs.task import pipeline_task\n"
        f"with pipeline_task({name!r}, {run!r}, sys.argv[1], sys.argv[2]) as publish:\n{indented}\n"
    )
    return [sys.executable, "-c", source, str(output), str(output / "manifest")]


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix(EVENT_MARK)) for line in text.splitlines() if line.startswith(EVENT_MARK)]


@pytest.mark.parametrize(("age_seconds", "reused"), [(-3600, False), (3600, True)], ids=["new", "old"])
def test_task_hands_on_the_manifest_and_says_whether_it_was_there(
    tmp_path: Path, age_seconds: int, reused: bool
) -> None:
    """The output artifact is the manifest as it lies in the store; an older one was published by an earlier start."""
    created = (datetime.now(UTC) + timedelta(seconds=-age_seconds)).isoformat(timespec="seconds")
    done = task(MANIFEST.format(created=created), tmp_path, **{EVENTS: "1"})

    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "manifest").read_text())["key"] == "run-1/train"
    assert events(done.stderr) == [
        {"event": "begin", "task": "train"},
        {"event": "end", "task": "train", "reused": reused},
    ]
    assert not (tmp_path / "run-1" / ERROR_FILE).exists()


@pytest.mark.parametrize("name", [ERROR_FILE, "reward-calls", "anything"])
def test_a_link_in_the_runs_folder_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    """Not even the message about it goes through a link, and no file of calls is made or removed behind one."""
    (tmp_path / "run-1").mkdir()
    (tmp_path / "outside").mkdir()
    target = tmp_path / "outside" / ("new" if name == ERROR_FILE else "")
    (tmp_path / "run-1" / name).symlink_to(target)
    failed = task("pass", tmp_path, "evaluate")
    assert failed.returncode == 6
    assert f"{name}: is a link to" in failed.stderr
    assert not any((tmp_path / "outside").iterdir())


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise TrainingError('iteration 3', 'diverged', 'Lower it.')", 7, "iteration 3: diverged. Lower it."),
        ("raise StoreUnavailable('s3://b', 'no answer', 'Try later.')", 75, "s3://b: no answer. Try later."),
        ("open('/dev/full', 'w').write('x' * 10**6)", 6, "disk: no space is left on the device."),
    ],
)
def test_expected_failure_is_one_message_and_the_documented_code(
    tmp_path: Path, body: str, code: int, message: str
) -> None:
    """No traceback; the same message on stderr for a person and in error.json for a driver."""
    failed = task(body, tmp_path)

    assert failed.returncode == code
    assert failed.stderr.startswith(f"train: {message}")
    assert len(failed.stderr.splitlines()) == 1
    left = json.loads((tmp_path / "run-1" / ERROR_FILE).read_text())
    assert (left["task"], left["exit_code"]) == ("train", code)
    assert left["message"].startswith(message)


@pytest.mark.parametrize("run", ["../x", "a/../../x", "", "store", "x" * 300])
@pytest.mark.parametrize("name", ["prepare", "train", "gate"])
def test_a_task_of_no_run_makes_nothing(tmp_path: Path, name: str, run: str) -> None:
    """The id is refused before there is a folder, a lock or a file of it; a driver is told, too."""
    (tmp_path / "output").mkdir()
    failed = task("raise SystemExit(0)", tmp_path / "output", name, run=run, **{EVENTS: "1"})
    assert failed.returncode == 2
    assert f"{name}: run = {run!r}: cannot be the id of a run" in failed.stderr
    assert events(failed.stderr) == [{"event": "fail", "task": name, "exit_code": 2}]
    assert [path.name for path in tmp_path.rglob("*")] == ["output"]


CALL = (
    "import os\nfrom latentac.system.calls import in_flight\nwith in_flight('fragile', ['a red circle'], 60.0):\n    "
)


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 11)"])
def test_what_ends_the_process_in_a_call_of_a_reward_is_reported_as_its_failure(tmp_path: Path, end: str) -> None:
    """By who waits for that process; an exit with code 0 is not a success."""
    failed = task(CALL + end, tmp_path, "evaluate")

    assert failed.returncode == 5
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("evaluate: reward fragile, prompt 'a red circle': the process that called it ")
    assert json.loads((tmp_path / "run-1" / ERROR_FILE).read_text())["exit_code"] == 5


def test_who_waits_for_a_task_ends_as_it_does(tmp_path: Path) -> None:
    """Well, with its manifest; or with the code and the message of its failure."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    done = task(MANIFEST.format(created=created), tmp_path, "evaluate")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "manifest").exists()
    failed = task("raise StoreError('s3://b', 'no', 'Wait.')", tmp_path, "evaluate")
    assert (failed.returncode, failed.stderr) == (3, "evaluate: s3://b: no. Wait.\n")


def test_of_two_failures_the_first_is_kept(tmp_path: Path) -> None:
    """What runs at the end of a failed run (finish) may fail of the same cause; a start of the run removes the file."""
    for reason in ("diverged", "again"):
        task(f"raise TrainingError('iteration 3', '{reason}', 'Lower it.')", tmp_path)

    assert "diverged" in json.loads((tmp_path / "run-1" / ERROR_FILE).read_text())["message"]


def test_failure_under_a_driver_is_left_to_the_driver_to_tell(tmp_path: Path) -> None:
    """One message, not two: with `LATENTAC_EVENTS` the task is silent about what error.json says."""
    failed = task("raise TrainingError('iteration 3', 'diverged', 'Lower it.')", tmp_path, **{EVENTS: "1"})

    assert [line for line in failed.stderr.splitlines() if not line.startswith(EVENT_MARK)] == []
    assert events(failed.stderr)[-1] == {"event": "fail", "task": "train", "exit_code": 7}


def test_failure_that_cannot_be_written_down_is_printed(tmp_path: Path) -> None:
    """Nothing is lost where even error.json finds no place."""
    (tmp_path / "file").touch()
    failed = task("pass", tmp_path / "file", **{EVENTS: "1"})

    assert failed.returncode == 1
    assert "train: " in failed.stderr


def test_bug_keeps_its_traceback(tmp_path: Path) -> None:
    """What nobody expected is exit code 1, with all there is to find it by."""
    failed = task("{}['missing']", tmp_path, **{EVENTS: "1"})

    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "KeyError: 'missing'" in json.loads((tmp_path / "run-1" / ERROR_FILE).read_text())["message"]


@pytest.mark.parametrize("name", ["prepare", "train"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_interrupt_is_quiet(tmp_path: Path, number: str, name: str) -> None:
    """Ctrl-C reaches every process of the terminal, and only the driver talks about it; a container is stopped by
    SIGTERM. Both in a step that calls rewards, which works in a child, and in another."""
    body = f"import os, signal, time; os.kill(os.getpid(), signal.{number}); time.sleep(20)"
    stopped = task(body, tmp_path, name)

    assert (stopped.returncode, stopped.stderr) == (130, "")
    assert not (tmp_path / "run-1" / ERROR_FILE).exists()


@pytest.mark.parametrize("name", ["prepare", "train"])
def test_a_step_dies_with_whoever_started_it(tmp_path: Path, name: str) -> None:
    """kill -9 of the driver leaves no writer behind. A step that calls rewards works in a child, which goes, too."""
    body = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    driver = f"import subprocess; subprocess.run({command_of(body, tmp_path / 'runs', name)!r})"
    with subprocess.Popen([sys.executable, "-c", driver]) as process:
        step = pid_in(tmp_path / "pid")
        process.kill()
        assert gone(step)


def test_leftovers_of_a_killed_task_are_removed(tmp_path: Path) -> None:
    """A hidden folder of ours is where a task prepares what it publishes; the next one starts with none. Other hidden
    folders stay."""
    folder = tmp_path / "run-1"
    for name in (".latentac-train-abc", "train", ".git"):
        (folder / name).mkdir(parents=True)

    task("pass", tmp_path)

    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [".git", "train"]


@pytest.mark.parametrize("owners", ["x", "1:", "-1", "1:2:3", "9" * 12, "1:" + "9" * 30])
def test_owners_that_are_no_processes_are_reported_by_their_variable(tmp_path: Path, owners: str) -> None:
    """And nothing is begun: nobody knows whose process this would be."""
    failed = task("raise AssertionError", tmp_path, **{OWNERS: owners})

    assert failed.returncode == 2
    assert f"train: {OWNERS} = '{owners}': is not a process" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("link", ["reward-calls", "error.json", "task.lock", "prepare"])
@pytest.mark.parametrize("name", ["prepare", "train"])
def test_a_run_folder_with_a_link_is_not_worked_in(tmp_path: Path, name: str, link: str) -> None:
    """Where a step is started by something else than our driver: nothing is written or deleted through the link, the
    file of the error neither."""
    output, outside = tmp_path / "runs", tmp_path / "outside"
    (output / "run-1").mkdir(parents=True)
    outside.mkdir()
    target = outside / "new" if link in ("error.json", "task.lock") else outside
    (output / "run-1" / link).symlink_to(target)
    failed = task("raise AssertionError", output, name)

    assert failed.returncode == 6, failed.stderr
    assert f"{name}: {output}/run-1/{link}: is a link to" in failed.stderr
    assert list(outside.iterdir()) == []
    assert [path.name for path in (output / "run-1").iterdir()] == [link]


def test_what_a_step_says_does_not_steer_the_terminal(tmp_path: Path) -> None:
    """Its message and its log alike: a container's output is read in a terminal, too."""
    evil = "a \\x1b[2J \\u202e"
    log = f"import logging; logging.getLogger('latentac').info('{evil}')\n"
    failed = task(f"{log}raise TrainingError('{evil}', 'diverged', 'Lower it.')", tmp_path)

    assert failed.returncode == 7
    assert failed.stderr.count(r"a \x1b[2J \u202e") == 2
    assert not {"\x1b", "\u202e"} & set(failed.stderr)

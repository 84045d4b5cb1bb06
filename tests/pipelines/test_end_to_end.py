"""`make run` from start to end on the smoke recipe: what it leaves, and that it survives being killed anywhere.

One run is left alone. Another, of the same configuration and seed, is killed at six places, a different process each
time, and resumed; it must end with the same weights.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from latentac.store import Manifest, Store, open_store
from latentac.system.steps import NAMES as STEPS
from latentac.worlds.builtin import builtin_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OPTIONS = ["--recipe", "shapes-unet-smoke", "--set", "train.num_iterations=8"]
PARTS = {
    "step": "kfp.dsl.executor_main",
    "agent": "torch.distributed.run",
    "worker": "latentac.runs.workers.supervisor",
}


@dataclass
class Driver:
    """A `python -m latentac.pipelines run` under way, its output in a file."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, ready: Callable[[], Any], seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, f"the driver ended:\n{self.text}"
            assert time.monotonic() < deadline, f"it did not come to that:\n{self.text}"
            time.sleep(0.05)

    def family(self) -> dict[str, list[int]]:
        """The pids of all processes below the driver, by part: shell, step, agent, worker; else `other`."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended while we looked
                continue
        family: dict[str, list[int]] = {}
        below = {self.process.pid}
        while below:
            below = {pid for pid, parent in parents.items() if parent in below}
            for pid in sorted(below):
                family.setdefault(part_of(pid), []).append(pid)
        return family


def part_of(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return "other"
    if command.startswith("sh -"):  # it has the step's whole command as an argument
        return "shell"
    return next((part for part, words in PARTS.items() if words in command), "other")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def start(output: Path, *options: str) -> Driver:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job is started deaf to it, and so its children
    log = output.parent / f"{time.time_ns()}.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "latentac.pipelines", "run", "--output", str(output), *options]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    return Driver(process, log)


def run_id(driver: Driver) -> str:
    driver.wait_for(lambda: driver.text.startswith("run ") and "\n" in driver.text, 60)
    return driver.text.split()[1].rstrip(",")


def weights(manifest: Manifest) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.files if file.path.endswith(".safetensors")}


def published(store: Store, run: str) -> dict[str, str]:
    """Digest of each step's manifest that is there; but for finish, which tells of the run as it was at each end."""
    steps = {key.rpartition("/")[2]: store.manifest(key).digest for key in store.keys(run)}
    return {step: digest for step, digest in steps.items() if step != "finish"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """A run that nobody disturbed: its id, its output folder, and what it printed."""
    output = tmp_path_factory.mktemp("reference") / "runs"
    driver = start(output, *OPTIONS)
    assert driver.process.wait(600) == 0, driver.text
    return run_id(driver), output, driver.text


def test_run_ends_by_telling_where_to_look(reference: tuple[str, Path, str]) -> None:
    """A line at each end of each step, the steps' seconds, and paths that are there."""
    run, output, text = reference
    for number, step in enumerate(STEPS, start=1):
        assert f"[{number}/8] {step}\n" in text
        assert re.search(rf"^\[{number}/8\] {step} done in [0-9.]+ s$", text, re.MULTILINE)
        assert re.search(rf"^  {step} +[0-9.]+ s$", text, re.MULTILINE)
    assert (output / run / "report.html").stat().st_size > 10_000
    for line in (f"report   {output / run / 'report.html'}", f"summary  {output / run / 'summary.json'}"):
        assert line in text
    (served,) = re.findall(r"^serve    (.*latentac serve .*)$", text, re.MULTILINE)
    assert shlex.split(served)[1:] == ["serve", "--run", run, "--output", str(output)]
    assert shutil.which(shlex.split(served)[0])
    assert re.search(
        rf"^curves   .*tensorboard --logdir {re.escape(str(output / run))}/tensorboard$", text, re.MULTILINE
    )
    assert "KFP" not in text
    assert "Traceback" not in text


def test_summary_has_every_number_of_the_issue(reference: tuple[str, Path, str]) -> None:
    """summary.json is what programs read: it has no gaps after a whole run."""
    run, output, _ = reference
    summary = json.loads((output / run / "summary.json").read_text())

    assert summary["recipe"] == "shapes-unet-smoke"
    assert summary["run"] == run
    assert all(summary["seconds"][step] > 0 for step in (*STEPS, "total"))
    for arm in ("base", "trained"):
        for reward in summary["evaluation"][arm].values():
            assert reward["low"] <= reward["mean"] <= reward["high"]
            assert reward["n"] > 0
    assert len(summary["critic"]["explained_variance"]) == 5
    assert {"method", "nfe", "reward", "mean", "low", "high"} <= set(summary["steering"][0])
    assert summary["gate"]["decision"] == "promote"
    assert summary["gate"]["reasons"]
    assert len(summary["serving"]["image_sha256"]) == 64


def test_nothing_is_left_of_a_run_but_its_folder(reference: tuple[str, Path, str]) -> None:
    """No process, no hidden working folder, no folder of kfp's in the way."""
    run, output, _ = reference

    assert list((output / run).glob(".*")) == []
    assert not (output / run / "error.json").exists()


def test_unchanged_files_are_links(reference: tuple[str, Path, str]) -> None:
    """What the trained model shares with its backbone occupies the disk once."""
    files = [path for path in reference[1].rglob("*") if path.is_file()]
    checkpoints = {path.lstat().st_ino for path in files if "checkpoints" in path.parts}
    sizes = {path.lstat().st_ino: path.lstat().st_size for path in files if path.lstat().st_nlink > 1}
    occupied = sum(size for inode, size in sizes.items() if inode not in checkpoints)
    assert occupied < 2.2 * sum(path.stat().st_size for path in builtin_pipeline("shapes-unet").rglob("*"))


def test_resume_of_a_finished_run_does_nothing_twice(reference: tuple[str, Path, str]) -> None:
    """Every step says so, and every manifest stays the one it was."""
    run, output, _ = reference
    store = open_store(f"file://{output}/store")
    before, report = published(store, run), store.manifest(f"{run}/finish")
    driver = start(output, "--resume", run)

    assert driver.process.wait(300) == 0, driver.text
    assert store.manifest(f"{run}/finish") == report
    assert len(re.findall(r"^\[\d/8\] \S+ done already$", driver.text, re.MULTILINE)) == len(STEPS)
    assert published(store, run) == before


@pytest.mark.parametrize(
    ("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)], ids=["a terminal", "a batch system"]
)
def test_ctrl_c_and_kill_stop_everything_and_say_how_to_go_on(
    tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    """Within five seconds nothing of the run is alive, be the driver alone sent the signal, or all of it."""
    driver = start(tmp_path / "runs", *OPTIONS)
    driver.wait_for(lambda: driver.family().get("worker"))
    family = [pid for pids in driver.family().values() for pid in pids]
    run = run_id(driver)

    send(driver.process.pid, number)

    assert driver.process.wait(5) == 130
    assert f"latentac run --resume {run} --output {tmp_path / 'runs'}\n" in driver.text
    assert "Traceback" not in driver.text
    time.sleep(1)
    assert [pid for pid in family if alive(pid)] == []


MOMENTS = [
    ("driver", "pretrain-value", 0),
    ("step", "train", 0),
    ("agent", "train", 1),
    ("driver", "train", 3),
    ("shell", "evaluate", 0),
    ("driver", "deploy", 0),
]
"""Who is killed, in which step, after which checkpoint."""


def test_run_that_was_killed_everywhere_ends_as_if_nothing_had_happened(
    reference: tuple[str, Path, str], tmp_path: Path
) -> None:
    """Driver, shell, step, agent: nothing survives a kill -9 of what it stands on, no finished step is run again, and
    the trained weights are those of the run that nobody disturbed, bitwise."""
    output = tmp_path / "runs"
    store = open_store(f"file://{output}/store")
    driver = start(output, *OPTIONS)
    run = run_id(driver)
    done: dict[str, str] = {}

    for part, step, iteration in MOMENTS:
        come_to(driver, step, iteration, output, run)
        family = driver.family()
        os.kill(driver.process.pid if part == "driver" else family[part][0], signal.SIGKILL)

        assert driver.process.wait(60) != 0
        time.sleep(2)
        assert [pid for pids in family.values() for pid in pids if alive(pid)] == [], f"survivors of the {part}"
        assert part == "driver" or f"latentac run --resume {run}" in driver.text
        assert done.items() <= published(store, run).items(), "a finished step was run again"
        done = published(store, run)
        driver = start(output, "--resume", run)

    assert driver.process.wait(600) == 0, driver.text
    assert done.items() <= published(store, run).items(), "a finished step was run again"
    undisturbed = open_store(f"file://{reference[1]}/store").manifest(f"{reference[0]}/train")
    assert weights(store.manifest(f"{run}/train")) == weights(undisturbed)
    assert json.loads((output / run / "summary.json").read_text())["gate"]["decision"] == "promote"


def come_to(driver: Driver, step: str, iteration: int, output: Path, run: str) -> None:
    """Wait until `step` has begun, in training until both workers live and checkpoint `iteration` is there."""
    driver.wait_for(lambda: f"] {step}\n" in driver.text)
    if step == "train":
        driver.wait_for(lambda: len(driver.family().get("worker", [])) == 4)
        driver.wait_for(lambda: last_checkpoint(output, run) >= iteration)


def last_checkpoint(output: Path, run: str) -> int:
    latest = output / "store" / "checkpoints" / run / "LATEST"
    return int(json.loads(latest.read_text())["key"].rpartition("/")[2]) if latest.exists() else 0


def test_lost_worker_is_replaced_without_anybody_noticing(reference: tuple[str, Path, str], tmp_path: Path) -> None:
    """kill -9 of one worker: the agent starts them again from the last checkpoint, and the result is the same."""
    output = tmp_path / "runs"
    driver = start(output, *OPTIONS)
    run = run_id(driver)
    come_to(driver, "train", 1, output, run)
    os.kill(driver.family()["worker"][-1], signal.SIGKILL)

    driver.wait_for(lambda: "] train done in" in driver.text)
    driver.process.terminate()  # the steps behind it need no worker
    assert driver.process.wait(60) == 130, driver.text
    undisturbed = open_store(f"file://{reference[1]}/store").manifest(f"{reference[0]}/train")
    assert weights(open_store(f"file://{output}/store").manifest(f"{run}/train")) == weights(undisturbed)

"""No process outlives the one that started it, and one process at a time works on a run: with real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from latentac.system.errors import ResourceError
from latentac.system.lifetime import OWNERS, run_lock

BOUND = "from latentac.system.lifetime import die_with_parent; die_with_parent()\n"
# What a platform without prctl and pidfd leaves: watching the parent's pid and the owners' from a thread.
POLLING = "import os, sys; sys.platform = 'other'; del os.pidfd_open\n"
TELL = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)\n"


class Start(Protocol):
    def __call__(self, source: str, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]": ...


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python process from its source; whatever is left of it is killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def run(source: str, *arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
        clean = {name: value for name, value in os.environ.items() if name != OWNERS}
        command = [sys.executable, "-c", source, *arguments]
        started.append(subprocess.Popen(command, env=clean | environment, stderr=subprocess.PIPE))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def pid_in(path: Path) -> int:
    """The pid that a process writes to `path` when it is ready."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError(f"nobody wrote {path}")


def gone(pid: int, within: float = 2.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("platform", ["", POLLING], ids=["kernel", "polling"])
def test_child_dies_with_its_parent(start: Start, tmp_path: Path, platform: str) -> None:
    """kill -9 of a process ends the child that bound itself to it, also where the kernel does not help."""
    child = platform + BOUND + TELL
    source = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])"
    parent = start(source, str(tmp_path / "pid"))
    pid = pid_in(tmp_path / "pid")

    parent.kill()

    assert gone(pid)


@pytest.mark.parametrize("platform", ["", POLLING], ids=["pidfd", "polling"])
@pytest.mark.parametrize("victim", ["owner", "between"])
def test_descendant_dies_with_its_owner_and_with_a_foreign_process_between(
    start: Start, tmp_path: Path, platform: str, victim: str
) -> None:
    """A shell between two of ours does not pass a death on; the descendant goes when either of them is killed."""
    child = platform + BOUND + TELL
    shell = 'echo $$ > $2; $0 -c "$1" $3; :'
    source = (
        "import subprocess, sys; from latentac.system.lifetime import own_descendants; own_descendants()\n"
        f"subprocess.run(['sh', '-c', {shell!r}, sys.executable, {child!r}, *sys.argv[1:]])"
    )
    owner = start(source, str(tmp_path / "shell"), str(tmp_path / "pid"))
    pid, between = pid_in(tmp_path / "pid"), pid_in(tmp_path / "shell")
    assert between not in (pid, owner.pid)

    os.kill(owner.pid if victim == "owner" else between, signal.SIGKILL)

    assert gone(pid)


@pytest.mark.parametrize("platform", ["", POLLING], ids=["pidfd", "polling"])
def test_owner_that_is_dead_already_or_only_shares_its_number_does_not_count(start: Start, platform: str) -> None:
    """A process whose owner ended before it looked ends at once; a reused pid is known by its start time."""
    ended = start("")
    ended.wait()
    for owner in (str(ended.pid), f"{os.getpid()}:1"):
        process = start(platform + BOUND, **{OWNERS: owner})
        assert process.wait(20) == -signal.SIGKILL

    assert start(platform + BOUND, **{OWNERS: str(os.getpid())}).wait(20) == 0


def test_module_that_is_not_ours_runs_under_the_rule(start: Start, tmp_path: Path) -> None:
    """`python -m latentac.system.lifetime MODULE` gives the module its own arguments and dies with its parent."""
    (tmp_path / "foreign.py").write_text(TELL)
    command = "[sys.executable, '-m', 'latentac.system.lifetime', 'foreign', sys.argv[1]]"
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    parent = start(f"import subprocess, sys; subprocess.run({command})", str(tmp_path / "pid"), PYTHONPATH=path)
    pid = pid_in(tmp_path / "pid")

    parent.kill()

    assert gone(pid)


IN_CHILD = (
    "import os, signal, sys, time; from latentac.system.lifetime import go_on_in_child\n"
    "ended = go_on_in_child()\nif ended is not None: sys.exit(100 + ended[1])\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
)


def test_who_goes_on_in_a_child_passes_on_what_it_is_sent_and_learns_how_that_ended(
    start: Start, tmp_path: Path
) -> None:
    """An exit code, or minus the signal that killed the child."""
    parent = start(IN_CHILD + TELL, str(tmp_path / "pid"))
    assert pid_in(tmp_path / "pid") != parent.pid
    parent.terminate()
    assert parent.wait(20) == 107
    parent = start(IN_CHILD + TELL, str(tmp_path / "other"))
    os.kill(pid_in(tmp_path / "other"), signal.SIGKILL)
    assert parent.wait(20) == 100 - signal.SIGKILL


def test_who_ignores_its_children_learns_how_the_child_ended(start: Start, tmp_path: Path) -> None:
    """A shell's `trap "" CHLD` is handed down, and the system keeps no exit codes then."""
    deaf = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    parent = start(f"{deaf}os.execv(sys.executable, [sys.executable, '-c', {IN_CHILD + 'sys.exit(5)'!r}])")
    assert parent.wait(20) == 105


def test_the_child_that_goes_on_dies_with_its_parent(start: Start, tmp_path: Path) -> None:
    """Nobody would learn of its end."""
    parent = start(IN_CHILD + TELL, str(tmp_path / "pid"))
    pid = pid_in(tmp_path / "pid")
    parent.kill()
    assert gone(pid)


HOLD = "import sys, time; from pathlib import Path; from latentac.system.lifetime import run_lock\n" + (
    "with run_lock(Path(sys.argv[1])):\n    open(sys.argv[2], 'w').write(str(__import__('os').getpid()))\n"
    "    time.sleep(float(sys.argv[3]))"
)


def test_lock_that_is_held_is_refused_with_the_holder_named(start: Start, tmp_path: Path) -> None:
    """After the wait there is one message with the run, the holder's pid and what to do."""
    lock = tmp_path / "run-1" / "run.lock"
    holder = start(HOLD, str(lock), str(tmp_path / "ready"), "60")
    pid_in(tmp_path / "ready")

    message = f"run run-1: in use by pid {holder.pid}. .*kill {holder.pid}"
    with pytest.raises(ResourceError, match=message), run_lock(lock, wait_seconds=0.3):
        pass


@pytest.mark.parametrize("ends", ["killed", "by itself"])
def test_lock_comes_free_when_its_holder_ends(start: Start, tmp_path: Path, ends: str) -> None:
    """However the holder ends, one that waits gets the lock, without anything to clean up."""
    lock = tmp_path / "run-1" / "run.lock"
    holder = start(HOLD, str(lock), str(tmp_path / "ready"), "60" if ends == "killed" else "1")
    pid_in(tmp_path / "ready")
    if ends == "killed":
        holder.kill()

    with run_lock(lock, wait_seconds=20):
        assert lock.read_text() == str(os.getpid())


def test_a_lock_that_is_a_link_is_neither_held_nor_written_through(tmp_path: Path) -> None:
    """What it leads to, or would, stays as it is."""
    (tmp_path / "letter").write_text("mine")
    for name in ("letter", "nowhere"):
        lock = tmp_path / "run" / f"{name}.lock"
        lock.parent.mkdir(exist_ok=True)
        lock.symlink_to(tmp_path / name)
        with pytest.raises(ResourceError, match="is a link to"), run_lock(lock, wait_seconds=0):
            pass
    assert (tmp_path / "letter").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_bound_process_does_not_look_its_objects_over_at_its_end(start: Start, tmp_path: Path) -> None:
    """With all libraries loaded that takes more than a second. What is registered before it runs after it."""
    tell = f"import atexit, gc; atexit.register(lambda: open({str(tmp_path / 'frozen')!r}, 'w').write('1')"
    process = start(f"{tell} if gc.get_freeze_count() else None)\n{BOUND}")
    assert process.wait(60) == 0
    assert (tmp_path / "frozen").exists()


def test_a_process_knows_when_it_began(start: Start, tmp_path: Path) -> None:
    """By the clock that the others of this machine have, too; also some time afterwards."""
    before = time.monotonic()
    report = f"open({str(tmp_path / 'began')!r}, 'w').write(repr(began()))"
    process = start(f"import time; time.sleep(1)\nfrom latentac.system.lifetime import began; {report}")
    after = time.monotonic()
    assert process.wait(60) == 0
    assert before - 0.05 < float((tmp_path / "began").read_text()) < after + 0.05

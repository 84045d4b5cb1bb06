"""How long a process may live: never longer than the one that started it, and one writer a run.

A run is a tree of processes (driver, step, TorchX agent, workers, model server). `kill -9` of any of them must leave
no writer behind, or a resumed run would race with a survivor. Two things see to that:

- `die_with_parent()`, called first in every process of the tree: the kernel kills the process when its parent ends,
  and a watcher thread does so when any owner further up ends. The second is needed because foreign processes stand
  between ours (the shell of a pipeline step, torchrun), and they do not pass a death on.
- `run_lock(path)`: an advisory lock that the kernel drops with its holder, however that ends.

`python -m latentac.system.lifetime MODULE [ARGUMENT ...]` runs another module (torchrun) under the same rule.
"""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import gc
import logging
import os
import re
import runpy
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from latentac.system.errors import ConfigError, Problem, ResourceError

OWNERS = "LATENTAC_OWNERS"
"""Environment variable: `pid:start` (or `pid`) of each ancestor that must be alive, separated by commas."""

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5
_log = logging.getLogger(__name__)


def start_lean() -> None:
    """Collect garbage more rarely from here on, and not at the end. The libraries make millions of objects when they
    are imported, all to stay; looking them over again and again is a tenth of a step's start. At the end it would take
    more than a second, while the others of a training job wait."""
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)


def die_with_parent() -> None:
    """Bind this process's life to its parent's and to every owner's, and make it an owner of its own children.

    Call it early and from the main thread. On Linux the kernel delivers SIGKILL when the *thread* that started this
    process ends, so a parent starts its children from a thread that lives as long as it does.
    """
    parent = os.getppid()
    if not _ask_kernel():
        threading.Thread(target=_poll_parent, args=(parent,), name="latentac-parent", daemon=True).start()
    start_lean()
    if os.getppid() != parent:  # it ended before the kernel was asked
        _die()
    own_descendants()


def own_descendants() -> None:
    """Watch the owners named in the environment and join them: descendants die with this process.

    Alone, without `die_with_parent`, it is for the top of the tree, which may outlive the shell that started it. Raises
    ConfigError where the environment names what is not a process.
    """
    this = _identity(os.getpid())
    owners = [text for text in os.environ.get(OWNERS, "").split(",") if text and text != this]
    for text in owners:
        if not re.fullmatch(r"[0-9]{1,9}(:[0-9]{1,20})?", text, re.ASCII):
            remedy = "Unset this environment variable: only this program sets it, for its own processes."
            raise ConfigError([Problem(OWNERS, text, "is not a process in the form pid:start", remedy)])
    _watch(owners)
    os.environ[OWNERS] = ",".join([*owners, this])


def stop_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, by KeyboardInterrupt, so that everything is tidied up. Main thread
    only."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def keeping_signals() -> Iterator[None]:
    """The handlers of SIGINT and SIGTERM are afterwards what they were, whatever a library has put in their place."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def go_on_in_child() -> tuple[int, int] | None:
    """Go on in a child process, so that somebody is left to say how it ended. None in the child.

    The caller itself waits for the child and returns its pid and exit code, or minus the signal that killed it. It
    passes on what it is sent; a terminal sends its signals to both. Call it from the main thread, before there are
    others.
    """
    asked = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it keeps no child's exit code
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *asked})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        die_with_parent()
        return None
    while True:
        seen = signal.sigwaitinfo({signal.SIGCHLD, *asked})
        if seen.si_signo != signal.SIGCHLD:
            if seen.si_code <= 0:  # from a process, not from the kernel
                os.kill(child, seen.si_signo)
            continue
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return child, os.waitstatus_to_exitcode(status)


def began() -> float:
    """When this process began, by `time.monotonic`, to a hundredth of a second; now, where the kernel does not say."""
    fields = _stat(os.getpid())
    if not fields:
        return time.monotonic()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


@contextlib.contextmanager
def run_lock(path: Path, wait_seconds: float = 30.0) -> Iterator[None]:
    """Hold the exclusive lock on the file `path` (`<output>/<run>/...`), which keeps the holder's pid as text.

    Waits up to `wait_seconds` for a holder that is about to end. Raises ResourceError if it does not, or if the
    file system has no locks. The file stays: deleting it would let two holders in.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise _link(path) if error.errno == errno.ELOOP else error from None
    try:
        _acquire(descriptor, path, wait_seconds)
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            remedy = "Start a new run."
            raise ResourceError(f"run {path.parent.name}", "was deleted meanwhile", remedy)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def refuse_links(folder: Path) -> None:
    """Raises ResourceError for a run's folder that is a link, or holds a link, a pipe or a device.

    A run writes and deletes there by fixed names, and makes none of these: a link may lead anywhere, and a pipe would
    be waited for.
    """
    _refuse_link(folder)  # before what it leads to is listed
    for path in folder.iterdir() if folder.is_dir() else ():
        _refuse_link(path)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise _link(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ResourceError(str(path), "is neither a file nor a folder", "Remove it, or start a new run.")


def _link(path: Path) -> ResourceError:
    remedy = "Remove the link, or start a new run."
    return ResourceError(str(path), f"is a link to {os.readlink(path)!r}", remedy)


def lock_holder(path: Path) -> str:
    """The pid, as text, of the process on this machine that holds the lock `path`; "" where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # gone again with the descriptor
    except OSError:
        return os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
    finally:
        os.close(descriptor)
    return ""


def _acquire(descriptor: int, path: Path, wait_seconds: float) -> None:
    run, deadline, announced = f"run {path.parent.name}", time.monotonic() + wait_seconds, False
    while not _try_lock(descriptor, path):
        holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
        if time.monotonic() >= deadline:
            remedy = f"Wait until it ends, or stop it with `kill {holder}`."
            raise ResourceError(run, f"in use by pid {holder}", remedy)
        if not announced:
            _log.warning("%s is in use by pid %s: waiting up to %.0f s", run, holder, wait_seconds)
            announced = True
        time.sleep(0.1)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EINTR):
            return False
        remedy = "Choose an --output on a local disk."
        raise ResourceError(str(path), f"the file system refuses a lock ({error.strerror})", remedy) from error
    return True


def _ask_kernel() -> bool:
    """True if the kernel will send SIGKILL to this process when its parent ends (Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    except (AttributeError, OSError):
        return False


def _poll_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    _die()


def _watch(owners: list[str]) -> None:
    """Start a thread that ends this process when one of `owners` ends; end it now if one has ended already."""
    if any(not _alive(owner) for owner in owners):
        _die()
    if not owners:
        return
    try:
        descriptors = [os.pidfd_open(_pid(owner)) for owner in owners]
    except ProcessLookupError:
        _die()
    except (AttributeError, OSError):  # not Linux, or a kernel or sandbox without pidfd
        descriptors = []
    if any(not _alive(owner) for owner in owners):  # again: the number could have been given away in between
        _die()
    target, argument = (_await_exit, descriptors) if descriptors else (_poll_owners, owners)
    threading.Thread(target=target, args=(argument,), name="latentac-owners", daemon=True).start()


def _await_exit(descriptors: list[int]) -> None:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll()  # a pidfd turns readable when its process ends
    _die()


def _poll_owners(owners: list[str]) -> None:
    while all(_alive(owner) for owner in owners):
        time.sleep(_POLL_SECONDS)
    _die()


def children() -> list[tuple[int, str]]:
    """Number and command line of each process that this one has started (Linux; elsewhere none)."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(place.name))
        if fields and int(fields[1]) == os.getpid():
            with contextlib.suppress(OSError):
                command = (place / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append((int(place.name), command.decode(errors="replace")))
    return found


def _pid(owner: str) -> int:
    return int(owner.partition(":")[0])


def _identity(pid: int) -> str:
    """`pid:start`, the start in clock ticks since boot, so that a reused number is not taken for its predecessor."""
    fields = _stat(pid)
    return f"{pid}:{fields[19]}" if fields else str(pid)


def _alive(owner: str) -> bool:
    pid, _, start = owner.partition(":")
    fields = _stat(int(pid))
    if fields:
        return fields[0] not in "ZX" and (not start or fields[19] == start)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stat(pid: int) -> list[str]:
    """Fields 3 onwards of /proc/<pid>/stat (state first); empty where there is no such file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(137)


if __name__ == "__main__":
    die_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

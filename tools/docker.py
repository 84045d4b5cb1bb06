"""A docker daemon for building images and for running containers in tests.

    python -m tools.docker exec -- docker images     run a command with DOCKER_HOST set
    python -m tools.docker serve                     hold the daemon until Ctrl-C, print what to export

A daemon that answers already is used: the one of DOCKER_HOST, or the machine's. Where there is none, root starts one
from the installed `dockerd`. Its images stay in `${XDG_CACHE_HOME:-~/.cache}/latentac/docker`; it makes no bridge and
no packet filter rule, so containers get the host's network (`network_mode="host"`) or none.

Several processes may use that daemon at once. Each holds a shared lock; a keeper waits for the exclusive one, which it
gets when the last user is gone, however that ended, and then takes daemon, mounts and cgroups away.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import docker
from docker.errors import DockerException

from tools.golang import Unavailable

ROOT = Path(__file__).parents[1]
MACHINES_OWN = "unix:///var/run/docker.sock"
START_SECONDS = 60.0
CGROUPS = Path("/sys/fs/cgroup")
PARENT = "latentac-docker"


@dataclass(frozen=True)
class Docker:
    """A daemon that answers. host: for DOCKER_HOST, such as unix:///path."""

    host: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process that uses this daemon must have in its environment."""
        return {"DOCKER_HOST": self.host}

    def client(self) -> docker.DockerClient:
        return docker.DockerClient(self.host, timeout=600)

    def image(self, name: str) -> str:
        """The id of a local image. Raises Unavailable, saying how to build it."""
        with contextlib.closing(self.client()) as client:
            try:
                return str(client.images.get(name).id)
            except DockerException:
                raise Unavailable(f"there is no image {name} here: `make images` builds it") from None


@contextlib.contextmanager
def daemon() -> Iterator[Docker]:
    """A daemon for as long as the context lasts: one that answers, else our own. Raises Unavailable."""
    named = os.environ.get("DOCKER_HOST")
    if named:
        if not answers(named):
            raise Unavailable(f"no docker daemon answers at DOCKER_HOST = {named}. Correct or unset it.")
        yield Docker(named)
    elif answers(MACHINES_OWN):
        yield Docker(MACHINES_OWN)
    else:
        with _own() as own:
            yield own


def answers(host: str) -> bool:
    """True if a docker daemon is behind `host` within seconds."""
    try:
        with contextlib.closing(docker.DockerClient(host, timeout=5)) as client:
            return bool(client.ping())
    except DockerException:
        return False


def data_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentac" / "docker"


def _state_folder() -> Path:
    """Sockets and process files: a short path, for a socket's name has at most 107 characters."""
    return Path("/run") / f"{PARENT}-{hashlib.sha256(bytes(data_folder())).hexdigest()[:8]}"


@contextlib.contextmanager
def _own() -> Iterator[Docker]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        raise Unavailable(
            "no docker daemon answers, and one can be started only by root with dockerd installed "
            "(Debian: docker.io). Start docker, or set DOCKER_HOST."
        )
    data_folder().mkdir(parents=True, exist_ok=True)
    host = f"unix://{_state_folder() / 'docker.sock'}"
    with _opened("users") as users:
        fcntl.flock(users, fcntl.LOCK_SH)  # waits while a keeper takes the last daemon away
        with _opened("start") as start:
            fcntl.flock(start, fcntl.LOCK_EX)
            if not answers(host):
                _start_keeper(host)
        yield Docker(host)


def _opened(name: str) -> IO[bytes]:
    return (data_folder().parent / f"docker.{name}.lock").open("ab")


def _start_keeper(host: str) -> None:
    """Starts a process that outlives this one where others still use the daemon. Raises Unavailable."""
    log = data_folder().parent / "docker.log"
    with log.open("wb") as sink:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tools.docker", "keep"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and keeper.poll() is None:
        if answers(host):
            return
        time.sleep(0.1)
    if keeper.poll() is None:
        keeper.terminate()
        keeper.wait()
    raise Unavailable(f"dockerd did not come up; its log is {log}:\n{log.read_text(errors='replace')[-2000:]}")


def _keep() -> None:
    """The keeper: runs dockerd until nobody holds the users' lock, or until it is told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    state = _state_folder()
    state.mkdir(mode=0o700, exist_ok=True)
    command = ["dockerd", f"--host=unix://{state / 'docker.sock'}", f"--pidfile={state / 'docker.pid'}"]
    command += [f"--data-root={data_folder()}", f"--exec-root={state / 'exec'}", "--storage-driver=overlay2"]
    command += ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]
    command += ["--userland-proxy=false", "--log-level=warn", f"--cgroup-parent=/{PARENT}"]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        with _opened("users") as users:
            while server.poll() is None:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(server, state)  # with the lock held: who comes now waits, then starts a new one
                    return
                time.sleep(0.2)
    finally:
        _remove(server, state)


def _remove(server: subprocess.Popen[bytes], state: Path) -> None:
    """Ends the daemon, which stops its containers first, and takes away what it leaves behind."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in reversed(mounts):
        if Path(mount).is_relative_to(state) or Path(mount).is_relative_to(data_folder()):
            subprocess.run(["umount", "--lazy", mount], check=False)
    shutil.rmtree(state, ignore_errors=True)
    for folder in (*CGROUPS.glob(f"*/{PARENT}"), *CGROUPS.glob(PARENT)):
        for inner in sorted((folder, *folder.rglob("*/")), reverse=True):
            with contextlib.suppress(OSError):
                inner.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.docker", description="a docker daemon for images and tests")
    commands = parser.add_subparsers(dest="what", required=True)
    execute = commands.add_parser("exec", help="run a command with DOCKER_HOST set")
    execute.add_argument("command", nargs=argparse.REMAINDER)
    commands.add_parser("serve", help="hold the daemon until Ctrl-C")
    commands.add_parser("keep")
    options = parser.parse_args()
    if options.what == "keep":
        _keep()
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with daemon() as found:
            if options.what == "exec":
                command = options.command[1:] if options.command[:1] == ["--"] else options.command
                sys.exit(subprocess.run(command, env={**os.environ, **found.environment}).returncode)
            print(f"export DOCKER_HOST={found.host}", flush=True)
            signal.pause()
    except Unavailable as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

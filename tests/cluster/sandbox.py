"""Namespaces that a node lives in: its processes, mounts, network devices and iptables rules are its own.

One `unshare` holds them all. When its first process ends, by us or because the tests were killed, the kernel ends
every process in there, unmounts what they mounted and drops their devices and rules. What is left to remove by hand
are the control groups. The machine and the node see each other over one link of two addresses.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster.processes import Program
from tools.golang import Unavailable

_PLACES = 8

# Private copies of what node programs write to fixed places; the two folders stay reachable if they lie below them.
# The kubelet sets a few kernel settings, which no namespace keeps from the machine: it finds them set as it wants.
_FIRST_PROCESS = """
set -e
mount --make-rshared /
mount -t tmpfs tmpfs /run
number=0
for folder in "$@"; do
    number=$((number + 1)); mkdir -p /run/keep/$number; mount --rbind "$folder" /run/keep/$number
done
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /var/log
number=0
for folder in "$@"; do
    number=$((number + 1)); mkdir -p "$folder"; mount --rbind /run/keep/$number "$folder"
done
mkdir -p /var/lib/kubelet /var/log/pods
mkdir -p "$1/kubelet" "$1/pod-logs"
mount --bind "$1/kubelet" /var/lib/kubelet
mount --bind "$1/pod-logs" /var/log/pods
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
        kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=/run/settings/${setting%=*}; mkdir -p "${file%/*}"; echo "${setting#*=}" > "$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done
echo ready
while :; do sleep 3600 & wait; done  # the shell reaps what is left to it
"""


class Sandbox:
    """The namespaces of one node. place: a number on this machine, free when it is taken, which the addresses carry.

    host: the machine's address as the node and its pods see it; address: the node's.
    """

    def __init__(self, folder: Path, keep: Path | None = None, place: int | None = None) -> None:
        self.folder, self.keep = folder, keep
        self._claim: socket.socket | None = None
        self.place = self._take_place() if place is None else place
        self.host, self.address = f"10.243.{self.place}.1", f"10.243.{self.place}.2"
        self.pods, self.services = f"10.244.{self.place}.0/24", f"10.96.{self.place}.0/24"
        self.link, self.cgroup = f"latentac{self.place}", f"latentac-node-{self.place}"
        self.pid = 0
        self._holder: Program | None = None

    def start(self) -> None:
        """Namespaces, mounts, the link with its routes, the control groups. Raises Unavailable."""
        remove_cgroups(self.cgroup)  # of one that was killed
        for parent in _hierarchies():
            (parent / self.cgroup).mkdir(exist_ok=True)
        folders = [str(folder) for folder in (self.folder, self.keep) if folder]
        command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = Program("sandbox", [*command, "bash", "-c", _FIRST_PROCESS, "sandbox", *folders], self.folder)
        self._holder.wait(lambda: "ready" in self._holder_log(), 10)
        parent_pid = self._holder.process.pid
        self.pid = int(Path(f"/proc/{parent_pid}/task/{parent_pid}/children").read_text().split()[0])
        _ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        _ip("address", "add", f"{self.host}/30", "dev", self.link)
        _ip("link", "set", self.link, "up")
        inside = f"""
            set -e
            ip link set lo up
            ip address add {self.address}/30 dev eth0
            ip link set eth0 up
            ip route add default via {self.host}
            echo 1 > /proc/sys/net/ipv4/ip_forward"""
        self.run("bash", "-c", inside)
        for network in (self.pods, self.services):
            _ip("route", "add", network, "via", self.address)

    def stop(self) -> None:
        """Everything in it is killed and gone when this returns."""
        if self._holder:
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)  # the kernel reaps it when all others in there are dead
            self._holder.process.wait() if self.pid else self._holder.stop()
            subprocess.run(["ip", "link", "delete", self.link], capture_output=True)
            self._holder, self.pid = None, 0
        remove_cgroups(self.cgroup)
        if self._claim:
            self._claim.close()
            self._claim = None

    def inside(self, *command: str | Path, processes: bool = True) -> list[str]:
        """The command line that runs `command` in here; processes: with the process numbers of in here."""
        spaces = ["--mount", "--net", *(["--pid"] if processes else [])]
        return ["nsenter", f"--target={self.pid}", *spaces, "--", *map(str, command)]

    def run(self, *command: str | Path) -> str:
        """stdout of a command in here. Raises Unavailable."""
        done = subprocess.run(self.inside(*command, processes=False), capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{' '.join(map(str, command))} in the node ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def kill(self, program: Program) -> None:
        """End a program that was started by `inside`: the process that we started only waits for it."""
        waiting = program.process.pid
        for child in Path(f"/proc/{waiting}/task/{waiting}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        program.process.wait()

    def _holder_log(self) -> str:
        return self._holder.tail() if self._holder else ""

    def _take_place(self) -> int:
        """An abstract socket is the claim: all processes of the machine see it, and it ends with its holder."""
        routes = _ip("route")
        for place in range(_PLACES):
            if any(f"{start}.{place}." in routes for start in ("10.243", "10.244", "10.96")):
                continue
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(f"\0latentac-node-{place}")
            except OSError:
                claim.close()
                continue
            self._claim = claim
            return place
        raise Unavailable(f"{_PLACES} nodes run on this machine, or its own networks take 10.243, 10.244 and 10.96")


def remove_cgroups(name: str) -> None:
    """The control groups `name` with all below them; they must hold no process any more."""
    deadline = time.monotonic() + 5
    for parent in _hierarchies():
        if not (parent / name).is_dir():
            continue
        folders = [Path(folder) for folder, _, _ in os.walk(parent / name, topdown=False)]
        for folder in folders:
            while True:
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:  # a process that was killed is still being cleared away
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)


def _hierarchies() -> Iterator[Path]:
    """Where control groups are made: one tree in version 2, one a controller in version 1, or both."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            yield Path(place)


def _ip(*arguments: str) -> str:
    command: Sequence[str] = ["ip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout

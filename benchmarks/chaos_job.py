"""A training job of the cluster as processes of this machine: a pod is a real torchrun agent with its own folder.

Command and environment are those of the cluster's job (`latentac.components.train.job`). So is what follows a loss:
an agent that is lost is started again with an empty folder (RestartPod), the loss of agent 0 starts all of them anew
(RestartJob), and the end of agent 0 is the end of the job (CompleteJob).
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torchx.specs import Role, macros

from latentac.components.cluster.settings import Cluster
from latentac.components.train.job import app
from latentac.runs import failures
from latentac.runs.workers.lease import renewed
from latentac.store import open_store
from latentac.system.errors import LatentacError, StoreError
from tools.minio import free_port

_TICK_SECONDS = 0.05
_FAILURES_SECONDS = 1.0
_RANK0 = "CHAOS_AGENT_0"
_STARTS = re.compile(
    r"training starts after iteration (\d+), with (\d+) worker\(s\): "
    r"imports ([\d.]+) s, meeting ([\d.]+) s, loading ([\d.]+) s"
)


class Stuck(Exception):
    """A wait has reached its bound."""


@dataclass(frozen=True)
class Start:
    """A start of the workers, as the leading one has logged it. told: when, by `time.monotonic`; iteration: that the
    checkpoint has; imports, meeting, loading: seconds."""

    told: float
    iteration: int
    workers: int
    imports: float
    meeting: float
    loading: float

    @property
    def began(self) -> float:
        """When the process of the leading worker was started."""
        return self.told - self.imports - self.meeting - self.loading


@dataclass(frozen=True)
class Finished:
    """An iteration whose checkpoint is written. at: when, by `time.monotonic`."""

    at: float
    iteration: int


class Agent:
    """One torchrun agent and its worker, the processes of a pod. index: of the replica; number: of the pod."""

    def __init__(self, index: int, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        self.index, self.folder, self.starts = index, folder, list[Start]()
        self._below: list[int] = []
        folder.mkdir(parents=True)
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def workers(self) -> list[int]:
        """Pids of supervisor and worker, if they run."""
        return [pid for pid in descendants(self.process.pid) if "latentac.runs.workers.supervisor" in _command(pid)]

    def terminate(self) -> None:
        """As the deletion of a pod does: the agent alone gets SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the agent, and to all below it."""
        self.ended()
        self.process.kill()
        self.process.wait(30)
        self.ended()

    def ended(self) -> bool:
        """Whether the agent has ended. Nothing in a pod outlives its first process."""
        if self.process.poll() is None:
            self._below = descendants(self.process.pid)
            return False
        for pid in self._below:
            if _command(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._below = []
        return True

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.folder.with_suffix(".log").open("a") as log:
            for line in self.process.stdout:
                now = time.monotonic()
                log.write(f"{now:.2f} {line}")
                log.flush()
                found = _STARTS.search(line)
                if found:
                    iteration, workers = int(found[1]), int(found[2])
                    imports, meeting, loading = (float(found[number]) for number in (3, 4, 5))
                    self.starts.append(Start(now, iteration, workers, imports, meeting, loading))


class Job:
    """The training job of `run` in the store at `url`. count: agents to begin with.

    starts, finished: what has happened so far, in order. failure: what ended the job before its end; restarts: how
    often it was started anew because agent 0 was lost.
    """

    def __init__(self, settings: Cluster, run: str, url: str, folder: Path, count: int) -> None:
        self.settings, self.run, self.url, self.folder = settings, run, url, folder
        self.attempt = uuid.uuid4().hex
        self.wanted = set(range(count))
        self.agents: dict[int, Agent] = {}
        self.finished: list[Finished] = []
        self.failure: LatentacError | None = None
        self.done, self.restarts = False, 0
        self._all: list[Agent] = []
        self._seen: set[tuple[Path, int]] = set()
        self._port, self._restarting_since = 0, 0.0
        self._begin()

    @property
    def starts(self) -> list[Start]:
        return sorted((start for agent in self._all for start in agent.starts), key=lambda start: start.told)

    @property
    def reached(self) -> int:
        """The last iteration that was finished."""
        return max((each.iteration for each in self.finished), default=0)

    def add(self) -> None:
        index = min(set(range(self.settings.train.max_replicas)) - self.wanted)
        self.wanted.add(index)
        self._start(index)

    def remove(self, index: int) -> None:
        """The agent gets SIGTERM, and does not come back."""
        self.wanted.discard(index)
        self.agents[index].terminate()

    def stop(self) -> None:
        """As a launching step does that has learnt of a failure."""
        for agent in self.agents.values():
            agent.terminate()
        self.wait(lambda: not self.agents, self.settings.train.grace_seconds + 60, "the end of the agents")

    def wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Until `ready`, while lost agents are replaced. Raises Stuck with what was waited for."""
        ends_at = time.monotonic() + seconds
        while True:
            self._tick()
            if ready():
                return
            if time.monotonic() > ends_at:
                state = f"agents {sorted(self.agents)} of {sorted(self.wanted)}, iteration {self.reached}"
                raise Stuck(f"{what}: not within {seconds:.0f} s ({state}); the logs are in {self.folder}")
            time.sleep(_TICK_SECONDS)

    def pause(self, seconds: float) -> None:
        ends_at = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() >= ends_at, seconds + 60, "a pause")

    @contextlib.contextmanager
    def owned(self) -> "Iterator[Job]":
        """With a launching step, which renews the lease and learns why the job ended. Afterwards no process is left."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        watcher.start()
        try:
            with renewed(open_store(self.url), self.run, self.attempt, self.settings.train.lease_seconds):
                yield self
        finally:
            ended.set()
            for agent in self.agents.values():
                agent.kill()

    def _watch(self, ended: threading.Event) -> None:
        store = open_store(self.url)
        while not ended.wait(_FAILURES_SECONDS):
            with contextlib.suppress(StoreError):  # it is one of the faults
                self.failure = self.failure or failures.read(store, self.run, self.attempt)

    def _begin(self) -> None:
        self._port, self._restarting_since = free_port(), 0.0
        for index in sorted(self.wanted):
            self._start(index)

    def _start(self, index: int) -> None:
        folder = self.folder / f"pod-{len(self._all):03d}-{index}"
        self.agents[index] = Agent(index, folder, *self._command(index, folder))
        self._all.append(self.agents[index])

    def _command(self, index: int, folder: Path) -> tuple[list[str], dict[str, str]]:
        """Those of the cluster. Different are the folder, and what pods with addresses of their own do not need."""
        (role,) = app(self.settings, self.run, self.url, self.attempt).roles
        values = macros.Values(img_root="", app_id=self.run, replica_id=str(index), rank0_env=_RANK0)
        made: Role = values.apply(role)
        text = " ".join(made.args[1:]).replace(" /work", f" {folder}").replace("$${", "${")
        text = text.replace(":29500", f":{self._port}")
        # All of them have the address of agent 0, and would take themselves for it.
        text = text.replace("--rdzv_conf ", f"--rdzv_conf is_host={'false' if index else 'true'},")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {_RANK0: "127.0.0.1", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        own |= {"PATH": path, "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}
        return [made.entrypoint, made.args[0], text], {**os.environ, **made.env, **own}

    def _tick(self) -> None:
        self._look()
        for index, agent in list(self.agents.items()):
            if not agent.ended():
                continue
            code = agent.process.returncode
            del self.agents[index]
            if index == 0 and code == 0:
                self.done = True
            elif index == 0 and not self.done and not self._restarting_since:
                self._restarting_since = time.monotonic()
                self.restarts += 1
                for other in self.agents.values():
                    other.terminate()
            elif index in self.wanted and code != 0 and not (self.done or self.failure or self._restarting_since):
                self._start(index)
        if self._restarting_since and not self.failure:
            if not self.agents:
                self._begin()
            elif time.monotonic() > self._restarting_since + self.settings.train.grace_seconds:
                for agent in self.agents.values():
                    agent.kill()

    def _look(self) -> None:
        """Note the checkpoints that have appeared, with the time at which the kernel has named them."""
        for agent in self._all:
            with contextlib.suppress(FileNotFoundError):
                for path in (agent.folder / self.run / "checkpoints").iterdir():
                    found = path.stat()
                    if path.name.isdecimal() and (path, found.st_ino) not in self._seen:
                        self._seen.add((path, found.st_ino))
                        at = time.monotonic() - (time.time() - found.st_ctime)
                        self.finished.append(Finished(at, int(path.name)))


def descendants(pid: int) -> list[int]:
    """Of the process `pid`, parents before children."""
    found = []
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, (folder / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""

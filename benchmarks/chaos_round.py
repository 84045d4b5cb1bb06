"""Faults that meet a training job, one after the other, until its training is done."""

import contextlib
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos import Scene, recovered
from benchmarks.chaos_job import Job, Start, Stuck
from latentac.components.cluster import settings as cluster
from latentac.store import open_store
from latentac.system.errors import StoreError

FIXED, ELASTIC = (2, 2), (2, 4)
"""Numbers of agents, at least and at most."""

_ATTEMPTS = 20
"""Jobs for one run, of which each ends with a fault that is not passed over."""

_PATIENCE_SECONDS = 300.0
"""For each step of a recovery."""

_TRAINING_SECONDS = 900.0
"""For what is left of a run when no fault meets it any more."""


@dataclass
class Met:
    """What followed a fault. seconds: until the next iteration was finished, parts of it by name; lost: iterations that
    had been finished and were done again; alone: whether the job went on without anybody's help."""

    kind: str
    seconds: float
    lost: int
    alone: bool
    parts: dict[str, float] = field(default_factory=dict)


class Round:
    """A run that is prepared for training by `agents` (at least, at most). met: the faults that it has met."""

    def __init__(self, stage: Scene, url: str, run: str, folder: Path, agents: tuple[int, int]) -> None:
        self.stage, self.url, self.run, self.folder, self.agents = stage, url, run, folder, agents
        self.settings = _settings(stage, *agents)
        self.attempts = 0
        self.met: list[Met] = []

    def play(self, budget: int, choice: random.Random, bag: list[str]) -> None:
        """Train to the end, while `budget` faults come, or as many as there is time for. bag: what is left of the kinds
        of faults in random order; all of them come before one comes again, as far as the number of agents allows it.

        Raises Stuck where a wait has reached its bound.
        """
        low, high = self.agents
        resumed: tuple[str, float, int] | None = None
        count = choice.randint(low, high)
        while True:
            folder = self.folder / f"attempt-{self.attempts}"
            self.attempts += 1
            with Job(self.settings, self.run, self.url, folder, count).owned() as job:
                if resumed is not None:
                    kind, at, reached = resumed
                    self.met.append(self._recover(job, kind, at, reached, alone=False))
                    resumed = None
                self._train(job, budget, choice, bag)
                if job.done:
                    return
                job.stop()
                count = len(job.wanted)
                at = time.monotonic()
                kind, reached = self._fault, job.reached
                print(f"{kind}: training ended, and is resumed by hand", flush=True)
                if kind == "no fault" or self.attempts > _ATTEMPTS:
                    raise Stuck(f"{kind}: training ended {self.attempts} times; the logs are in {self.folder}")
                resumed = kind, at, reached

    def _train(self, job: Job, budget: int, choice: random.Random, bag: list[str]) -> None:
        """Until the job is done, or has ended before its end."""
        self._fault = "no fault"
        job.wait(lambda: _over(job) or _settled(job, 0.0), _PATIENCE_SECONDS, "the first iteration")
        while len(self.met) < budget and not _over(job):
            job.pause(choice.uniform(0.0, 3.0))
            job.wait(lambda: _over(job) or set(job.agents) == job.wanted, _PATIENCE_SECONDS, "all agents")
            if _over(job):
                break
            self._fault = _draw(job, bag, choice, self.kinds)
            _empty_trash(self.stage)
            at, reached = time.monotonic(), job.reached
            getattr(self, f"_{self._fault}")(job, choice)
            if job.failure is None:
                found = self._recover(job, self._fault, at, reached, alone=True)
                if job.failure is None:
                    self.met.append(found)
        job.wait(lambda: _over(job), _TRAINING_SECONDS, "the end of training")

    @property
    def kinds(self) -> list[str]:
        found = ["worker_killed", "worker_terminated", "agent_killed", "agent_terminated", "agent_0_killed"]
        found += ["agent_0_terminated", "store_killed", *(["disk_full"] if self.stage.disk else [])]
        return found + (["agent_added", "agent_removed"] if self.agents == ELASTIC else [])

    def _worker_killed(self, job: Job, choice: random.Random) -> None:
        _signal(job, choice, signal.SIGKILL)

    def _worker_terminated(self, job: Job, choice: random.Random) -> None:
        _signal(job, choice, signal.SIGTERM)

    def _agent_killed(self, job: Job, choice: random.Random) -> None:
        job.agents[choice.choice(sorted(set(job.agents) - {0}))].kill()

    def _agent_terminated(self, job: Job, choice: random.Random) -> None:
        job.agents[choice.choice(sorted(set(job.agents) - {0}))].terminate()

    def _agent_0_killed(self, job: Job, choice: random.Random) -> None:
        job.agents[0].kill()

    def _agent_0_terminated(self, job: Job, choice: random.Random) -> None:
        job.agents[0].terminate()

    def _agent_added(self, job: Job, choice: random.Random) -> None:
        job.add()

    def _agent_removed(self, job: Job, choice: random.Random) -> None:
        job.remove(choice.choice(sorted(job.wanted - {0})))

    def _store_killed(self, job: Job, choice: random.Random) -> None:
        with self.stage.kill():
            job.pause(choice.uniform(1.0, 8.0))

    def _disk_full(self, job: Job, choice: random.Random) -> None:
        """The first upload without room ends the workers. If that can be reported, it ends the job, too."""
        seconds, since = choice.uniform(2.0, 15.0), time.monotonic()
        with self.stage.full():
            job.wait(lambda: _over(job) or time.monotonic() > since + seconds, seconds + 60, "a pause")
        recovered(lambda: open_store(self.url).probe())

    def _recover(self, job: Job, kind: str, at: float, reached: int, *, alone: bool) -> Met:
        """Wait for the next iteration, and then until all agents train. at: time of the fault; reached: the last
        iteration that was finished before it."""
        restarts, ended = kind not in ("store_killed", "disk_full"), time.monotonic()
        job.wait(
            lambda: _over(job) or _next(job, at, restarts) is not None, _PATIENCE_SECONDS, f"an iteration after {kind}"
        )
        job.wait(
            lambda: _over(job) or _settled(job, ended), _PATIENCE_SECONDS, f"all agents and the store after {kind}"
        )
        starts = [start for start in job.starts if start.told > at]
        found = _next(job, at, bool(starts))
        seconds = (found[1] if found else time.monotonic()) - at
        lost = max((reached - start.iteration for start in starts), default=0)
        met = Met(kind, seconds, max(0, lost), alone)
        if found and found[0] is not None:
            start, end = found[0], found[1]
            met.parts = {"agents": start.began - at, "imports": start.imports, "meeting": start.meeting}
            met.parts |= {"loading": start.loading, "iteration": end - start.told}
        text = ", ".join(f"{name} {value:.1f}" for name, value in met.parts.items())
        print(f"{kind}: {met.seconds:.1f} s ({text}), {met.lost} lost, {len(job.agents)} agents", flush=True)
        return met


def _settings(stage: Scene, low: int, high: int) -> cluster.Cluster:
    return cluster.resolve(
        {
            "release": "latentac",
            "namespace": "here",
            "images": {"pipeline": "none", "train": "none", "serve": "none"},
            "store": {
                "url": f"s3://{stage.server.bucket}",
                "endpoint": os.environ["LATENTAC_S3_ENDPOINT"],
                "secret": "none",
            },
            "steps": {"namespace": "here", "service_account": "none"},
            "train": {"service_account": "none", "min_replicas": low, "max_replicas": high},
            "deploy": {"runtime": "none", "service_account": "none"},
        },
        "the settings of this program",
    )


def _empty_trash(stage: Scene) -> None:
    """What MinIO has deleted keeps its room for five minutes, and the disk is small."""
    for path in (stage.server.folder / ".minio.sys" / "tmp" / ".trash").glob("*"):
        shutil.rmtree(path, ignore_errors=True)


def _over(job: Job) -> bool:
    return job.done or job.failure is not None


def _next(job: Job, at: float, restarts: bool) -> tuple[Start | None, float] | None:
    """When the first iteration was finished after `at`, and the start of the workers that made it. restarts: the fault
    ends workers, and an iteration counts only when they were started again."""
    starts = [start for start in job.starts if start.told > at]
    if restarts and not starts:
        return None
    since = starts[0].told if restarts else at
    end = next((each.at for each in job.finished if each.at > since), None)
    if end is None:
        return None
    return ([start for start in starts if start.told < end][-1] if restarts else None), end


def _settled(job: Job, at: float) -> bool:
    """Whether all agents train, and the store has a checkpoint from after that, and from after `at`."""
    starts = job.starts
    if not starts or len(job.agents) != len(job.wanted) or starts[-1].workers != len(job.agents):
        return False
    since = max(at, starts[-1].told)
    first = next((each.iteration for each in job.finished if each.at > since), None)
    if first is None:
        return False
    with contextlib.suppress(StoreError):  # there is no checkpoint yet, or a fault is not over
        return int(open_store(job.url).read_json(f"checkpoints/{job.run}/LATEST")["key"].rpartition("/")[2]) >= first
    return False


def _draw(job: Job, bag: list[str], choice: random.Random, kinds: list[str]) -> str:
    """The next fault of the bag that this job can meet."""
    train = job.settings.train
    impossible = {"agent_added"} if len(job.wanted) == train.max_replicas else set()
    impossible |= {"agent_removed"} if len(job.wanted) == train.min_replicas else set()
    while True:
        possible = [kind for kind in bag if kind in kinds and kind not in impossible]
        if possible:
            bag.remove(possible[0])
            return possible[0]
        fresh = list(kinds)
        choice.shuffle(fresh)
        bag += fresh


def _signal(job: Job, choice: random.Random, number: signal.Signals) -> None:
    """To the supervisor or to the worker itself. Nothing where the training ends meanwhile."""
    agent = job.agents[choice.choice(sorted(job.agents))]
    job.wait(lambda: _over(job) or bool(agent.workers), 60, "a worker to send a signal to")
    with contextlib.suppress(IndexError, ProcessLookupError):
        os.kill(choice.choice(agent.workers), number)

"""Faults of a training job, in numbers: how long until it trains again, what is lost, and is the result the same?

    python -m benchmarks.training_chaos [--faults 50] [--seed 0]

Two to four torchrun agents on loopback, with the command of the cluster's job, and a real MinIO on a small disk. Runs
of a tiny recipe meet fault after fault, at random, until they are done. In every second run the number of workers is
fixed: its weights have to be bitwise those of a run without faults. A fault comes when the job has recovered from the
one before: all agents train, and the store has a checkpoint from after the fault.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.chaos import Scene, recovered, scene
from benchmarks.chaos_job import Job, Start, Stuck
from benchmarks.plan import FULL, require_clean_tree
from latentac.components.cluster import settings as cluster
from latentac.runs.preparation.prepare import environment
from latentac.runs.steps import prepare, pretrain_value
from latentac.store import open_store
from latentac.system.errors import ArtifactNotFound, StoreError
from latentac.system.lifetime import stop_on_sigterm

ITERATIONS = 40
"""Of a run."""

SETTINGS = (
    "kernel.num_steps=2",
    "critic.body.width=32",
    "critic.body.num_queries=1",
    "pretrain={num_images: 8, num_held_out_images: 8, num_passes: 1, minibatch_states: 8}",
    f"train.num_iterations={ITERATIONS}",
    # A multiple of what 2, 3, and 4 workers do in blocks of 2.
    "train={images_per_iteration: 24, block_images: 2, updates_per_iteration: 2, checkpoint_every: 1}",
    "policy.learning_rate=1e-6",  # in many iterations of so few images a larger one diverges
    "backbone.device=cpu",
    "rewards=[{use: jpeg_compressibility}]",
    "gate.reward=jpeg_compressibility",
)
FIXED, ELASTIC = (2, 2), (2, 4)
"""Numbers of agents."""

TOLERANCE = 0.01
"""Of a run whose number of workers changed: distance of its weights from those of the run without faults, divided by
the distance that training moved them."""

RECOVERY_SECONDS = 30.0
"""From the kill of a worker to the next finished iteration, on two cores."""

DISK_MIB = 1024
"""Of the store. MinIO refuses writes well before the last byte is used."""

_ATTEMPTS = 20
"""Jobs for one run, of which each ends with a fault that is not passed over."""

_PATIENCE_SECONDS = 300.0
"""For each step of a recovery."""


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
    """A run of training from its start to its end. Faults come until it is done, or until `budget` of them have met it.

    kinds: what is left in the bag from which faults are drawn; it is filled again when it is empty.
    """

    def __init__(self, stage: Scene, url: str, run: str, folder: Path, agents: tuple[int, int]) -> None:
        self.stage, self.url, self.run, self.folder, self.agents = stage, url, run, folder, agents
        self.settings = _settings(stage, *agents)
        self.attempts = 0
        self.met: list[Met] = []

    def play(self, budget: int, choice: random.Random, bag: list[str]) -> None:
        """Raises Stuck."""
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
                print(f"{kind}: training ended, and is resumed by hand: {job.failure}", flush=True)
                if kind == "no fault" or self.attempts > _ATTEMPTS:
                    raise Stuck(f"{kind}: training ended {self.attempts} times; the logs are in {self.folder}")
                resumed = kind, at, reached
            recovered(lambda: open_store(self.url).probe())

    def _train(self, job: Job, budget: int, choice: random.Random, bag: list[str]) -> None:
        """Until the job is done, or has ended before its end."""
        self._fault = "no fault"
        job.wait(lambda: _over(job) or _settled(job, 0.0), _PATIENCE_SECONDS, "the first iteration")
        while len(self.met) < budget and not _over(job):
            job.pause(choice.uniform(0.0, 3.0))
            if _over(job):
                break
            self._fault = _draw(job, bag, choice, self.kinds)
            at, reached = time.monotonic(), job.reached
            getattr(self, f"_{self._fault}")(job, choice)
            if job.failure is None:
                found = self._recover(job, self._fault, at, reached, alone=True)
                if job.failure is None:
                    self.met.append(found)
        job.wait(lambda: _over(job), _PATIENCE_SECONDS + 10 * ITERATIONS, "the end of training")

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
        """Until training has ended: a store that has no room is not waited for."""
        with self.stage.full():
            job.wait(lambda: _over(job) or job.failure is not None, 120, "the end of training without room")

    def _recover(self, job: Job, kind: str, at: float, reached: int, *, alone: bool) -> Met:
        """Wait for the next iteration, and then until all agents train. at: time of the fault; reached: the last
        iteration that was finished before it."""
        restarts = kind != "store_killed"

        def again() -> bool:
            return _over(job) or _next(job, at, restarts) is not None

        job.wait(again, _PATIENCE_SECONDS, f"an iteration after {kind}")
        found = _next(job, at, restarts)
        seconds = (found[1] if found else time.monotonic()) - at
        job.wait(lambda: _over(job) or _settled(job, at), _PATIENCE_SECONDS, f"all agents and the store after {kind}")
        starts = [start for start in job.starts if start.told > at]
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


def _over(job: Job) -> bool:
    return job.done or job.failure is not None


def _next(job: Job, at: float, restarts: bool) -> tuple[Start | None, float] | None:
    """The first iteration that was finished after `at`, and where workers were started again, after that: its start,
    and when it was finished."""
    start = next((start for start in job.starts if start.told > at), None)
    if restarts and start is None:
        return None
    since = start.told if restarts and start is not None else at
    end = next((each.at for each in job.finished if each.at > since), None)
    return (start if restarts else None, end) if end is not None else None


def _settled(job: Job, at: float) -> bool:
    """Whether all agents train, and the store has a checkpoint from after that, and from after `at`."""
    starts = job.starts
    if not starts or len(job.agents) != len(job.wanted) or starts[-1].workers != len(job.agents):
        return False
    since = max(at, starts[-1].told)
    first = next((each.iteration for each in job.finished if each.at > since), None)
    if first is None:
        return False
    try:
        return int(open_store(job.url).read_json(f"checkpoints/{job.run}/LATEST")["key"].rpartition("/")[2]) >= first
    except (ArtifactNotFound, StoreError):
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
    """To the supervisor or to the worker itself."""
    agent = job.agents[choice.choice(sorted(job.agents))]
    job.wait(lambda: bool(agent.workers), 60, "a worker to send a signal to")
    os.kill(choice.choice(agent.workers), number)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance of two sets of weights that have the same names."""
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All of the safetensors files in `folder`, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": each for file in files for name, each in load_file(file).items()}


@dataclass
class Reference:
    """The weights that a run without faults has: before training, and after it."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]

    def distance(self, found: dict[str, torch.Tensor]) -> float:
        """In units of the distance that training moved the weights."""
        return distance(self.after, found) / distance(self.before, self.after)

    def largest(self, found: dict[str, torch.Tensor]) -> float:
        """The largest difference of a weight, divided by the largest weight of its tensor."""
        pairs = ((self.after[name].double(), found[name].double()) for name in self.after)
        return max(float((one - other).abs().max() / one.abs().max().clamp(min=1e-30)) for one, other in pairs)


def train(
    stage: Scene, name: str, folder: Path, agents: tuple[int, int], act: Callable[[Round], None]
) -> tuple[Round, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Prepare a run of its own, let `act` train it, and give its weights before and after. Then the store has nothing
    of it any more: its disk is small."""
    url, own = f"s3://{stage.server.bucket}/{name}", folder / name
    own.mkdir()
    prepare(name, url, str(own), "shapes-unet-smoke", overrides=list(SETTINGS))
    pretrain_value(name, url, str(own))
    played = Round(stage, url, name, own, agents)
    act(played)
    store = open_store(url)
    for step in ("prepare", "pretrain-value", "train"):
        shutil.rmtree(own / step, ignore_errors=True)
        store.fetch(f"{name}/{step}", own / step)
    after = {f"policy/{key}": each for key, each in weights(own / "train" / "policy").items()}
    before = {f"policy/{key}": each for key, each in weights(own / "prepare" / "backbone").items()}
    after |= {f"critic/{key}": each for key, each in weights(own / "train" / "critic").items()}
    before |= {f"critic/{key}": each for key, each in weights(own / "pretrain-value" / "critic").items()}
    store.remove(sorted(store.entries(), reverse=True))
    for path in own.glob("attempt-*/*/"):
        shutil.rmtree(path, ignore_errors=True)
    return played, before, after


def measure(faults: int, seed: int, folder: Path) -> dict[str, Any]:
    """Raises Stuck where a wait of the job has reached its bound."""
    choice, bags = random.Random(seed), {FIXED: list[str](), ELASTIC: list[str]()}
    met: list[Met] = []
    rounds: list[dict[str, Any]] = []
    os.environ["MINIO_API_DELETE_CLEANUP_INTERVAL"] = "5s"  # else what is deleted fills the small disk for minutes
    with scene(folder, DISK_MIB) as stage:
        _, before, after = train(stage, "unharmed", folder, FIXED, lambda each: each.play(0, choice, []))
        reference = Reference({name: before[name] for name in after}, after)
        while len(met) < faults:
            agents, left = (ELASTIC if len(rounds) % 2 else FIXED), faults - len(met)
            name = f"round-{len(rounds)}"
            print(f"{name}: {agents[0]} to {agents[1]} agents", flush=True)
            played, _, found = train(
                stage, name, folder, agents, lambda each, left=left, bag=bags[agents]: each.play(left, choice, bag)
            )
            met += played.met
            row = {"agents": list(agents), "faults": len(played.met), "distance": reference.distance(found)}
            rounds.append(row | {"largest_difference": reference.largest(found)})
            print(f"{name}: {rounds[-1]}", flush=True)
    return _record(met, rounds, seed)


def _record(met: list[Met], rounds: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    by_kind: dict[str, list[Met]] = defaultdict(list)
    for each in met:
        by_kind[each.kind].append(each)
    fixed = [each["largest_difference"] for each in rounds if each["agents"] == list(FIXED)]
    elastic = [each["distance"] for each in rounds if each["agents"] == list(ELASTIC)]
    wrong = sum(difference != 0 for difference in fixed) + sum(difference > TOLERANCE for difference in elastic)
    found = environment()
    return {
        "command": "make chaos",
        "commit": found["commit"],
        "machine": found["machine"],
        "seed": seed,
        "faults": len(met),
        "iterations": ITERATIONS,
        "tolerance": TOLERANCE,
        "wrong_results": wrong,
        "most_lost": max((each.lost for each in met), default=0),
        "helped": sum(not each.alone and each.kind != "disk_full" for each in met),
        "late": sum(each.kind == "worker_killed" and each.seconds > RECOVERY_SECONDS for each in met),
        "rounds": rounds,
        "kinds": {kind: _row(each) for kind, each in sorted(by_kind.items())},
    }


def _row(met: list[Met]) -> dict[str, Any]:
    seconds = [each.seconds for each in met]
    names = dict.fromkeys(name for each in met for name in each.parts)
    return {
        "faults": len(met),
        "most_lost": max(each.lost for each in met),
        "alone": sum(each.alone for each in met),
        "median_seconds": round(statistics.median(seconds), 2),
        "longest_seconds": round(max(seconds), 2),
        "median_parts": {
            name: round(statistics.median(each.parts[name] for each in met if name in each.parts), 2) for name in names
        },
    }


def table(found: dict[str, Any]) -> str:
    """Of the kinds of faults, one a line."""
    lines = ["fault               count  lost  alone  median s  longest s  parts of the median (s)"]
    for kind, row in found["kinds"].items():
        parts = ", ".join(f"{name} {value:.1f}" for name, value in row["median_parts"].items())
        lines.append(
            f"{kind:<18} {row['faults']:>6} {row['most_lost']:>5} {row['alone']:>6}"
            f" {row['median_seconds']:>9.1f} {row['longest_seconds']:>10.1f}  {parts}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FULL.results / "chaos" / "training.json")
    options = parser.parse_args(arguments)
    require_clean_tree(options.output)
    stop_on_sigterm()
    print(f"seed {options.seed}, {options.faults} faults", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="latentac-chaos-"))
    try:
        found = measure(options.faults, options.seed, folder)
    except Stuck as error:
        print(error, file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    print(f"wrong results: {found['wrong_results']}; most iterations lost by a fault: {found['most_lost']}")
    print(f"jobs that needed help: {found['helped']}; workers' kills above {RECOVERY_SECONDS:.0f} s: {found['late']}")
    failed = found["wrong_results"] or found["most_lost"] > 1 or found["helped"] or found["late"]
    if not failed:
        shutil.rmtree(folder)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

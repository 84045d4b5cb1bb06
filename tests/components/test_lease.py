"""A training job and the launching step that owns it: lost, replaced, cut off. The job's workers are real processes
under a real torchrun agent, and so is the launching step; the API server is a stand-in that runs jobs as processes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client

from latentac.components.cluster.api import Api
from latentac.components.train.volcano import abort
from latentac.runs import failures
from latentac.runs.workers import lease
from latentac.store import Patience, Store, open_store
from latentac.system.errors import LeaseExpired, StoreError
from tests.components.kubernetes_server import JobRunner, Kubernetes, kubernetes
from tests.components.test_volcano import settings_of
from tests.latentac.test_store import eventually
from tests.latentac.workers import RUN, prepared
from tools.minio import Server

SECONDS = 12
"""Of the lease in these tests. A cluster's is a minute at least."""

STEP = """\
import logging, sys
from latentac.components.cluster.api import connect
from latentac.components.train.volcano import Volcano
from latentac.runs.steps import train
from latentac.system.lifetime import stop_on_sigterm
from tests.components.test_volcano import settings_of
logging.basicConfig(level=logging.INFO, format="%(message)s")
stop_on_sigterm()
store, output, seconds, endpoint = sys.argv[1:]
settings = settings_of("here", max_replicas=1, processes=2, grace_seconds=60)
bound = settings.train.model_copy(update={"lease_seconds": int(seconds)})
place = settings.store.model_copy(update={"endpoint": endpoint, "ca_config_map": ""})
settings = settings.model_copy(update={"train": bound, "store": place})
print(train("some-run", store, output, launch=Volcano(settings, connect("here"), poll_seconds=0.2)).key)
"""


class Site:
    """A prepared run in a store, a cluster of processes, and launching steps."""

    def __init__(self, memory: Kubernetes, runner: JobRunner, folder: Path, url: str, server: Server | None) -> None:
        self.memory, self.runner, self.folder, self.url, self.server = memory, runner, folder, url, server
        self.store = open_store(url)
        self.steps: list[subprocess.Popen[bytes]] = []

    def start(self, seconds: int = SECONDS) -> "subprocess.Popen[bytes]":
        """A launching step in a process of its own, with a working folder of its own, as each pod has one."""
        output, endpoint = self.folder / f"step-{len(self.steps)}", self.server.endpoint if self.server else "http://x"
        command = [sys.executable, "-c", STEP, self.url, str(output), str(seconds), endpoint]
        environment = os.environ | {"KUBECONFIG": str(self.memory.kubeconfig(self.folder / "kubeconfig"))}
        with self.log(len(self.steps)).open("wb") as log:
            step = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.steps.append(step)
        return step

    def log(self, number: int) -> Path:
        return self.folder / f"step-{number}.log"

    @property
    def uid(self) -> str:
        """Of the only job."""
        (job,) = self.runner.jobs
        return str(job["metadata"]["uid"])

    @property
    def iteration(self) -> int:
        """Of the newest checkpoint; 0 before the first."""
        keys = self.store.keys(f"checkpoints/{RUN}")
        return int(keys[-1].rpartition("/")[2]) if keys else 0

    @property
    def token(self) -> str:
        """Of the lease as it was renewed last."""
        return str(self.store.read_json(f"leases/{RUN}.json")["token"])

    def trains(self, beyond: int = 0) -> None:
        """Wait for a checkpoint of an iteration after `beyond`."""
        eventually(lambda: self.iteration > beyond, 180)


@pytest.fixture(params=["folder", "minio"])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    server = None
    url = f"file://{tmp_path}/store"
    if request.param == "minio":
        server = request.getfixturevalue("minio_server")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{server.bucket}/{tmp_path.name}"
    monkeypatch.delenv("LATENTAC_CLUSTER", raising=False)
    prepared(tmp_path, "train.num_iterations=100000", store=url)
    (tmp_path / "pods").mkdir()
    with kubernetes() as memory, JobRunner(memory, "here", tmp_path / "pods") as runner:
        made = Site(memory, runner, tmp_path, url, server)
        yield made
        for step in made.steps:
            step.kill()
            step.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_whose_launching_step_is_killed_ends_by_itself(site: Site) -> None:
    """Within the lease and the iteration under way, with a checkpoint and the reason; before that, a job whose step
    renews the lease trains for several times as long. A later step starts a new job from that checkpoint."""
    step = site.start()
    site.trains()
    job, began, before = site.uid, time.monotonic(), site.iteration
    while time.monotonic() < began + 2.5 * SECONDS:
        assert step.poll() is None, site.log(0).read_text()
        assert job not in site.runner.ended, site.runner.log(job)
        time.sleep(0.2)
    assert site.iteration > before

    step.kill()
    lost = time.monotonic()
    eventually(lambda: failures.last(site.store, RUN) is not None, 3 * SECONDS)
    took = time.monotonic() - lost
    eventually(lambda: job in site.runner.ended, 120)  # the workers are started once more, and find the reason
    said = "no launching step has renewed its lease for 12 s, so the job ended by itself: the step `train` was"
    assert said in site.runner.log(job)
    assert SECONDS - 2 * lease.poll_seconds(SECONDS) < took < 2 * SECONDS, took
    assert site.runner.ended[job] == 0, "the job is not started again"
    error = failures.last(site.store, RUN)
    assert isinstance(error, LeaseExpired)
    assert error.exit_code == 7
    reached = site.iteration
    assert reached > before

    site.start()
    site.trains(reached)
    assert site.uid != job
    assert "is Completed: a new one replaces it" in site.log(1).read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("site", ["folder"], indirect=True)
def test_a_retry_of_the_launching_step_adopts_the_job_and_renews_its_lease(site: Site) -> None:
    """Whether the step before was killed or, as where a node is drained, asked to end; and the job does not notice."""
    seconds = 2 * SECONDS  # a step starts within them, also on a busy machine
    first = site.start(seconds)
    site.trains()
    job = site.uid
    first.terminate()
    assert first.wait(60) != 0
    token = site.token
    second = site.start(seconds)
    eventually(lambda: site.token != token, seconds)
    second.kill()
    site.start(seconds)
    began, before = time.monotonic(), site.iteration
    while time.monotonic() < began + 1.8 * seconds:
        assert job not in site.runner.ended, site.runner.log(job) + site.log(1).read_text() + site.log(2).read_text()
        time.sleep(0.2)
    assert site.uid == job
    assert site.iteration > before
    assert "submitted" not in site.log(1).read_text() + site.log(2).read_text()
    assert failures.last(site.store, RUN) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("site", ["folder"], indirect=True)
def test_a_step_that_finds_a_job_without_a_lease_replaces_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workers are about to end: the step waits for them, and continues from their checkpoint."""
    first = site.start(3600)
    site.trains()
    job = site.uid
    first.kill()
    attempt = site.runner.jobs[0]["metadata"]["annotations"]["latentac.io/attempt"]
    monkeypatch.setenv(failures.ATTEMPT, attempt)
    failures.report(site.store, RUN, LeaseExpired("training", "ended", "Resume it"), 0)

    site.start()
    eventually(lambda: bool(site.runner.jobs) and site.uid != job, 120)
    assert "has lost its lease, and ends: a new one replaces it" in site.log(1).read_text()
    site.trains(site.iteration)
    assert job in site.runner.ended


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("site", ["folder"], indirect=True)
def test_a_retry_of_a_run_whose_finish_has_stopped_the_job_continues_it(site: Site) -> None:
    """A node is drained: the step is asked to end, KFP calls that a failure, and `finish` stops the job. The step of
    the retry waits until the job has written its checkpoint and is gone, and starts another one from there."""
    first = site.start()
    site.trains()
    job = site.uid
    first.terminate()
    assert first.wait(60) != 0
    reached = site.iteration
    aborting = Api(client.Configuration(host=site.memory.url), "here")
    assert abort(settings_of("here"), RUN, aborting) == [site.runner.jobs[0]["metadata"]["name"]]

    site.start()
    eventually(lambda: bool(site.runner.jobs) and site.uid != job, 120)
    assert job in site.runner.ended, "both jobs run"
    assert site.iteration >= reached
    site.trains(site.iteration)
    assert failures.last(site.store, RUN) is None


# What a worker sees of it


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv(failures.ATTEMPT, "attempt-1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(lease.SECONDS, "1")
    return open_store(f"file://{tmp_path}/store")


def watch(store: Store, seconds: float) -> bool:
    """Whether the lease has expired, of a worker that watches it for so long."""
    asked: list[bool] = []
    with lease.watched(store, "r", lambda: asked.append(True)) as found:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not asked:
            time.sleep(0.02)
        if asked:
            with pytest.raises(LeaseExpired, match="no launching step has renewed its lease for 1 s"):
                found.check()
        else:
            found.check()
    return bool(asked)


def test_a_lease_that_is_renewed_does_not_expire(store: Store) -> None:
    """The renewals of another attempt do not count, nor those that have ended."""
    with lease.renewed(store, "r", "attempt-1", 1.0):
        assert not watch(store, 3.0)
    assert watch(store, 30.0)
    with lease.renewed(store, "r", "attempt-2", 1.0):
        assert watch(store, 30.0)


def test_only_the_leader_of_a_job_with_a_lease_watches_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody watches where the launching step renews none: on one machine, and where it is of an older version."""
    monkeypatch.setenv("RANK", "1")
    assert not watch(store, 2.0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv(lease.SECONDS)
    assert not watch(store, 2.0)


@pytest.mark.parametrize("left", [[], {}, {"attempt": "attempt-1"}, {"attempt": "attempt-1", "token": None}, 5, "x"])
def test_what_is_no_lease_is_no_renewal(store: Store, left: object) -> None:
    """Who may write to the store may write anything there."""
    store.write_json("leases/r.json", left)
    assert watch(store, 30.0)


def test_a_process_that_was_suspended_has_seen_nothing(store: Store) -> None:
    """A gap between two reads counts as two polls at most, however long it was."""
    store.write_json("leases/r.json", {"attempt": "attempt-1", "token": "a"})
    found = lease.Lease(store, "r", 2.0)
    assert found.age() == 0
    time.sleep(2.5)
    assert found.age() <= 2 * lease.poll_seconds(2.0)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_outage_of_the_store_does_not_end_the_job(
    minio_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    """Several times as long as the lease: nobody can renew it, and the workers cannot read it. Afterwards the step
    renews it again. A job whose step was lost during the outage ends then."""
    monkeypatch.setattr(lease, "open_store", lambda url: open_store(url, SHORT))
    server = Server(tmp_path / "data").start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    place = open_store(f"s3://{server.bucket}/x", SHORT)
    asked: list[bool] = []
    try:
        with lease.watched(place, "r", lambda: asked.append(True)):
            with lease.renewed(place, "r", "attempt-1", 1.0):
                time.sleep(1.5)
                server.kill()
                with pytest.raises(StoreError):
                    place.read_json("leases/r.json")
                time.sleep(5.0)
                server.start()
                time.sleep(3.0)
                assert not asked
                server.kill()
            time.sleep(3.0)
            assert not asked
            server.start()
            eventually(lambda: bool(asked), 30)
    finally:
        server.stop()


SHORT = Patience(retries=1, back_off_seconds=0.1, timeout_seconds=1.0, idle_seconds=1.0)

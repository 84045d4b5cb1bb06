"""Training on a cluster: the TorchX app as a Volcano job, submitted or adopted, followed to its end.

A step that is started again finds its job by its name and goes on following it; so SIGTERM of the step leaves the job
alone. What a cancelled run leaves, the pipeline's finish task stops with `abort`.

Rights, all in the namespace of the jobs: jobs.batch.volcano.sh create, get, list, delete; jobs/status get, update;
pods get, list; pods/log get; events list.
"""

import logging
import os
import time
import uuid
from collections.abc import Iterable
from typing import Any

from torchx.runner import get_runner

from latentac.components.cluster.api import EVENTS, PODS, VOLCANO_JOBS, Api, connect
from latentac.components.cluster.objects import RUN, label
from latentac.components.cluster.settings import Cluster
from latentac.components.train.job import (
    ATTEMPT,
    CONFIG,
    JOB_NAME,
    ROLE,
    app,
    check_replicas,
    handle,
    job_name,
    options,
    requests_of,
    shape,
)
from latentac.components.train.logs import Logs
from latentac.components.train.waiting import Waiting
from latentac.runs import failures
from latentac.runs.workers.lease import renewed
from latentac.runs.workspace import Workspace
from latentac.system.errors import (
    ClusterError,
    ClusterUnavailable,
    LeaseExpired,
    StoreError,
    StoreUnavailable,
    TrainingError,
)

LAST_WORDS = "train-last-words.txt"
"""In `<output>/<run>/`: the end of each pod's log, where the job failed. In the store: `failures/<run>.words.json`."""

_ENDED = frozenset({"Completed", "Failed", "Aborted", "Terminated"})
_ENDING = _ENDED | {"Aborting", "Terminating"}
_LAST_LINES_SECONDS = 5.0
_ROOM_SECONDS = 120.0
"""Beyond the grace of its pods, until a job that has ended makes room for the next."""

_TRIES = 6
_log = logging.getLogger("latentac.train")


class Volcano:
    """Launches `latentac.runs.steps.train` on the cluster of `settings`. poll_seconds: time between two polls."""

    def __init__(self, settings: Cluster, api: Api | None = None, poll_seconds: float = 2.0) -> None:
        self.settings, self._poll_seconds = settings, poll_seconds
        self._api = api or connect(settings.namespace)

    def __call__(self, space: Workspace) -> None:
        """Train `space` to its end, with the artifact in the store.

        Raises what a worker left, TrainingError with the pods' last words where the job failed, ClusterError where it
        gets no pods, ConfigError where the configuration does not fit the cluster's replicas.
        """
        check_replicas(self.settings.train, space.config)
        job = self._submit(space)
        with renewed(space.store, space.run, _attempt(job), self.settings.train.lease_seconds):
            self._follow(space, job)
        self._compare_world(space)

    def _where(self, name: str) -> str:
        return f"job {self.settings.namespace}/{name}"

    def _submit(self, space: Workspace) -> dict[str, Any]:
        """The run's job: the one at work if there is one, else a new one in place of one that has ended."""
        name = job_name(self.settings.namespace, space.run, space.config.hash)
        deadline = time.monotonic() + self.settings.train.grace_seconds + _ROOM_SECONDS
        while True:
            if self._create(space, name):
                _log.info("submitted %s to the queue %s", self._where(name), self.settings.train.queue)
            job = self._api.get(VOLCANO_JOBS, name)
            if job is None:  # it went between the two calls
                if time.monotonic() > deadline:
                    problem = "is gone again each time that it is submitted"
                    raise ClusterError(self._where(name), problem, "Look at what deletes it, and run again")
                time.sleep(self._poll_seconds)
                continue
            self._check_own(space, job)
            if _phase(job) not in _ENDING:
                if not self._expired(space, job):
                    return job
                _log.info("%s has lost its lease, and ends: a new one replaces it", self._where(name))
                _stop(self._api, self.settings, name)
                job = self._api.get(VOLCANO_JOBS, name) or job
            if _phase(job) in _ENDED:
                _log.info("%s is %s: a new one replaces it", self._where(name), _phase(job))
                self._api.delete(VOLCANO_JOBS, name)
            while self._pods(name) or self._same(name, job):  # its pods have their names until they are gone
                if time.monotonic() > deadline:
                    problem = f"is still {_phase(job) or 'there'} after its deletion"
                    raise ClusterError(self._where(name), problem, "Look at its pods, delete them and run again")
                time.sleep(self._poll_seconds)
                job = self._api.get(VOLCANO_JOBS, name) or job
                if _phase(job) in _ENDED and not job["metadata"].get("deletionTimestamp"):
                    self._api.delete(VOLCANO_JOBS, name)

    def _expired(self, space: Workspace, job: dict[str, Any]) -> bool:
        """Whether the workers of `job` end, because no launching step renewed their lease."""
        try:
            return isinstance(failures.read(space.store, space.run, _attempt(job)), LeaseExpired)
        except StoreUnavailable:
            return False  # whoever follows the job waits for the store

    def _same(self, name: str, job: dict[str, Any]) -> bool:
        now = self._api.get(VOLCANO_JOBS, name)
        return now is not None and now["metadata"]["uid"] == job["metadata"]["uid"]

    def _create(self, space: Workspace, name: str) -> bool:
        """Submit the app; False if there is a job of that name. What may pass is tried again: the name is the same."""
        attempt, owners = uuid.uuid4().hex, self._owners()
        with get_runner(client=self._api.client) as runner:
            definition = app(self.settings, space.run, space.store.url, attempt)
            info = runner.dryrun(definition, "kubernetes", options(self.settings))
            made = info.request.resource
            job = shape(made, self.settings, name, space.run, space.config.hash, attempt)
            if owners:
                job["metadata"]["ownerReferences"] = owners
            info.request.resource = job
            began = time.monotonic()
            for tried in range(1, _TRIES + 1):
                try:
                    with self._api.translated("POST", VOLCANO_JOBS.path(self.settings.namespace)):
                        runner.schedule(info)
                    return True
                except ValueError as error:
                    if getattr(error.__cause__, "status", 0) != 409:
                        raise
                    return False
                except ClusterUnavailable:
                    if tried == _TRIES or time.monotonic() + tried > began + self._api.bounds.retry_seconds:
                        raise
                    time.sleep(tried)
        raise AssertionError("unreachable")

    def _owners(self) -> list[dict[str, str]]:
        """The workflow that this step belongs to: with it the job goes. An owner cannot be in another namespace."""
        pod = os.environ.get("KFP_POD_NAME")
        if not pod or self.settings.steps.namespace != self.settings.namespace:
            return []
        metadata = (self._api.get(PODS, pod) or {"metadata": {}})["metadata"]
        fields = ("apiVersion", "kind", "name", "uid")
        owners = metadata.get("ownerReferences") or []
        return [{field: owner[field] for field in fields} for owner in owners if owner["kind"] == "Workflow"]

    def _check_own(self, space: Workspace, job: dict[str, Any]) -> None:
        notes = job["metadata"].get("annotations") or {}
        if (notes.get(RUN), notes.get(CONFIG)) != (space.run, space.config.hash):
            remedy = "Delete that job, or choose another run id"
            raise ClusterError(self._where(job["metadata"]["name"]), "exists and is not this run's", remedy)

    def _pods(self, name: str) -> list[dict[str, Any]]:
        return self._api.find(PODS, labels=f"{JOB_NAME}={name}")

    def _events(self, job: dict[str, Any], pods: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of the job, of its pod group, and of its pods: the scheduler tells in any of them what it lacks."""
        name, own = job["metadata"]["name"], job["metadata"]["uid"]
        found = self._api.find(EVENTS, fields=f"involvedObject.uid={own}")
        found += self._api.find(EVENTS, fields=f"involvedObject.name={name}-{own}")
        known = {pod["metadata"]["uid"] for pod in pods}
        if not known:
            return found
        of_pods = self._api.find(EVENTS, fields="involvedObject.kind=Pod")
        return found + [event for event in of_pods if event["involvedObject"].get("uid") in known]

    def _follow(self, space: Workspace, job: dict[str, Any]) -> None:
        """Until the job completed; its log lines become this step's. Raises as __call__ says."""
        train, name = self.settings.train, job["metadata"]["name"]
        leader = f"{name}-{ROLE}-0-0"
        logs = Logs(self._api, leader, _log.info)
        waiting = Waiting(leader, train.min_replicas, train.pending_seconds, requests_of(job))
        attempt = _attempt(job)
        answered = time.monotonic()
        try:
            while True:
                try:
                    phase, reason = self._look(name, logs, waiting)
                    failed = failures.read(space.store, space.run, attempt)
                    answered = time.monotonic()
                except (ClusterUnavailable, StoreUnavailable) as error:
                    if time.monotonic() - answered > train.pending_seconds:
                        raise
                    _log.warning("%s", error)
                    time.sleep(self._poll_seconds)
                    continue
                if failed is not None or reason is not None or phase in _ENDING:
                    break
                time.sleep(self._poll_seconds)
            if phase not in _ENDING:
                _stop(self._api, self.settings, name)
        finally:
            logs.close(_LAST_LINES_SECONDS)
        if phase == "Completed" and failed is None:
            return
        words = logs.last_words()
        self._keep(space, words)
        if failed is not None:
            raise failed
        if reason is not None:
            remedy = "Correct what it lacks, or train.pending_seconds in the chart's values, and resume the run"
            raise ClusterError(self._where(name), reason, remedy)
        lines = "\n".join(words) or "none"
        raise TrainingError(
            self._where(name),
            f"ended {phase}; the last log lines of its pods:\n{lines}\n",
            "Resume the run: it continues from its last checkpoint",
        )

    def _look(self, name: str, logs: Logs, waiting: Waiting) -> tuple[str, str | None]:
        """The job's phase, and the reason to give it up if there is one."""
        job = self._api.get(VOLCANO_JOBS, name)
        if job is None:
            remedy = "Resume the run: it continues from its last checkpoint"
            raise TrainingError(self._where(name), "was deleted while it was followed", remedy)
        pods = self._pods(name)
        logs.watch(pods)
        if _phase(job) in _ENDING:
            return _phase(job), None
        return _phase(job), waiting.over(pods, lambda: self._events(job, pods))

    def _keep(self, space: Workspace, words: Iterable[str]) -> None:
        lines = list(words)
        (space.folder / LAST_WORDS).write_text("".join(f"{line}\n" for line in lines))
        try:
            space.store.write_json(f"failures/{space.run}.words.json", lines)
        except StoreError as error:
            _log.warning("the last log lines of the pods are not in the store: %s", error)

    def _compare_world(self, space: Workspace) -> None:
        done, train = space.finished("train"), self.settings.train
        wanted = train.max_replicas * train.processes
        reached = done.metrics.get("max_world_size", wanted) if done else wanted
        if reached < wanted:
            _log.warning("at most %s workers trained, but %s were requested: see the job's pods", reached, wanted)


def abort(settings: Cluster, run: str, api: Api | None = None) -> list[str]:
    """Stop the run's jobs that are still active, and return their names; their pods get their grace to write a
    checkpoint. Raises ClusterError.

    The job stays, to be looked at, until the run's workflow is deleted or the run is resumed.
    """
    api = api or connect(settings.namespace)
    selector, stopped = f"{RUN}={label(run)},app.kubernetes.io/component=train", []
    for job in api.find(VOLCANO_JOBS, labels=selector):
        if job["metadata"].get("annotations", {}).get(RUN) == run and _phase(job) not in _ENDING:
            _stop(api, settings, job["metadata"]["name"])
            stopped.append(str(job["metadata"]["name"]))
    return stopped


def _stop(api: Api, settings: Cluster, name: str) -> None:
    """Cancel the job by TorchX, again where its controller wrote its own status over it."""
    path = VOLCANO_JOBS.path(settings.namespace, name, "status")
    with get_runner(client=api.client) as runner:
        for tried in range(1, _TRIES + 1):
            try:
                with api.translated("PUT", path):
                    runner.cancel(handle(settings, name))
            except ClusterUnavailable:
                if tried == _TRIES:
                    raise
            except ClusterError as error:
                if error.status == 404:
                    return
                if error.status != 409 or tried == _TRIES:
                    raise
            time.sleep(0.5 * tried)
            job = api.get(VOLCANO_JOBS, name)
            if job is None or _phase(job) in _ENDING:
                _log.info("job %s/%s is stopped", settings.namespace, name)
                return
    raise ClusterError(f"job {settings.namespace}/{name}", "does not stop", "Delete it, which also deletes its pods")


def _attempt(job: dict[str, Any]) -> str:
    return str((job["metadata"].get("annotations") or {}).get(ATTEMPT, ""))


def _phase(job: dict[str, Any]) -> str:
    return str(((job.get("status") or {}).get("state") or {}).get("phase", ""))

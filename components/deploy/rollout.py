"""A release on a cluster: tried beside what serves, compared with it, promoted; or everything is as it was before.

    green up  ->  smoke  ->  shadow prompts to green and stable  ->  canary  ->  stable rolls  ->  smoke  ->  green away
       |            |                     |                            |             |             |
       '------------'---------------------'----------------------------'             '-------------'
                  green away, stable untouched                             previous stable back and ready

Green is an InferenceService of its own. It carries what the stable one was before, so a step that is killed half way
is taken up by the next try, or taken back by `abandon`.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentac.components.cluster.api import INFERENCE_SERVICES, SERVING_RUNTIMES, Api, connect
from latentac.components.cluster.objects import RUN, label
from latentac.components.cluster.settings import Cluster
from latentac.components.deploy import inference_service as objects
from latentac.components.deploy.readiness import wait_ready
from latentac.components.deploy.shadow import ask, compare, reasons_against, shadow_requests
from latentac.components.deploy.traffic import traffic_of
from latentac.runs.release.deploy import Candidate
from latentac.serving.client import TOKEN, Client
from latentac.serving.deployment import Deployment, check, proof
from latentac.serving.exported import image_size
from latentac.system.errors import ClusterError, ConfigError, LatentacError, Problem, ServingError
from latentac.system.reading import record

BEFORE = "latentac.io/before"
"""Annotation of green: the stable InferenceService as it was before the release, as JSON; null for none."""

PROMOTES = "latentac.io/promotes"
"""Annotation of green: the revision that the stable one gets by this release."""

POLL_SECONDS = 0.5

_log = logging.getLogger("latentac.deploy")


@dataclass(frozen=True)
class _Plan:
    """stable, green: what to apply; before: the stable one to go back to, None where there was none.

    serving: what the stable one serves now is neither nothing nor this; done: it is this, and was accepted.
    """

    candidate: Candidate
    runtime: dict[str, Any]
    stable: dict[str, Any]
    green: dict[str, Any]
    before: dict[str, Any] | None
    serving: bool
    done: bool


class _Versions:
    """Asks as `server` does, and keeps which versions answered."""

    def __init__(self, server: Client) -> None:
        self._server, self.endpoint, self.seen = server, server.endpoint, set[str]()

    def predict(self, request: Mapping[str, Any]) -> dict[str, Any]:
        answer = self._server.predict(request)
        self.seen.add(str(answer.get("version")))
        return answer


class Rollout:
    """Makes a candidate what the endpoint of `settings` serves: a `latentac.runs.release.deploy.Prove`.

    address: where an InferenceService is asked, by its name; default: its Service inside the cluster.
    """

    def __init__(self, api: Api, settings: Cluster, address: Callable[[str], str] | None = None) -> None:
        self._api, self._settings, self._deploy = api, settings, settings.deploy
        self._address = address or self._inside
        self._stable, self._green = settings.deploy.name, objects.green_name(settings)
        self._traffic = traffic_of(api, settings)

    def __call__(self, candidate: Candidate) -> Deployment:
        """Raises ServingError with what was measured, ConfigError, ClusterError; then what served before serves."""
        objects.check_names(self._settings)
        started = time.monotonic()
        plan = self._plan(candidate)
        if plan.done:
            _log.info("%s serves %s already", self._stable, candidate.version)
            ready, numbers = self._ready(plan.stable), None
            answer = self._smoke(self._stable, candidate)
        else:
            try:
                numbers = self._try(plan)
                ready, answer = self._promote(plan)
            finally:
                _remove(self._api, plan.green)
        if self._traffic:
            self._traffic.to_stable()
        _log.info("%s serves %s", self._stable, candidate.version)
        proved = proof(
            self._asked(self._stable).endpoint, candidate.request, *answer, ready, time.monotonic() - started
        )
        return replace(proved, shadow=numbers)

    def _plan(self, candidate: Candidate) -> _Plan:
        live, tried = (self._api.get(INFERENCE_SERVICES, each) for each in (self._stable, self._green))
        project, run = candidate.space.config.project, candidate.space.run
        objects.check_project(self._settings, live, project)
        runtime, manifest = self._runtime(), candidate.manifest
        name, store = runtime["metadata"]["name"], candidate.space.store.url
        model = objects.Model(project, run, candidate.version, store, manifest.folder)
        stable = objects.inference_service(self._settings, self._stable, model, name, replicas=self._deploy.replicas)
        unaccepted = _unaccepted(live, tried)
        before = record(_note(tried, BEFORE), BEFORE) if unaccepted else objects.restorable(live) if live else None
        notes = {PROMOTES: objects.revision(stable), BEFORE: json.dumps(before, sort_keys=True)}
        green = objects.inference_service(self._settings, self._green, model, name, replicas=1, notes=notes)
        same = objects.revision(live) == objects.revision(stable)
        return _Plan(candidate, runtime, stable, green, before, live is not None and not same, same and not unaccepted)

    def _runtime(self) -> dict[str, Any]:
        """The runtime that this release uses, applied; its owners come when they are known."""
        name = self._deploy.runtime
        template = self._api.get(SERVING_RUNTIMES, name)
        if template is None:
            remedy = "Install the chart with serving.enabled, or name its ServingRuntime."
            problem = f"there is no such ServingRuntime in the namespace {self._settings.namespace}"
            raise ConfigError([Problem("deploy.runtime", name, problem, remedy)])
        runtime = objects.content_runtime(template)
        live = self._api.get(SERVING_RUNTIMES, runtime["metadata"]["name"])
        return self._api.apply(SERVING_RUNTIMES, objects.with_owners(runtime, live))

    def _start(self, plan: _Plan, body: Mapping[str, Any]) -> None:
        """Apply an InferenceService; the runtime goes when the last InferenceService that used it goes."""
        self._vacant(body["metadata"]["name"])
        live = self._api.apply(INFERENCE_SERVICES, body)
        runtime = self._api.get(SERVING_RUNTIMES, plan.runtime["metadata"]["name"])
        self._api.apply(SERVING_RUNTIMES, objects.with_owners(plan.runtime, runtime, live))

    def _vacant(self, name: str) -> None:
        """Wait until one that is being deleted is gone: what is applied to it would go with it."""
        deadline = time.monotonic() + self._deploy.failing_seconds
        while ((self._api.get(INFERENCE_SERVICES, name) or {}).get("metadata") or {}).get("deletionTimestamp"):
            if time.monotonic() > deadline:
                where = f"InferenceService {self._settings.namespace}/{name}"
                raise ServingError(where, "is being deleted, and does not go", "Look at its finalizers.")
            time.sleep(POLL_SECONDS)

    def _try(self, plan: _Plan) -> dict[str, Any]:
        """Bring green up and question it; what was measured. Raises LatentacError, the stable one untouched."""
        candidate = plan.candidate
        try:
            self._start(plan, plan.green)
            self._ready(plan.green)
            self._smoke(self._green, candidate)
            requests, size = shadow_requests(candidate.space, self._deploy.shadow_prompts), image_size(candidate.folder)
            green, blue = self._asked(self._green), self._asked(self._stable) if plan.serving else None
            compared = blue if blue and blue.ready(self._deploy.request_seconds) else None
            answers = ask([green, *([compared] if compared else [])], requests, size)
            numbers = compare(candidate.space, requests, *answers)
            if blue and not compared:
                numbers["notes"].append("the version before is not ready, so nothing was compared")
            _log.info("shadow prompts: %s", json.dumps(numbers))
            reasons = reasons_against(numbers, self._deploy)
            if reasons:
                remedy = "Look at the run's evaluation and at the serving pods' resources."
                raise ServingError(f"model {candidate.version}", "; ".join(reasons), remedy)
            if self._traffic and plan.serving:
                numbers["canary"] = self._traffic.canary(requests, size)
            return numbers
        except LatentacError as error:
            standing = "nothing served before" if plan.before is None else f"{_version(plan.before)} serves as before"
            raise _with_outcome(error, standing) from error

    def _promote(self, plan: _Plan) -> tuple[float, tuple[dict[str, Any], bytes]]:
        """Roll the stable one and question it. Raises LatentacError, with the previous one back and ready."""
        try:
            self._start(plan, plan.stable)
            return self._ready(plan.stable), self._smoke(self._stable, plan.candidate)
        except LatentacError as error:
            raise _with_outcome(error, self._restored(plan)) from error

    def _restored(self, plan: _Plan) -> str:
        """Go back to what served before, and wait until it does; what became of it, in words."""
        _log.info("%s is rolled back", self._stable)
        try:
            if self._traffic and plan.before:
                self._traffic.to_stable()
            if not _restore(self._api, plan.stable, plan.before):
                return "another release has taken its place"
            if plan.before is None:
                return "nothing served before, so it was removed"
            seconds = self._ready(plan.before)
        except LatentacError as error:
            return f"and what served before could not be brought back: {error.where}: {error.problem}"
        return f"{_version(plan.before)} is back and ready after {seconds:.0f} s"

    def _ready(self, body: Mapping[str, Any]) -> float:
        return wait_ready(self._api, body["metadata"]["name"], objects.revision(body), self._deploy)

    def _smoke(self, name: str, candidate: Candidate) -> tuple[dict[str, Any], bytes]:
        """The checks of `latentac.serving.deployment`, when the address answers with this version alone: just after a
        roll a pod that is going may still be asked."""
        asked, deadline = self._asked(name), time.monotonic() + self._deploy.failing_seconds
        size, problem = image_size(candidate.folder), "is not reached, although its pods are ready"
        while True:
            if asked.ready(POLL_SECONDS * 10):
                server, answer = _Versions(asked), None
                try:
                    answer = check(server, candidate.request, size)
                except ServingError:
                    if server.seen <= {candidate.version}:  # what is wrong is wrong with this version
                        raise
                if answer and server.seen == {candidate.version}:
                    return answer
                problem = f"answers with version {', '.join(sorted(server.seen))}, not {candidate.version}"
            if time.monotonic() > deadline:
                raise ServingError(asked.endpoint, problem, "Check the Service, and what selects its pods.")
            time.sleep(POLL_SECONDS)

    def _asked(self, name: str) -> Client:
        deploy, token = self._deploy, os.environ.get(TOKEN, "")
        return Client(self._address(name), deploy.name, seconds=deploy.request_seconds, token=token)

    def _inside(self, name: str) -> str:
        return f"http://{objects.predictor(name)}.{self._settings.namespace}.svc.cluster.local"


def rollout(settings: Cluster) -> Rollout:
    """The rollout of the cluster around this process."""
    return Rollout(connect(settings.namespace), settings)


def abandon(settings: Cluster, run: str, api: Api | None = None) -> bool:
    """Take back what a release of `run` left half way: its green, and a stable one that was never accepted. Returns
    whether there was one.

    Does not wait for the previous version's pods. Nothing where the run left nothing. Raises ClusterError.
    """
    api = api or connect(settings.namespace)
    green = api.get(INFERENCE_SERVICES, objects.green_name(settings))
    if green is None or (green["metadata"].get("labels") or {}).get(RUN) != label(run):
        return False
    live = api.get(INFERENCE_SERVICES, settings.deploy.name)
    before = record(_note(green, BEFORE), BEFORE)
    traffic = traffic_of(api, settings)
    if traffic and before:
        traffic.to_stable()
    if live is not None and _unaccepted(live, green):
        _restore(api, live, before)
    _remove(api, green)
    return True


def _unaccepted(live: Mapping[str, Any] | None, green: Mapping[str, Any] | None) -> bool:
    """Whether the stable one is what this green promotes: green goes when it is accepted."""
    return bool(objects.revision(live)) and _note(green, PROMOTES) == objects.revision(live)


def _restore(api: Api, stable: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Put `before` (None: nothing) in place of `stable`; False if something else took that place meanwhile."""
    name = stable["metadata"]["name"]
    live = api.get(INFERENCE_SERVICES, name)
    if live is not None and objects.revision(live) not in (objects.revision(stable), objects.revision(before)):
        return False
    if before is not None:
        api.apply(INFERENCE_SERVICES, before)
    elif live is not None:
        api.delete(INFERENCE_SERVICES, name)
    return True


def _remove(api: Api, green: Mapping[str, Any]) -> None:
    """Delete green, unless another release has made it its own."""
    live = api.get(INFERENCE_SERVICES, green["metadata"]["name"])
    if live is not None and objects.revision(live) == objects.revision(green):
        api.delete(INFERENCE_SERVICES, green["metadata"]["name"])


def _note(body: Mapping[str, Any] | None, key: str) -> str:
    return str(((body or {}).get("metadata", {}).get("annotations") or {}).get(key, "null"))


def _version(body: Mapping[str, Any]) -> str:
    found = (body["metadata"].get("annotations") or {}).get(objects.VERSION)
    return f"version {found}" if found else "what was there"


def _with_outcome(error: LatentacError, outcome: str) -> LatentacError:
    """The same error with what became of the endpoint."""
    if isinstance(error, ConfigError):
        return error
    words = error.where, f"{error.problem}; {outcome}", error.remedy
    return type(error)(*words, error.status) if isinstance(error, ClusterError) else type(error)(*words)

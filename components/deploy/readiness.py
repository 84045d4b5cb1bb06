"""Whether an InferenceService serves what was asked of it, and why not: told within seconds, from the pods.

KServe's condition Ready stays True through a whole update, and for ten minutes when the new pods can never start. So
ready is what the Deployment says of the revision that was applied, and failed is what its pods say.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from latentac.components.cluster.api import DEPLOYMENTS, INFERENCE_SERVICES, PODS, Api
from latentac.components.cluster.pods import Trouble, last_words, troubles
from latentac.components.cluster.settings import Deploy
from latentac.components.deploy.inference_service import REVISION, predictor, revision
from latentac.system.errors import ServingError

POLL_SECONDS = 0.5
SETTLE_SECONDS = 10.0
"""How long KServe may take to look at a specification; its word may be of the one before."""

_WORDS = 5

_log = logging.getLogger("latentac.deploy")


def wait_ready(api: Api, name: str, wanted: str, deploy: Deploy) -> float:
    """Seconds until the InferenceService `name` serves the revision `wanted` alone, from pods that are all available.

    wanted: "" accepts whatever it is that is there. Raises ServingError: at once for what cannot pass by itself, after
    `deploy.failing_seconds` for what could, after `deploy.ready_seconds` in any case; ClusterError.
    """
    started, since, announced = time.monotonic(), dict[str, float](), ""
    while True:
        service = api.get(INFERENCE_SERVICES, name)
        deployment = api.get(DEPLOYMENTS, predictor(name))
        if is_ready(service, deployment, wanted):
            return time.monotonic() - started
        now = time.monotonic()
        pods = _pods(api, name, wanted)
        found = {
            trouble.where: (trouble, seconds) for trouble, seconds in _found(service, deployment, pods, wanted, deploy)
        }
        since = {where: since.get(where, now) for where in found}
        for where, (trouble, seconds) in found.items():
            if now - since[where] >= seconds:
                raise _failed(api, name, pods, _lasting(trouble, seconds))
        if now - started > deploy.ready_seconds:
            seen = "; ".join(str(trouble) for trouble, _ in found.values()) or _progress(deployment)
            raise _failed(api, name, pods, f"not ready within {deploy.ready_seconds:g} s ({seen})")
        announced = _announce(name, _progress(deployment), announced)
        time.sleep(POLL_SECONDS)


def is_ready(service: Mapping[str, Any] | None, deployment: Mapping[str, Any] | None, wanted: str) -> bool:
    """Whether every pod of the Deployment is of the revision `wanted` ("" for any) and available."""
    if service is None or deployment is None or (wanted and _template_revision(deployment) != wanted):
        return False
    status, replicas = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
    counts = [status.get(field, 0) for field in ("updatedReplicas", "replicas", "availableReplicas")]
    observed = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    return observed and counts == [replicas] * 3 and _condition(service, "Ready").get("status") == "True"


def _found(
    service: Mapping[str, Any] | None,
    deployment: Mapping[str, Any] | None,
    pods: Iterable[Mapping[str, Any]],
    wanted: str,
    deploy: Deploy,
) -> Iterator[tuple[Trouble, float]]:
    """Each trouble with the seconds for which it may last."""
    if service is None:
        yield Trouble("InferenceService", "was deleted meanwhile", passing=False), 0.0
        return
    if wanted and revision(service) != wanted:
        yield Trouble("InferenceService", "was replaced by another release meanwhile", passing=False), 0.0
        return
    model = (service.get("status") or {}).get("modelStatus") or {}
    if model.get("transitionStatus") == "InvalidSpec":
        failure = model.get("lastFailureInfo") or {}
        message = f"{failure.get('reason', 'InvalidSpec')}: {failure.get('message', 'KServe refuses it')}"
        yield Trouble("InferenceService", message, passing=False), SETTLE_SECONDS
    elif deployment is None or (wanted and _template_revision(deployment) != wanted):
        message = _condition(service, "PredictorReady").get("message") or "does KServe's controller run?"
        patience = max(SETTLE_SECONDS, deploy.failing_seconds)
        yield Trouble("InferenceService", f"KServe has not acted on it: {message}", passing=True), patience
        return
    else:
        yield from _refused(deployment, deploy)
    for trouble in [*troubles(pods), *_unready(pods)]:
        yield trouble, deploy.failing_seconds if trouble.passing else 0.0


def _refused(deployment: Mapping[str, Any], deploy: Deploy) -> Iterator[tuple[Trouble, float]]:
    """Pods that were never made, by PodSecurity or a quota: a condition of the Deployment alone tells."""
    status = deployment.get("status") or {}
    if status.get("observedGeneration", 0) < deployment["metadata"]["generation"]:
        return
    for condition in status.get("conditions") or []:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            passing = "exceeded quota" in condition.get("message", "")
            message = f"{condition.get('reason', 'FailedCreate')}: {condition.get('message', '')}"
            yield (
                Trouble(f"Deployment {deployment['metadata']['name']}", message, passing),
                deploy.failing_seconds if passing else 0.0,
            )


def _unready(pods: Iterable[Mapping[str, Any]]) -> Iterator[Trouble]:
    """Containers that have started, as their startup probe said, and are not ready."""
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses") or []:
            running = status.get("state", {}).get("running") and not pod["metadata"].get("deletionTimestamp")
            if running and status.get("started") and not status.get("ready"):
                where = f"{pod['metadata']['name']}/{status['name']}"
                yield Trouble(f"{where} readiness", "it runs, and its readiness probe fails", passing=True)


def _pods(api: Api, name: str, wanted: str) -> list[dict[str, Any]]:
    """The pods of that revision; those of the one before do not speak for it."""
    found = api.find(PODS, labels=f"serving.kserve.io/inferenceservice={name}")
    return [pod for pod in found if not wanted or revision(pod) == wanted]


def _template_revision(deployment: Mapping[str, Any]) -> str:
    return str((deployment["spec"]["template"]["metadata"].get("annotations") or {}).get(REVISION, ""))


def _condition(service: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    conditions = (service.get("status") or {}).get("conditions") or []
    return next((condition for condition in conditions if condition["type"] == kind), {})


def _progress(deployment: Mapping[str, Any] | None) -> str:
    if deployment is None:
        return "KServe has made no Deployment yet"
    status, replicas = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
    updated, available = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
    return (
        f"{updated} of {replicas} pods are of this version, {available} available, {status.get('replicas', 0)} in all"
    )


def _announce(name: str, text: str, before: str) -> str:
    if text != before:
        _log.info("%s: %s", name, text)
    return text


def _lasting(trouble: Trouble, seconds: float) -> str:
    return f"{trouble}, for {seconds:g} s" if seconds else str(trouble)


def _failed(api: Api, name: str, pods: Iterable[Mapping[str, Any]], problem: str) -> ServingError:
    words = last_words(api, pods)
    for line in words:
        _log.info("%s", line)
    said = f" Last words: {' | '.join(words[-_WORDS:])}" if words else ""
    remedy = f"Correct what it says and deploy again.{said}"
    return ServingError(f"InferenceService {api.namespace}/{name}", problem, remedy)

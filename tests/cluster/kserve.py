"""KServe's controller as far as a predictor in Standard mode needs it, where the real one is not at hand.

It makes the Deployment and the Service of each InferenceService of one namespace, merged from its ServingRuntime as
KServe merges them, and writes the statuses that the real controller was seen to write: Ready stays True through an
update, a failed load is told late, `lastFailureInfo` is never cleared.
"""

import copy
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kubernetes import client

from latentac.components.cluster.api import DEPLOYMENTS, INFERENCE_SERVICES, PODS, SERVING_RUNTIMES, Api, Kind
from latentac.system.errors import ClusterError

SERVICES = Kind("", "v1", "services")
PORT = 80
LABEL = "serving.kserve.io/inferenceservice"
POLL_SECONDS = 0.2


class Controller:
    """Reconciles a namespace from entering the context until leaving it. scheduler: of the pods, "" for the default."""

    def __init__(self, api: Api, scheduler: str = "") -> None:
        self._api, self._scheduler = api, scheduler
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)
        self._refused: dict[str, int] = {}

    def __enter__(self) -> "Controller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)

    def _run(self) -> None:
        services: list[dict[str, Any]] = []
        while not self._ended.wait(POLL_SECONDS):
            with suppress(ClusterError):
                services = self._api.find(INFERENCE_SERVICES)
            for service in services:
                with suppress(ClusterError):  # deleted meanwhile, or a conflict: the next round sees
                    self._reconcile(service)

    def _reconcile(self, service: dict[str, Any]) -> None:
        name, uid = service["metadata"]["name"], service["metadata"]["uid"]
        generation = service["metadata"]["generation"]
        if service["metadata"].get("deletionTimestamp") or self._refused.get(uid) == generation:
            return
        wanted = service["spec"]["predictor"]["model"]["runtime"]
        runtime = self._api.get(SERVING_RUNTIMES, wanted)
        if runtime is None:  # and it is not looked at again when the runtime appears
            self._refused[uid] = generation
            self._write(service, _invalid(wanted))
            return
        body = deployment(runtime, service, self._scheduler)
        made = self._api.apply(DEPLOYMENTS, body)
        self._api.apply(SERVICES, _service(service))
        pods = self._api.find(PODS, labels=f"{LABEL}={name}")
        self._write(service, status(service, made, pods))

    def _write(self, service: dict[str, Any], found: dict[str, Any]) -> None:
        if all((service.get("status") or {}).get(field) == value for field, value in found.items()):
            return
        patch_status(self._api, INFERENCE_SERVICES, service["metadata"]["name"], found)


def patch_status(api: Api, kind: Kind, name: str, found: Mapping[str, Any]) -> None:
    """Merge `told` into the status of an object."""
    try:
        api.client.call_api(
            kind.path(api.namespace, name, "status"),
            "PATCH",
            header_params={"Content-Type": "application/merge-patch+json"},
            body={"status": dict(found)},
            auth_settings=["BearerToken"],
            response_type="object",
        )
    except client.ApiException as error:
        raise ClusterError(name, f"{error.status} {error.body}", "", error.status) from None


def deployment(runtime: Mapping[str, Any], service: Mapping[str, Any], scheduler: str = "") -> dict[str, Any]:
    """The Deployment of a predictor: the runtime's pod, the predictor over it, the model in its container."""
    name = service["metadata"]["name"]
    predictor = copy.deepcopy(service["spec"]["predictor"])
    model = predictor.pop("model")
    base = copy.deepcopy(runtime["spec"])
    (container,) = (each for each in base["containers"] if each["name"] == "kserve-container")
    for field in ("modelFormat", "runtime", "protocolVersion", "storageUri"):
        model.pop(field, None)
    model.pop("name", None)
    for field, key in (("env", "name"), ("volumeMounts", "mountPath")):
        container[field] = _united(container.get(field, []), model.pop(field, []), key)
    container |= {**model, "resources": _merged(container.get("resources", {}), model.get("resources", {}))}
    words = {"{{.Name}}": name, "{{.Namespace}}": service["metadata"]["namespace"]}
    container["args"] = [_filled(each, words) for each in container.get("args", [])]
    least, strategy = predictor.pop("minReplicas", 1), predictor.pop("deploymentStrategy", None)
    predictor.pop("maxReplicas", None)
    pod = {field: base[field] for field in ("containers", "affinity", "nodeSelector", "tolerations") if field in base}
    pod["volumes"] = _united(base.get("volumes", []), predictor.pop("volumes", []), "name")
    pod["nodeSelector"] = {**pod.get("nodeSelector", {}), **predictor.pop("nodeSelector", {})}
    pod["imagePullSecrets"] = _united(base.get("imagePullSecrets", []), predictor.pop("imagePullSecrets", []), "name")
    pod |= predictor
    if scheduler:
        pod["schedulerName"] = scheduler
    app = {"app": f"isvc.{name}-predictor"}
    labels = {**base.get("labels", {}), **service["metadata"].get("labels", {}), LABEL: name, "component": "predictor"}
    notes = {**base.get("annotations", {}), **service["metadata"].get("annotations", {})}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**_metadata(service), "labels": {**labels, **app}},
        "spec": {
            "replicas": least,
            "selector": {"matchLabels": app},
            "progressDeadlineSeconds": 600,
            **({"strategy": strategy} if strategy else {}),
            "template": {"metadata": {"labels": {**labels, **app}, "annotations": notes}, "spec": pod},
        },
    }


def status(service: Mapping[str, Any], made: Mapping[str, Any], pods: list[dict[str, Any]]) -> dict[str, Any]:
    """What the real controller writes, for a Deployment and its pods."""
    reported, name = made.get("status") or {}, service["metadata"]["name"]
    conditions = {each["type"]: each for each in reported.get("conditions") or []}
    refused, progress = conditions.get("ReplicaFailure", {}), conditions.get("Progressing", {})
    available = conditions.get("Available", {})
    loaded_before = _states(service).get("activeModelState") == "Loaded"
    if refused.get("status") == "True":
        ready = _condition("False", refused["reason"], refused["message"])
    elif progress.get("status") == "False" or progress.get("reason") == "NewReplicaSetAvailable":
        ready = _condition(progress["status"], progress["reason"], progress.get("message", ""))
    else:
        ready = _condition(
            available.get("status", "Unknown"), available.get("reason", ""), available.get("message", "")
        )
    failure = next(filter(None, (_failure(pod, masked=loaded_before) for pod in pods)), None)
    model: dict[str, Any] = {"transitionStatus": "UpToDate", "states": _loaded()}
    if failure:
        states = {"activeModelState": "Loaded" if loaded_before else "", "targetModelState": "FailedToLoad"}
        model = {"transitionStatus": "BlockedByFailedLoad", "states": states, "lastFailureInfo": failure}
    elif ready["status"] != "True" and not loaded_before:
        states = {"activeModelState": "", "targetModelState": "Pending"}
        model = {"transitionStatus": "InProgress", "states": states}
    last = ((service.get("status") or {}).get("modelStatus") or {}).get("lastFailureInfo")
    if last and "lastFailureInfo" not in model:
        model["lastFailureInfo"] = last  # never cleared
    kinds = {
        "PredictorReady": ready,
        "Ready": ready,
        "IngressReady": _condition("True"),
        "Stopped": _condition("False"),
    }
    url = f"http://{name}-predictor.{service['metadata']['namespace']}.svc.cluster.local"
    return {
        "conditions": [{"type": kind, **kinds[kind]} for kind in sorted(kinds)],
        "observedGeneration": reported.get("observedGeneration", 0),
        "modelStatus": {"copies": {"failedCopies": 0, "totalCopies": reported.get("availableReplicas", 0)}, **model},
        "address": {"url": url},
        "url": url,
        "deploymentMode": "Standard",
    }


def _failure(pod: Mapping[str, Any], *, masked: bool) -> dict[str, Any] | None:
    """A load that failed: of an init container always, of the server only where none served before."""
    reported = pod.get("status") or {}
    for field in ("initContainerStatuses", "containerStatuses"):
        for container in reported.get(field) or []:
            state = container.get("state", {})
            ended = state.get("terminated") or container.get("lastState", {}).get("terminated") or {}
            if ended.get("exitCode") and (field == "initContainerStatuses" or not masked):
                found = {
                    "reason": "ModelLoadFailed",
                    "exitCode": ended["exitCode"],
                    "location": pod["metadata"]["name"],
                }
                return {**found, "message": ended.get("message", "")}
    return None


def _invalid(runtime: str) -> dict[str, Any]:
    states = {"activeModelState": "", "targetModelState": ""}
    failure = {"reason": "RuntimeNotRecognized", "message": f"Specified runtime does not exist: {runtime}"}
    model = {"transitionStatus": "InvalidSpec", "states": states, "lastFailureInfo": failure}
    return {"modelStatus": model, "conditions": [{"type": "Ready", **_condition("Unknown")}]}


def _condition(value: str, reason: str = "", message: str = "") -> dict[str, Any]:
    return {"status": value, **({"reason": reason} if reason else {}), **({"message": message} if message else {})}


def _loaded() -> dict[str, Any]:
    return {"activeModelState": "Loaded", "targetModelState": "Loaded"}


def _states(service: Mapping[str, Any]) -> Mapping[str, Any]:
    return ((service.get("status") or {}).get("modelStatus") or {}).get("states") or {}


def _service(service: Mapping[str, Any]) -> dict[str, Any]:
    name = service["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**_metadata(service), "labels": {LABEL: name}},
        "spec": {
            "selector": {"app": f"isvc.{name}-predictor"},
            "ports": [{"name": "http", "port": PORT, "targetPort": 8080, "protocol": "TCP"}],
        },
    }


def _metadata(service: Mapping[str, Any]) -> dict[str, Any]:
    owner = {field: service[field] for field in ("apiVersion", "kind")}
    owner |= {field: service["metadata"][field] for field in ("name", "uid")}
    place = {"name": f"{service['metadata']['name']}-predictor", "namespace": service["metadata"]["namespace"]}
    return {**place, "ownerReferences": [{**owner, "controller": True}]}


def _united(base: list[Any], over: list[Any], key: str) -> list[Any]:
    return list({**{each[key]: each for each in base}, **{each[key]: each for each in over}}.values())


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {field: {**base.get(field, {}), **over.get(field, {})} for field in {*base, *over}}


def _filled(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def administrator(kubeconfig: object, namespace: str) -> Api:
    """A namespace by a kubeconfig, whatever this process's own environment says."""
    from kubernetes import config

    settings = client.Configuration()
    config.load_kube_config(config_file=str(kubeconfig), client_configuration=settings)
    return Api(settings, namespace)

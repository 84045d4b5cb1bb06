"""What Volcano's controller does for one kind of job, for a node on which the real one is not installed.

It makes a job's headless Service, its hosts' ConfigMap and its pods, with the names, labels and variables that
Volcano's plugins `svc` and `env` give them, keeps its status, and obeys its policies: RestartPod, RestartJob,
CompleteJob. There is no queue and no gang: pods go to the default scheduler.
"""

import copy
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from latentac.components.cluster.api import CONFIG_MAPS, PODS, VOLCANO_JOBS, Api, Kind
from latentac.system.errors import ClusterError

SERVICES = Kind("", "v1", "services")
ENDED = frozenset({"Completed", "Failed", "Aborted", "Terminated"})
_POLL_SECONDS = 0.3


class Controller:
    """Looks after the jobs of the namespace of `api` in a thread of its own, between `start` and `stop`."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="volcano", daemon=True)
        self._seen: dict[str, set[str]] = {}  # job's uid -> uids of pods whose loss was answered
        self.errors: list[str] = []

    def __enter__(self) -> "Controller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            try:
                for job in self._api.find(VOLCANO_JOBS):
                    if not job["metadata"].get("deletionTimestamp"):
                        self._sync(job)
            except ClusterError as error:  # a conflict, or a namespace that is going: the next round knows more
                self.errors.append(str(error))

    def _sync(self, job: dict[str, Any]) -> None:
        status = job.get("status") or {}
        phase = status.get("state", {}).get("phase", "")
        pods = {pod["metadata"]["name"]: pod for pod in self._pods(job)}
        if not phase:
            self._prepare(job)
            self._write(job, pods, "Pending")
        elif phase in ("Aborting", "Aborted", "Terminating"):
            self._end(pods)
            if phase != "Aborted" and not pods:
                self._write(job, pods, {"Aborting": "Aborted", "Terminating": "Terminated"}[phase])
        elif phase == "Completing":
            self._end(pods)
            if all(_phase(pod) in ("Succeeded", "Failed") for pod in pods.values()):
                self._write(job, pods, "Completed")
        elif phase == "Restarting":
            for name in pods:
                self._api.delete(PODS, name)
            if not pods:
                again = status.get("retryCount", 0) < job["spec"]["maxRetry"]
                self._write(job, pods, "Pending" if again else "Failed")
        elif phase in ("Pending", "Running"):
            self._work(job, pods)

    def _work(self, job: dict[str, Any], pods: dict[str, dict[str, Any]]) -> None:
        """Answer what became of the pods, by the policies of their tasks; make those that are missing."""
        seen = self._seen.setdefault(job["metadata"]["uid"], set())
        for task in job["spec"]["tasks"]:
            name = f"{job['metadata']['name']}-{task['name']}-0"
            pod = pods.get(name)
            if pod is None:
                self._api.create(PODS, pod_of(job, task))
                continue
            event = _event(pod)
            if event is None or pod["metadata"]["uid"] in seen:
                continue
            seen.add(pod["metadata"]["uid"])
            action = _action(task, event)
            if action == "RestartPod":
                self._api.delete(PODS, name)
            elif action in ("RestartJob", "CompleteJob"):
                self._write(job, pods, {"RestartJob": "Restarting", "CompleteJob": "Completing"}[action])
                return
        running = sum(_phase(pod) == "Running" for pod in pods.values())
        self._write(job, pods, "Running" if running >= _min_available(job) else job["status"]["state"]["phase"])

    def _end(self, pods: dict[str, dict[str, Any]]) -> None:
        """Pods that have ended stay, to be looked at."""
        for name, pod in pods.items():
            if _phase(pod) not in ("Succeeded", "Failed"):
                self._api.delete(PODS, name)

    def _pods(self, job: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self._api.find(PODS, labels=f"volcano.sh/job-name={job['metadata']['name']}")

    def _prepare(self, job: Mapping[str, Any]) -> None:
        name = job["metadata"]["name"]
        metadata = {"name": name, "namespace": self._api.namespace, "ownerReferences": [_owner(job)]}
        spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": _marks(job)}
        spec["ports"] = [{"name": "placeholder-volcano", "port": 1, "protocol": "TCP", "targetPort": 1}]
        for kind, body in (
            (SERVICES, {"metadata": metadata, "spec": spec}),
            (CONFIG_MAPS, {"metadata": {**metadata, "name": f"{name}-svc"}, "data": hosts(job)}),
        ):
            if self._api.get(kind, body["metadata"]["name"]) is None:
                self._api.create(kind, body)

    def _write(self, job: dict[str, Any], pods: Mapping[str, Any], phase: str) -> None:
        body = {**job, "status": status_of(job, pods, phase)}
        path = VOLCANO_JOBS.path(self._api.namespace, job["metadata"]["name"], "status")
        if body["status"] != job.get("status"):
            with self._api.translated("PUT", path):  # with the version that was read: another writer wins
                self._api.client.call_api(path, "PUT", body=body, auth_settings=["BearerToken"])


def pod_of(job: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """The pod that Volcano makes of a task's template."""
    name, template = job["metadata"]["name"], copy.deepcopy(task["template"])
    metadata, spec = template.get("metadata", {}), template["spec"]
    marks = {**_marks(job), "volcano.sh/task-spec": task["name"], "volcano.sh/task-index": "0"}
    marks["volcano.sh/queue-name"] = job["spec"]["queue"]
    notes = {"scheduling.k8s.io/group-name": f"{name}-{job['metadata']['uid']}", "volcano.sh/template-uid": ""}
    spec |= {"hostname": f"{name}-{task['name']}-0", "subdomain": name}
    volume = f"{name}-svc"
    spec.setdefault("volumes", []).append({"name": volume, "configMap": {"name": volume}})
    for container in spec["containers"]:
        container.setdefault("env", [])
        container["env"] += [{"name": key, "value": "0"} for key in ("VK_TASK_INDEX", "VC_TASK_INDEX")]
        container["env"] += [
            {"name": key, "valueFrom": {"configMapKeyRef": {"name": volume, "key": key}}}
            for key in hosts(job)
            if key.startswith("VC_")
        ]
        container.setdefault("volumeMounts", []).append({"name": volume, "mountPath": "/etc/volcano"})
    return {
        "metadata": {
            "name": f"{name}-{task['name']}-0",
            "labels": {**metadata.get("labels", {}), **marks},
            "annotations": {**metadata.get("annotations", {}), **marks, **notes},
            "ownerReferences": [_owner(job)],
        },
        "spec": spec,
    }


def hosts(job: Mapping[str, Any]) -> dict[str, str]:
    """The ConfigMap of the plugin `svc`: where each task's pods are found."""
    name = job["metadata"]["name"]
    found: dict[str, str] = {}
    for task in job["spec"]["tasks"]:
        address, key = f"{name}-{task['name']}-0.{name}", task["name"].replace("-", "_").upper()
        found |= {f"{task['name']}.host": address, f"VC_{key}_HOSTS": address, f"VC_{key}_NUM": "1"}
    return found


def status_of(job: Mapping[str, Any], pods: Mapping[str, Any], phase: str) -> dict[str, Any]:
    """The job's status in `phase`, in the fields that Volcano writes."""
    old = job.get("status") or {}
    before = old.get("state", {})
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    changed = before.get("phase") != phase
    status: dict[str, Any] = {
        "minAvailable": _min_available(job),
        "state": {"phase": phase, "lastTransitionTime": now if changed else before["lastTransitionTime"]},
        "conditions": [*old.get("conditions", []), *([{"status": phase, "lastTransitionTime": now}] * changed)],
        "retryCount": old.get("retryCount", 0) + (changed and before.get("phase") == "Restarting"),
        "version": old.get("version", 0) + (changed and phase in ("Restarting", "Completing")),
        "taskStatusCount": {},
    }
    for task in job["spec"]["tasks"]:
        pod = pods.get(f"{job['metadata']['name']}-{task['name']}-0")
        if pod is not None:
            status["taskStatusCount"][task["name"]] = {"phase": {_phase(pod): 1}}
    for count in ("Pending", "Running", "Succeeded", "Failed"):
        number = sum(_phase(pod) == count for pod in pods.values())
        if number:
            status[count.lower()] = number
    return {key: value for key, value in status.items() if value or key in ("state", "minAvailable")}


def _event(pod: Mapping[str, Any]) -> str | None:
    if _phase(pod) == "Failed":
        return "PodFailed"
    if _phase(pod) == "Succeeded":
        return "TaskCompleted"  # a task has one pod here
    return "PodEvicted" if pod["metadata"].get("deletionTimestamp") else None


def _action(task: Mapping[str, Any], event: str) -> str:
    for policy in task.get("policies", []):
        if event in [policy.get("event"), *policy.get("events", [])]:
            return str(policy["action"])
    return ""


def _phase(pod: Mapping[str, Any]) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _min_available(job: Mapping[str, Any]) -> int:
    return sum(task.get("minAvailable", task.get("replicas", 1)) for task in job["spec"]["tasks"])


def _marks(job: Mapping[str, Any]) -> dict[str, str]:
    return {
        "volcano.sh/job-name": job["metadata"]["name"],
        "volcano.sh/job-namespace": job["metadata"]["namespace"],
    }


def _owner(job: Mapping[str, Any]) -> dict[str, Any]:
    metadata = job["metadata"]
    fields = {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "name": metadata["name"],
        "uid": metadata["uid"],
    }
    return {**fields, "controller": True, "blockOwnerDeletion": True}

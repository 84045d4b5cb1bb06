"""What a kubelet writes of pods, for a control plane that has no node: the test says what becomes of each pod."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from latentac.components.cluster.api import PODS, Api
from latentac.system.errors import ClusterError
from tests.cluster.kserve import patch_status

NO_SCHEDULER = "nobody"
"""Of pods whose scheduling the test decides too."""

POLL_SECONDS = 0.2

Pod = Mapping[str, Any]
Behaviour = Callable[[Pod], dict[str, Any]]
"""The status of a pod."""


class Kubelet:
    """Writes the statuses that `behaviour` gives, from entering the context until leaving it."""

    def __init__(self, api: Api, behaviour: Behaviour) -> None:
        self._api, self.behaviour = api, behaviour
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Kubelet":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)

    def _run(self) -> None:
        written: dict[str, dict[str, Any]] = {}
        while not self._ended.wait(POLL_SECONDS):
            for pod in self._api.find(PODS):
                wanted, uid = self.behaviour(pod), pod["metadata"]["uid"]
                if written.get(uid) != wanted:
                    try:
                        patch_status(self._api, PODS, pod["metadata"]["name"], wanted)
                        written[uid] = wanted
                    except ClusterError:  # it was deleted meanwhile
                        continue


def works(pod: Pod) -> dict[str, Any]:
    """Everything runs and is ready."""
    inits = [_container(each, {"terminated": _end(0)}) for each in pod["spec"].get("initContainers", [])]
    return _status(pod, "Running", inits, [_container(each, _RUNNING, started=True, ready=True) for each in _main(pod)])


def image_pull(pod: Pod) -> dict[str, Any]:
    """The server's image cannot be had."""
    found = 'Back-off pulling image "registry.invalid/serve:nowhere"'
    return _pending(pod, {"waiting": {"reason": "ImagePullBackOff", "message": found}})


def crash(pod: Pod) -> dict[str, Any]:
    """The server ends with 8 at each start."""
    ended = _end(8, "serving: the folder cannot be loaded")
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}}
    inits = [_container(each, {"terminated": _end(0)}) for each in pod["spec"].get("initContainers", [])]
    servers = [_container(each, waiting, last=ended, restarts=1) for each in _main(pod)]
    return _status(pod, "Running", inits, servers)


def fetch_fails(message: str, code: int = 3) -> Behaviour:
    """The init container ends with `code`; its message is the end of its log."""

    def behaviour(pod: Pod) -> dict[str, Any]:
        inits = [_container(each, {"terminated": _end(code, message)}) for each in pod["spec"]["initContainers"]]
        waiting = {"waiting": {"reason": "PodInitializing"}}
        return _status(pod, "Pending", inits, [_container(each, waiting) for each in _main(pod)])

    return behaviour


def unschedulable(pod: Pod) -> dict[str, Any]:
    """No node has room."""
    found = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": found}
    return {"phase": "Pending", "conditions": [condition]}


def never_ready(pod: Pod) -> dict[str, Any]:
    """It runs, and its readiness probe says 503."""
    inits = [_container(each, {"terminated": _end(0)}) for each in pod["spec"].get("initContainers", [])]
    return _status(pod, "Running", inits, [_container(each, _RUNNING, started=True) for each in _main(pod)])


_RUNNING = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


def _pending(pod: Pod, state: dict[str, Any]) -> dict[str, Any]:
    inits = [_container(each, {"terminated": _end(0)}) for each in pod["spec"].get("initContainers", [])]
    return _status(pod, "Pending", inits, [_container(each, state) for each in _main(pod)])


def _status(pod: Pod, phase: str, inits: list[dict[str, Any]], servers: list[dict[str, Any]]) -> dict[str, Any]:
    ready = "True" if servers and all(each["ready"] for each in servers) else "False"
    conditions = {"PodScheduled": "True", "Initialized": "True", "ContainersReady": ready, "Ready": ready}
    return {
        "phase": phase,
        "conditions": [{"type": kind, "status": status} for kind, status in conditions.items()],
        "initContainerStatuses": inits,
        "containerStatuses": servers,
    }


def _container(
    container: Mapping[str, Any],
    state: dict[str, Any],
    *,
    started: bool = False,
    ready: bool = False,
    last: dict[str, Any] | None = None,
    restarts: int = 0,
) -> dict[str, Any]:
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "state": state,
        "lastState": {"terminated": last} if last else {},
        "started": started,
        "ready": ready,
        "restartCount": restarts,
    }


def _end(code: int, message: str = "") -> dict[str, Any]:
    return {"exitCode": code, "reason": "Error" if code else "Completed", **({"message": message} if message else {})}


def _main(pod: Pod) -> list[Mapping[str, Any]]:
    return list(pod["spec"]["containers"])

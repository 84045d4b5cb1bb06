"""What the pods of a run tell of it, where the cluster's own API can be asked and not only that of KFP."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latentac.components.cluster import pods as seen
from latentac.components.cluster.api import PODS, Api, connect
from latentac.system.errors import LatentacError

MAIN = "main"
"""The container of a pod that runs the step. The others (`init`, `wait`, `kfp-launcher`) are Argo's and KFP's."""

_RUN_LABEL = "pipeline/runid"
"""KFP's own, on every pod of a run."""

_NODE = "workflows.argoproj.io/node-name"
"""Argo's annotation on every pod: the names of its node and of those around it, joined by dots."""

_READ_LINES = 400
_DRIVER = re.compile(r"(?:-driver|\.driver)(?:\(\d+\))?$|-system-(?:dag|container)-driver-")
_ATTEMPT = re.compile(r"\((\d+)\)$")
_NOT_THE_STEPS = re.compile(
    r"[IW]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+\.go:\d+\]"  # KFP's launcher, which runs the step as its child
    r"|[EF]\d{4} .*\bexit status \d+\s*$"  # the same, of the step's exit code
    r"|time=\S+ level=\w+ msg="  # Argo's
    r"|\[KFP Executor "
)


def without_attempt(name: str) -> str:
    """The name of one of Argo's nodes without the number of its attempt: `prepare` of `prepare(0)`."""
    return _ATTEMPT.sub("", name)


def attempt_of(name: str) -> int:
    """The number of the attempt in the name of one of Argo's nodes, 0 where there is none."""
    found = _ATTEMPT.search(name)
    return int(found[1]) if found else 0


class Pods:
    """The pods of runs in `namespace`. Where they cannot be read, that is told once, and nothing is known of them."""

    def __init__(self, namespace: str, steps: Sequence[str], say: Callable[[str], None]) -> None:
        self._namespace, self._steps, self._say = namespace, tuple(steps), say
        self._api: Api | None = None
        self._useless = False

    def troubles(self, run_id: str) -> list[str]:
        """What pods that have not ended wait for."""
        return [str(trouble) for trouble in seen.troubles(self._pods(run_id, ended=False))]

    def last_words(self, run_id: str) -> list[str]:
        """The end of what each step said that failed, `step: line`. KFP's drivers count where no step failed."""
        failed = [pod for pod in self._pods(run_id, ended=True) if pod.get("status", {}).get("phase") == "Failed"]
        of_steps = [pod for pod in failed if not _is_driver(pod)]
        try:
            return [line for pod in of_steps or failed for line in self._said(self._api, pod)] if self._api else []
        except LatentacError as error:
            return [str(error)]

    def _said(self, api: Api, pod: Mapping[str, Any]) -> list[str]:
        """Of the step itself; where it has said nothing, of each other container that failed."""
        name, step = pod["metadata"]["name"], self._step_of(pod)
        read = api.log(name, MAIN, tail=_READ_LINES)
        own = [line for line in read if line.strip() and not _NOT_THE_STEPS.match(line)]
        if own:
            return [f"{step}: {line}" for line in own[-seen.LAST_LINES :]]
        lines = []
        for container in seen.failed_containers(pod):
            said = api.log(name, container, tail=seen.LAST_LINES)
            lines += [f"{step}/{container}: {line}" for line in said]
        return lines

    def _step_of(self, pod: Mapping[str, Any]) -> str:
        """The step whose pod it is, else the pod's name."""
        node = str((pod["metadata"].get("annotations") or {}).get(_NODE, ""))
        for part in reversed(node.split(".")):
            name = without_attempt(part)
            if name in self._steps:
                return name
        return str(pod["metadata"]["name"])

    def _pods(self, run_id: str, *, ended: bool) -> list[dict[str, Any]]:
        if self._useless:
            return []
        try:
            self._api = self._api or connect(self._namespace)
            pods = self._api.find(PODS, labels=f"{_RUN_LABEL}={run_id}")
        except LatentacError as error:
            self._useless = True
            self._say(f"      cannot find out what pods wait for ({error})")
            return []
        return [pod for pod in pods if (pod.get("status", {}).get("phase") in ("Succeeded", "Failed")) == ended]


def _is_driver(pod: Mapping[str, Any]) -> bool:
    """Whether it is a pod that KFP runs before a step, to prepare it."""
    metadata = pod["metadata"]
    return any(map(_DRIVER.search, (str((metadata.get("annotations") or {}).get(_NODE, "")), metadata["name"])))

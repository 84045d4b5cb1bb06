"""Why pods do not work, told from the pods themselves: a controller's own conditions tell it minutes later, if ever."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from latentac.components.cluster.api import Api

LAST_LINES = 20

_HOPELESS = frozenset({"InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError", "CreateContainerError"})
_MAY_PASS = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"})
_TRY_AGAIN = 75  # how our programs end when a server did not answer: see latentac.system.errors


@dataclass(frozen=True)
class Trouble:
    """where: pod, or pod/container; passing: it may pass by itself, as a lack of room or a slow registry."""

    where: str
    problem: str
    passing: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def troubles(pods: Iterable[Mapping[str, Any]]) -> list[Trouble]:
    """What is wrong with each pod that is not well, as seen now; the containers of one that is being deleted aside."""
    found: list[Trouble] = []
    for pod in pods:
        if pod["metadata"].get("deletionTimestamp"):
            continue
        found += _scheduling(pod)
        found += _containers(pod)
    return found


def refusals(events: Iterable[Mapping[str, Any]], owners: Iterable[str]) -> list[Trouble]:
    """Pods that were never made (PodSecurity, a quota): only FailedCreate events of their owners tell.

    owners: prefixes of the names of the objects that make the pods (a ReplicaSet's, a Job's).
    """
    starts = tuple(owners)
    newest: dict[str, Trouble] = {}
    for event in sorted(events, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or "")):
        name = event["involvedObject"].get("name", "")
        if event.get("reason") == "FailedCreate" and name.startswith(starts):
            message = event.get("message", "")
            newest[name] = Trouble(name, message, passing="exceeded quota" in message)
    return list(newest.values())


def last_words(api: Api, pods: Iterable[Mapping[str, Any]]) -> list[str]:
    """The end of each container's log, of the instance before where the present one has said nothing yet."""
    lines: list[str] = []
    for pod in pods:
        name = pod["metadata"]["name"]
        for status in _statuses(pod):
            container, ended = status["name"], bool(status.get("lastState", {}).get("terminated"))
            said = api.log(name, container, tail=LAST_LINES)
            if not said and ended:
                said = api.log(name, container, tail=LAST_LINES, previous=True)
            lines += [f"{name}/{container}: {line}" for line in said]
    return lines


def failed_containers(pod: Mapping[str, Any]) -> list[str]:
    """Names of the containers that ended with an exit code other than 0."""
    return [
        status["name"] for status in _statuses(pod) if (status.get("state", {}).get("terminated") or {}).get("exitCode")
    ]


def _statuses(pod: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    status = pod.get("status", {})
    yield from status.get("initContainerStatuses") or []
    yield from status.get("containerStatuses") or []


def _scheduling(pod: Mapping[str, Any]) -> Iterator[Trouble]:
    for condition in pod.get("status", {}).get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield Trouble(
                pod["metadata"]["name"], condition.get("message") or condition.get("reason", ""), passing=True
            )


def _containers(pod: Mapping[str, Any]) -> Iterator[Trouble]:
    for status in _statuses(pod):
        where = f"{pod['metadata']['name']}/{status['name']}"
        waiting = status.get("state", {}).get("waiting") or {}
        ended = status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _HOPELESS or reason in _MAY_PASS:
            yield Trouble(where, f"{reason}: {message}", passing=reason in _MAY_PASS)
        elif ended.get("exitCode"):
            words = f": {ended['message'].strip()}" if ended.get("message") else ""
            problem = f"{ended.get('reason', 'Error')}, exit code {ended['exitCode']}{words}"
            yield Trouble(where, problem, passing=ended["exitCode"] == _TRY_AGAIN)

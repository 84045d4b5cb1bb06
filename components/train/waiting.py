"""A job that does not get its pods: why, and how long to wait. The job itself stays Pending for ever and says nothing;
and its pod group stands in the way of other jobs."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from latentac.components.cluster.pods import Trouble, refusals, troubles

HOPELESS_SECONDS = 20.0
"""How long what does not pass by itself (a missing Secret, a refused pod) is watched: somebody may be repairing it."""

_NO_ROOM = re.compile(
    r"unschedul|insufficient|nodes? (?:are |is )?(?:un)?available|resource fit|notenough", re.IGNORECASE
)
_LACKING = re.compile(r"insufficient:? (?!insufficient)([a-z0-9][-a-z0-9.]*(?:/[-a-z0-9._]+)?)", re.IGNORECASE)
_log = logging.getLogger("latentac.train")


class Waiting:
    """min_replicas: pods without which there is no training, replica 0 (`leader`) among them; seconds: how long the
    job may lack them for reasons that could pass; requests: of one pod, resource -> quantity."""

    def __init__(
        self,
        leader: str,
        min_replicas: int,
        seconds: float,
        requests: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leader, self._min_replicas, self._seconds, self._clock = leader, min_replicas, seconds, clock
        self._requests = requests
        self._since: float | None = None
        self._hopeless_since: float | None = None
        self._announced = ""

    def over(
        self, pods: Iterable[Mapping[str, Any]], find_events: Callable[[], Iterable[Mapping[str, Any]]]
    ) -> str | None:
        """Look at the job's pods as they are now; the reason to give up, if it is time. find_events: of the job
        and its pods."""
        phases = {pod["metadata"]["name"]: pod.get("status", {}).get("phase") for pod in pods}
        at_work = {name for name, phase in phases.items() if phase in ("Running", "Succeeded")}
        enough = len(at_work) >= self._min_replicas and self._leader in at_work
        pending = [pod for pod in pods if pod.get("status", {}).get("phase", "Pending") == "Pending"]
        found = troubles(pending)
        if not enough:
            events = list(find_events())
            found += [told for told in _told_by(events) if not any(each.problem in told.problem for each in found)]
            found += self._without_room(found, events)
        self._announce(found)
        if enough:
            self._since = self._hopeless_since = None
            return None
        now = self._clock()
        self._since = now if self._since is None else self._since
        hopeless = [trouble for trouble in found if not trouble.passing]
        if not hopeless:
            self._hopeless_since = None
        elif self._hopeless_since is None:
            self._hopeless_since = now
        watched = now - self._hopeless_since if self._hopeless_since is not None else 0.0
        if hopeless and watched >= min(HOPELESS_SECONDS, self._seconds):
            return "; ".join(map(str, hopeless))
        if now - self._since >= self._seconds:
            reasons = "; ".join(map(str, found)) or "nobody says why; is Volcano's controller running?"
            return f"no pods within {self._seconds:.0f} s: {reasons}"
        return None

    def _without_room(self, found: Iterable[Trouble], events: Iterable[Mapping[str, Any]]) -> list[Trouble]:
        """What the pods request, where the scheduler has no room for them, and which of it is short.

        Volcano says "0/0 tasks in gang unschedulable" of a job, and only sometimes in an event of a pod what is short.
        """
        problems = [trouble.problem for trouble in found]
        if not any(map(_NO_ROOM.search, problems)):
            return []
        said = " ".join([*problems, *(str(event.get("message", "")) for event in events)])
        named = {name.rstrip(".").lower() for name in _LACKING.findall(said)}
        short = [name for name in self._requests if name.lower() in named]
        asked = ", ".join(f"{name} {quantity}" for name, quantity in self._requests.items()) or "nothing"
        which = f"short of {', '.join(short)}" if short else "no event says which resource is short"
        needed = f"{self._min_replicas} of them must fit at once"
        problem = f"{which}; each pod requests {asked}, and {needed}"
        return [Trouble("room in the cluster and the queue", problem, passing=True)]

    def _announce(self, found: Iterable[Trouble]) -> None:
        text = "; ".join(sorted(map(str, found)))
        if text and text != self._announced:
            _log.warning("waiting for pods: %s", text)
        self._announced = text


def _told_by(events: Iterable[Mapping[str, Any]]) -> list[Trouble]:
    """Refused pods, and what else the scheduler warns of (no room in the queue): it may pass."""
    listed = list(events)
    names = [event["involvedObject"].get("name", "") for event in listed]
    found = refusals(listed, names)
    newest: dict[str, Trouble] = {}
    for event, name in zip(listed, names, strict=True):
        if event.get("type") == "Warning" and event.get("reason") != "FailedCreate":
            where = f"{event['involvedObject'].get('kind', 'object')} {name}"
            newest[where] = Trouble(where, f"{event.get('reason')}: {event.get('message', '')}", passing=True)
    return [*found, *newest.values()]

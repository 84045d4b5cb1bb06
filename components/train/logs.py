"""The logs of a job's pods, followed while they are written: a pod that its controller ends takes its log with it."""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from latentac.components.cluster.api import PODS, Api
from latentac.components.cluster.pods import LAST_LINES
from latentac.system.errors import ClusterError, ClusterUnavailable

_AGAIN_SECONDS = 1.0
_KEPT_PODS = 20
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)")
_WORKER_MARK = re.compile(r"^\[\w*\d+\]:")
_log = logging.getLogger("latentac.train")


class Logs:
    """Follows every pod in a thread of its own, and again where a stream breaks off.

    write: gets each line of the pod named `leader`, once, without the agent's mark of the worker.
    """

    def __init__(self, api: Api, leader: str, write: Callable[[str], None]) -> None:
        self._api, self._leader, self._write = api, leader, write
        self._closed = threading.Event()
        self._pods: dict[str, Mapping[str, Any]] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._tails: dict[str, tuple[str, deque[str]]] = {}  # uid -> pod's name and last lines, in order of appearance

    def watch(self, pods: Iterable[Mapping[str, Any]]) -> None:
        """The job's pods as they are now; follow those that are new."""
        self._pods = {pod["metadata"]["uid"]: pod for pod in pods}
        for uid, pod in self._pods.items():
            if uid not in self._threads:
                name = pod["metadata"]["name"]
                self._tails[uid] = name, deque(maxlen=LAST_LINES)
                thread = threading.Thread(target=self._follow, args=(uid, name), name=f"log-{name}", daemon=True)
                self._threads[uid] = thread
                thread.start()
        for uid in list(self._tails)[:-_KEPT_PODS]:
            if uid not in self._pods:
                del self._tails[uid]

    def last_words(self) -> list[str]:
        """The end of each pod's log, also of pods that are gone."""
        return [f"{name}: {line}" for name, lines in list(self._tails.values()) for line in list(lines)]

    def close(self, seconds: float) -> None:
        """Wait for the rest of the logs, at most that long."""
        for thread in self._threads.values():
            if seconds > 0 and thread.is_alive():
                thread.join(seconds / len(self._threads))
        self._closed.set()

    def _follow(self, uid: str, name: str) -> None:
        seen = _Seen()
        lines = self._tails[uid][1]
        attached = False
        while not self._closed.is_set():
            pod = self._pods.get(uid)
            if pod is None:
                return
            if pod.get("status", {}).get("phase", "Pending") != "Pending":
                try:
                    # The one of that name may be another by now, whose lines another thread passes on.
                    now = self._api.get(PODS, name) if attached else pod
                    if now is None or now["metadata"]["uid"] != uid:
                        return
                    attached, ended = True, _ended(now)
                    self._read(name, now["spec"]["containers"][0]["name"], seen, lines)
                    if ended:
                        return
                except ClusterUnavailable:
                    pass
                except ClusterError as error:
                    _log.warning("the log of %s cannot be followed: %s", name, error)
                    return
            self._closed.wait(_AGAIN_SECONDS)

    def _read(self, name: str, container: str, seen: "_Seen", lines: "deque[str]") -> None:
        for line in self._api.follow(name, container, since=seen.attach()):
            if self._closed.is_set():
                return
            stamp, _, text = line.partition(" ")
            if seen.add(stamp):
                text = _WORKER_MARK.sub("", text)
                lines.append(text)
                if name == self._leader:
                    self._write(text)


class _Seen:
    """Which lines of a log have been passed on. A log can be asked for from a whole second on, no finer."""

    def __init__(self) -> None:
        self.second = ""
        self._last, self._times, self._again = (0, 0), 0, 0

    def attach(self) -> str:
        """The log will be read again, from this time on ("" for its beginning)."""
        self._again = 0
        return self.second

    def add(self, stamp: str) -> bool:
        """Whether the next line, written at `stamp`, is new. Lines of one nanosecond are told apart by counting."""
        parts = _STAMP.fullmatch(stamp)
        if parts is None:  # what the kubelet itself says in place of a log
            return False
        moment = datetime.fromisoformat(parts[1] + parts[3].replace("Z", "+00:00")).astimezone(UTC)
        order = (int(moment.timestamp()), int(f"{parts[2] or '':0<9}"))
        if order > self._last:
            self.second = f"{moment:%Y-%m-%dT%H:%M:%SZ}"
            self._last, self._times, self._again = order, 1, 1
            return True
        if order < self._last:
            return False
        self._again += 1
        if self._again <= self._times:
            return False
        self._times = self._again
        return True


def _ended(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")

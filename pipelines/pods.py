"""What the pods of a run tell of it, where the cluster's own API can be asked and not only that of KFP."""

from collections.abc import Callable
from typing import Any

from latentac.components.cluster import pods as seen
from latentac.components.cluster.api import PODS, Api, connect
from latentac.system.errors import LatentacError

_RUN_LABEL = "pipeline/runid"
"""KFP's own, on every pod of a run."""


class Pods:
    """The pods of runs in `namespace`. Where they cannot be read, that is told once, and nothing is known of them."""

    def __init__(self, namespace: str, say: Callable[[str], None]) -> None:
        self._namespace, self._say = namespace, say
        self._api: Api | None = None
        self._useless = False

    def troubles(self, run_id: str) -> list[str]:
        """What pods that have not ended wait for."""
        return [str(trouble) for trouble in seen.troubles(self._pods(run_id, ended=False))]

    def last_words(self, run_id: str) -> list[str]:
        """The end of the log of each pod that failed."""
        failed = [pod for pod in self._pods(run_id, ended=True) if pod.get("status", {}).get("phase") == "Failed"]
        try:
            return seen.last_words(self._api, failed) if self._api else []
        except LatentacError as error:
            return [str(error)]

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

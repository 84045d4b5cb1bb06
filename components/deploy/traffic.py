"""Real traffic, a little at first: an HTTPRoute of the Gateway API that shares it between two versions by weight."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from latentac.components.cluster.api import HTTP_ROUTES, Api
from latentac.components.cluster.settings import Cluster, Gateway
from latentac.components.deploy.inference_service import green_name, predictor
from latentac.components.deploy.shadow import ask
from latentac.serving.client import TOKEN, Client
from latentac.system.errors import ServingError

POLL_SECONDS = 0.5

_log = logging.getLogger("latentac.deploy")


class Traffic:
    """The route of one endpoint through `gateway`. Off where the settings name no gateway (see `traffic_of`)."""

    def __init__(self, api: Api, settings: Cluster, gateway: Gateway) -> None:
        self._api, self._settings, self._gateway = api, settings, gateway
        deploy = settings.deploy
        seconds, token = deploy.request_seconds, os.environ.get(TOKEN, "")
        self._through = Client(gateway.address, deploy.name, seconds=seconds, host=gateway.hostname, token=token)

    def to_stable(self) -> None:
        """All traffic to the stable version."""
        self._share(0)

    def canary(self, requests: Sequence[dict[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
        """Give the green one each weight in turn and ask through the gateway; the measured numbers of each.

        Raises ServingError, with all traffic back at the stable one, when more fail than are allowed.
        """
        records = []
        try:
            for weight in self._gateway.weights:
                self._share(weight)
                (answers,) = ask([self._through], requests, size)
                numbers = {"weight": weight, "error_fraction": answers.error_fraction}
                records.append({**numbers, "median_seconds": answers.median_seconds})
                _log.info("canary: %s %% of the traffic, %s of it failed", weight, answers.error_fraction)
                if answers.error_fraction > self._settings.deploy.max_error_fraction:
                    problem = f"at {weight} % of the traffic a fraction of {answers.error_fraction:g} failed"
                    raise ServingError(self._through.endpoint, problem, f"The first: {answers.failures[0]}")
        except BaseException:
            self.to_stable()
            raise
        return records

    def _share(self, percent: int) -> None:
        """Apply the weights, and wait until the gateway has taken them. Raises ServingError."""
        applied = self._api.apply(HTTP_ROUTES, self._route(percent))
        deadline = time.monotonic() + self._settings.deploy.failing_seconds
        while not _accepted(applied):
            if time.monotonic() > deadline:
                records = [condition for parent in _parents(applied) for condition in parent.get("conditions", [])]
                problem = "; ".join(f"{each['type']} {each['status']}: {each.get('message', '')}" for each in records)
                where = f"HTTPRoute {self._settings.namespace}/{self._settings.deploy.name}"
                raise ServingError(
                    where, f"the gateway has not taken it ({problem or 'no word'})", "Look at the Gateway."
                )
            time.sleep(POLL_SECONDS)
            applied = self._api.get(HTTP_ROUTES, self._settings.deploy.name) or {}

    def _route(self, percent: int) -> dict[str, Any]:
        deploy, gateway = self._settings.deploy, self._gateway
        shares = {deploy.name: 100 - percent, green_name(self._settings): percent}
        backends = [
            {"name": predictor(name), "port": 80, "weight": weight} for name, weight in shares.items() if weight
        ]
        labels = {"app.kubernetes.io/part-of": "latentac", "app.kubernetes.io/managed-by": "latentac"}
        return {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": deploy.name, "namespace": self._settings.namespace, "labels": labels},
            "spec": {
                "parentRefs": [{"name": gateway.name, "namespace": gateway.namespace}],
                "hostnames": [gateway.hostname],
                "rules": [{"backendRefs": backends}],
            },
        }


def traffic_of(api: Api, settings: Cluster) -> Traffic | None:
    """None where the settings name no gateway."""
    gateway = settings.deploy.gateway
    return Traffic(api, settings, gateway) if gateway else None


def _parents(route: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list((route.get("status") or {}).get("parents") or [])


def _accepted(route: Mapping[str, Any]) -> bool:
    """Whether a gateway has accepted this very generation and found what it refers to."""
    for parent in _parents(route):
        current = {
            condition["type"]: condition["status"]
            for condition in parent.get("conditions", [])
            if condition.get("observedGeneration", 0) >= route["metadata"]["generation"]
        }
        if current.get("Accepted") == "True" and current.get("ResolvedRefs") == "True":
            return True
    return False

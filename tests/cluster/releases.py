"""Releases of the chart on a cluster of the tests': Helm against it, and what a namespace holds."""

import json
import os
import subprocess
import time
import urllib.error
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster.control_plane import Cluster
from tools.binaries import program
from tools.golang import Unavailable

LEFT_BY_KUBERNETES = ("configmap/kube-root-ca.crt", "serviceaccount/default", "event")


def helm(cluster: Cluster, *arguments: str, values: dict[str, Any] | None = None, name: str = "helm") -> str:
    """stdout of a Helm against the cluster. Skips where it is not built, fails with its own words."""
    try:
        binary = str(program(name))
    except Unavailable as reason:
        pytest.skip(str(reason))
    folder = cluster.folder / f"{name}-home"
    homes = {f"HELM_{each}_HOME": str(folder / each.lower()) for each in ("CACHE", "CONFIG", "DATA")}
    done = subprocess.run(
        [binary, *arguments, *(["-f", "-"] if values is not None else [])],
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        env={**os.environ, **cluster.environment, **homes},
        check=False,
    )
    assert done.returncode == 0, f"{name} {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def until(found: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """The first answer that is not empty, within a bound.

    It also waits for what `helm uninstall` deletes. Helm 4's own `--wait` counts objects that it has not seen yet as
    deleted, and can so end too early, with an error.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answer := found():
                return answer
        except (urllib.error.URLError, ConnectionError):
            pass  # a pod is being replaced: the deadline counts
        time.sleep(1)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


def objects_in(cluster: Cluster, namespace: str) -> set[str]:
    """Everything in a namespace but what Kubernetes itself puts there, as `kind/name`."""
    kinds = cluster.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    listed = cluster.kubectl("get", ",".join(kinds), "-n", namespace, "-o", "name", "--ignore-not-found").split()
    return {each for each in listed if not each.startswith(LEFT_BY_KUBERNETES)}

"""The chart on a real API server: accepted, granting what the code calls and nothing more, gone without a trace."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cluster.control_plane import Cluster, ControlPlane
from tests.cluster.releases import helm, objects_in, until
from tests.components.test_rollout import RIGHTS as DEPLOY
from tests.components.test_rollout import ROUTES
from tests.components.test_volcano import RIGHTS as TRAIN
from tests.helm.chart import BUNDLED, CHART, EVERYTHING, HELMS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# What Kubeflow Pipelines' launcher and Argo's executor call from within a step's pod.
STEPS_CALLS = {
    "workflowtaskresults.argoproj.io": {"create", "patch"},
    "configmaps/kfp-launcher": {"get"},
    "secrets/mlpipeline-minio-artifact": {"get"},
    "secrets/rel-s3": {"get"},
    "pods": {"get"},
}
OF_EVERYBODY = re.compile(r"self\w+\.(authorization|authentication)\.k8s\.io$")


def table(calls: set[tuple[str, str]]) -> dict[str, set[str]]:
    """Calls as the audit log has them (`get`, `batch.volcano.sh/jobs/status`) in the words of `kubectl auth can-i`."""
    found: dict[str, set[str]] = {}
    for verb, place in calls:
        group, resource, *subresource = place.split("/")
        name = resource if group == "core" else f"{resource}.{group}"
        found.setdefault("/".join([name, *subresource]), set()).add(verb)
    return found


def rights(cluster: Cluster, namespace: str, user: str) -> dict[str, set[str]]:
    """`kubectl auth can-i --list` as a table, without what every user may ask about itself. A right to one object has
    its name behind a slash."""
    text = cluster.kubectl("auth", "can-i", "--list", "-n", namespace, f"--as=system:serviceaccount:{user}")
    found: dict[str, set[str]] = {}
    for line in text.splitlines()[1:]:
        match = re.fullmatch(r"(\S*) +\[[^]]*\] +\[([^]]*)\] +\[([^]]*)\]", line.rstrip())
        assert match, line
        if match[1] and not OF_EVERYBODY.search(match[1]):
            for name in match[2].split() or [""]:
                found.setdefault(f"{match[1]}/{name}".rstrip("/"), set()).update(match[3].split())
    return found


class Place(NamedTuple):
    namespace: str
    steps: str
    values: dict[str, Any]


@pytest.fixture(scope="module")
def place(control_plane: ControlPlane, crds: list[Path]) -> Iterator[Place]:
    """A release with every option on, its steps in another namespace; without its hooks, for nothing runs pods here."""
    namespace, steps = control_plane.namespace("chart"), control_plane.namespace("kfp")
    values = {
        **EVERYTHING,
        "pipeline": {**EVERYTHING["pipeline"], "namespace": steps},
        "train": {**EVERYTHING["train"], "queue": {**EVERYTHING["train"]["queue"], "name": namespace}},
        "monitoring": {"serviceMonitor": "auto", "alerts": "auto"},
    }
    if not control_plane.has_gateway:
        values["serving"] = {}
    helm(control_plane, "install", "rel", str(CHART), "-n", namespace, "--no-hooks", values=values)
    yield Place(namespace, steps, values)
    helm(control_plane, "uninstall", "rel", "-n", namespace, "--no-hooks")
    until(lambda: not objects_in(control_plane, namespace) | objects_in(control_plane, steps), "empty namespaces")
    assert namespace not in control_plane.kubectl("get", "queues.scheduling.volcano.sh", "-o", "name")


def test_the_steps_may_do_what_the_code_calls(control_plane: ControlPlane, place: Place) -> None:
    """`kubectl auth can-i` for the steps' account is exactly what the tests of train and deploy found in the audit log,
    and what KFP calls in the steps' namespace; nothing anywhere else."""
    user = f"{place.steps}:rel-pipeline"
    calls = TRAIN | DEPLOY | (ROUTES if control_plane.has_gateway else set())
    assert rights(control_plane, place.namespace, user) == table(calls)
    assert rights(control_plane, place.steps, user) == STEPS_CALLS
    assert rights(control_plane, "default", user) == {}


@pytest.mark.parametrize("account", ["rel-train", "rel-serve", "default"])
def test_workers_and_endpoint_may_do_nothing(control_plane: ControlPlane, place: Place, account: str) -> None:
    """No right at all beyond what every user may ask about itself."""
    for namespace in (place.namespace, place.steps):
        assert rights(control_plane, namespace, f"{place.namespace}:{account}") == {}


def test_another_release_is_another_matter(control_plane: ControlPlane, place: Place) -> None:
    """A second release beside the first, with its own endpoint's name, is accepted and goes without touching it."""
    before = objects_in(control_plane, place.namespace)
    values = {**BUNDLED, "minio": {"enabled": True, "persistence": {"enabled": False}}, "serving": {"name": "second"}}
    helm(control_plane, "install", "second", str(CHART), "-n", place.namespace, "--no-hooks", values=values)
    assert before < objects_in(control_plane, place.namespace)
    helm(control_plane, "uninstall", "second", "-n", place.namespace, "--no-hooks")
    until(lambda: "second" not in str(objects_in(control_plane, place.namespace)), "the second release's end")
    assert objects_in(control_plane, place.namespace) >= before


@pytest.mark.parametrize("name", HELMS)
def test_a_password_made_once_is_kept(control_plane: ControlPlane, crds: list[Path], name: str) -> None:
    """The bundled store's password is long, nobody gave it, and it survives an upgrade and a rollback."""
    namespace = control_plane.namespace("password")
    values: dict[str, Any] = {"minio": {"enabled": True, "persistence": {"enabled": False}}}
    options = ("-n", namespace, "--no-hooks")

    def password() -> str:
        path = "jsonpath={.data.AWS_SECRET_ACCESS_KEY}"
        return control_plane.kubectl("get", "secret", "a-s3", "-n", namespace, "-o", path)

    helm(control_plane, "install", "a", str(CHART), *options, values=values, name=name)
    first = password()
    assert len(first) > 40
    helm(control_plane, "upgrade", "a", str(CHART), *options, values={**values, "tensorboard": {}}, name=name)
    assert password() == first
    helm(control_plane, "rollback", "a", "1", *options, name=name)
    assert password() == first
    control_plane.delete_namespace(namespace, wait=False)

"""What Helm makes of the chart: the same under both majors, valid, strict, documented."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from helm.readme import README, leaves, rendered
from latentac import __version__
from latentac.config.extensions import ALLOWED, operator_allows
from tests.helm.chart import (
    BUNDLED,
    BUNDLED_EVERYTHING,
    CHART,
    CI,
    EVERYTHING,
    HELMS,
    Object,
    Refused,
    every,
    find,
    helm,
    of_kind,
    pods,
    render,
    strict_problems,
)

SETS: dict[str, Mapping[str, Any] | str] = {
    **dict(zip(CI, CI, strict=True)),
    "everything": EVERYTHING,
    "bundled everything": BUNDLED_EVERYTHING,
}
MONITORING = "monitoring.coreos.com/v1"


@pytest.mark.parametrize("name", SETS)
def test_both_helms_render_the_same(name: str) -> None:
    """Helm 3 and Helm 4 give the same objects in the same order, but for the password that is made where none is."""
    first, second = (render(SETS[name], name=each) for each in HELMS)
    for secret in of_kind(first + second, "Secret"):
        assert set(secret["data"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        if name == "evaluation":
            secret["data"]["AWS_SECRET_ACCESS_KEY"] = "random"
    assert first == second
    assert len(first) > 15


@pytest.mark.parametrize("name", SETS)
def test_built_in_objects_are_valid(name: str) -> None:
    """Each object of a kind of Kubernetes' own is valid for 1.34, and no field of it is unknown."""
    for each in render(SETS[name]):
        if "." not in each["apiVersion"].partition("/")[0] or each["apiVersion"].partition("/")[0].endswith(".k8s.io"):
            kubernetes_validate.validate(each, "1.34", strict=True)


@pytest.mark.parametrize("name", SETS)
def test_custom_objects_are_valid(name: str, crds: list[Path]) -> None:
    """Each object of a custom kind fits its CRD, and no field of it is unknown there."""
    kinds = ("ServingRuntime", "Queue")
    paths = [path for folder in crds for kind in kinds for path in folder.rglob(f"*_{kind.lower()}s.yaml")]
    schemas = {
        crd["spec"]["names"]["kind"]: crd for crd in (yaml.load(path.read_text(), yaml.CSafeLoader) for path in paths)
    }
    custom = [each for each in render(SETS[name]) if each["kind"] in kinds]
    assert custom or name == "openshift"
    for each in custom:
        assert not strict_problems(each, schemas[each["kind"]])


@pytest.mark.parametrize("name", HELMS)
def test_unknown_values_are_refused_by_name(name: str) -> None:
    """A value that no schema names, at the top or deep, stops Helm with its path."""
    with pytest.raises(Refused) as refusal:
        render({**BUNDLED, "trian": {}, "serving": {"resources": {"limit": {}}}}, name=name)
    assert "'trian' not allowed" in str(refusal.value)
    assert "/serving/resources" in str(refusal.value)
    assert "'limit' not allowed" in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("images.pullPolicy", "Sometimes"),
        ("images.serve.digest", "sha256:short"),
        ("store.endpoint", "https://user:word@s3.example.com"),
        ("serving.strategy", "Hope"),
        ("train.replicas.min", 0),
        ("train.workSize", "lots"),
        ("serving.name", "Not_a_name"),
    ],
)
def test_wrong_values_are_refused_by_name(path: str, value: object) -> None:
    """A value that cannot be stops Helm with its path, before anything is installed."""
    values: Any = value
    for name in reversed(path.split(".")):
        values = {name: values}
    with pytest.raises(Refused, match="/" + path.replace(".", "/")):
        render(values)


def test_values_are_documented_and_few() -> None:
    """values.yaml stays readable, and each value in it has its meaning in the schema, which has no other values."""
    text = (CHART / "values.yaml").read_text()
    assert len(text.splitlines()) < 200
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load(text)
    for path, shown, meaning in leaves("", schema, values):
        assert meaning, f"{path} has no description in values.schema.json"
        assert shown != "`null`" or path == "serving.gateway", f"{path} is missing in values.yaml"


def test_schema_is_strict() -> None:
    """Whatever has named fields takes no others, but for `global`, which parent charts share."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    open_ended = []

    def look(where: str, below: Any) -> None:
        if isinstance(below, dict):
            if "properties" in below and below.get("additionalProperties") is not False:
                open_ended.append(where)
            for key, value in below.items():
                look(f"{where}/{key}", value)
        elif isinstance(below, list):
            for index, value in enumerate(below):
                look(f"{where}/{index}", value)

    look("", schema)
    assert open_ended == ["/properties/global"]


def test_readme_is_generated() -> None:
    """README.md is what the template and the values give: `make chart` leaves no difference."""
    assert README.read_text() == rendered()


def test_version_is_the_projects() -> None:
    """Chart, app and default images have the version of latentac."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    runtime = find(render(BUNDLED), "ServingRuntime", "rel")
    assert runtime["spec"]["containers"][0]["image"] == f"ghcr.io/latentac/serve:{__version__}"


@pytest.mark.parametrize("name", HELMS)
def test_own_classes_are_allowed_by_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server reads from its environment what the values name, a class in a class too; by default there is none."""
    assert "env" not in find(render(BUNDLED, name=name), "ServingRuntime", "rel")["spec"]["containers"][0]
    own = ["mine.steering:Second", "mine.kernels:Mine", "_mine:Outer.Inner2"]
    runtime = find(render({**BUNDLED, "serving": {"extensions": own}}, name=name), "ServingRuntime", "rel")
    [variable] = runtime["spec"]["containers"][0]["env"]
    assert variable["name"] == ALLOWED
    monkeypatch.setenv(ALLOWED, variable["value"])
    assert operator_allows() == {*own}


@pytest.mark.parametrize("name", HELMS)
@pytest.mark.parametrize(
    "address",
    ["mine:A,other:B", "mine:A, B", "*", "mine.steering", "mine:steering:A", ":A", "mine:", " mine:A", "mine:A\n"],
)
def test_what_is_not_one_address_allows_no_class(address: str, name: str) -> None:
    """One entry is one class that somebody chose: Helm refuses a list in an entry, a pattern, and a module alone."""
    with pytest.raises(Refused, match="/serving/extensions/1"):
        render({**BUNDLED, "serving": {"extensions": ["mine:A", address]}}, name=name)


def test_chart_packages_and_lints() -> None:
    """`helm lint` finds nothing with any ci values, and a package leaves the template of the README out."""
    for path in CI.values():
        helm("lint", "--strict", "--kube-version", "1.34.4", str(CHART), "-f", str(path))
    shown = helm("show", "readme", str(CHART))
    assert "# latentac: the chart" in shown


def test_rendering_is_stable() -> None:
    """The same values give the same objects, so GitOps sees no difference: where keys are given none are made."""
    options = ("--set", "jobs.deadlineSeconds=240")  # another rendering, not the cached one
    assert render(BUNDLED) == render(BUNDLED, *options)


def test_notes_say_what_to_do_next() -> None:
    """After an installation: what there is, how to prove, submit, ask and remove; and the warning about the store."""
    notes = helm(
        *("install", "rel", str(CHART), "-n", "models", "--dry-run=client", "-f", str(CI["evaluation"])),
    ).partition("NOTES:")[2]
    for part in ("helm test rel", "latentac pipeline submit", "latentac:predict", "helm uninstall rel", "WARNING"):
        assert part in notes


def test_every_pod_asks_for_what_it_needs() -> None:
    """Each container has requests of CPU and memory and a limit of memory, each server its probes."""
    for values in SETS.values():
        for where, pod in pods(render(values)):
            for container in pod["spec"]["containers"]:
                assert set(container["resources"]["requests"]) >= {"cpu", "memory"}, where
                assert "memory" in container["resources"]["limits"], where
                if container.get("ports"):
                    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys(), where


def test_evaluation_fits_one_small_node() -> None:
    """All that runs at the worst moment asks for less than a core and 4 GiB, so that the platform has the rest."""
    objects = render("evaluation")
    settings = yaml.safe_load(find(objects, "ConfigMap", "rel-cluster")["data"]["cluster.yaml"])
    always = [
        container["resources"]["requests"]
        for where, pod in pods(objects)
        if where.startswith(("Deployment", "StatefulSet"))
        for container in pod["spec"]["containers"]
    ]
    launch, serve = (settings[part]["resources"]["requests"] for part in ("train", "deploy"))
    step = settings["steps"]["launch"]["resources"]["requests"]
    for moment in ([*always, step, launch], [*always, step, serve, serve, serve]):
        assert sum(_milli(each["cpu"]) for each in moment) < 1000
        assert sum(_mebi(each["memory"]) for each in moment) < 4096


def _milli(quantity: str) -> float:
    return float(quantity.removesuffix("m")) if quantity.endswith("m") else 1000 * float(quantity)


def _mebi(quantity: str) -> float:
    return float(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


def test_helm_tests_are_there() -> None:
    """`helm test` proves store, settings and TensorBoard."""
    hooks = {
        each["metadata"]["name"]
        for each in render(BUNDLED)
        if each["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"
    }
    assert hooks == {"rel-test-store", "rel-test-settings", "rel-test-tensorboard"}


def test_custom_kinds_appear_where_their_api_is() -> None:
    """`auto` renders a ServingRuntime and the monitoring objects where the cluster says it has their API, else not."""

    def kinds(*options: str) -> set[str]:
        return {each["kind"] for each in render({**BUNDLED, "serving": {"enabled": "auto"}}, *options)}

    wanted = {"ServingRuntime", "ServiceMonitor", "PrometheusRule"}
    assert not wanted & kinds()
    assert wanted <= kinds("--api-versions", f"serving.kserve.io/v1alpha1,{MONITORING}")


def test_hooks_leave_nothing_when_they_succeed() -> None:
    """Helm does not remove hooks with a release: each goes by itself once it has succeeded, and its Job in any case."""
    for each in render(EVERYTHING):
        annotations: Object = each["metadata"].get("annotations", {})
        if "helm.sh/hook" in annotations:
            assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
            assert each["kind"] == "Pod" or each["spec"]["ttlSecondsAfterFinished"] <= 3600


EVIL = "x\"'}]: {a}\n  evil: 'true' #{{ .Release.Name }}"
FREE = (
    "images.serve.repository",
    "images.minio.registry",
    "store.region",
    "minio.persistence.storageClass",
    "train.priorityClass",
    "train.nodeSelector.disk",
    "train.resources.limits.cpu",
    "serving.gateway.hostname",
    "monitoring.labels.release",
    "networkPolicy.storeCidrs.0",
    "rewardServers.jpeg.reward",
)
BOUND = {
    "store.url": "s3://bucket/x\"'}]:{a}#{{.Release.Name}}",
    "store.endpoint": "https://x\"'}]:{a}",
    "pipeline.upload.host": "https://x\"'}]:{a}",
    "serving.allowedOrigins.0": "https://x\"'}]:{a}",
    "serving.gateway.address": "https://x\"'}]:{a}",
}


def with_value(path: str, value: str) -> dict[str, Any]:
    """Values with everything on, and this one in its place."""
    bundled = path.startswith(("minio", "images.minio"))
    values: Any = json.loads(json.dumps(BUNDLED_EVERYTHING if bundled else EVERYTHING))
    if bundled:
        values["store"] = BUNDLED_EVERYTHING["store"]
    place, parts = values, path.split(".")
    for part, after in itertools.pairwise(parts):
        place = place.setdefault(part, [] if after == "0" else {})
    if parts[-1] == "0":
        place.append(value)
    else:
        place[parts[-1]] = value
    return dict(values)


def leaves_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Each key with what is below it, at any depth."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield str(name), inner
        yield from leaves_of(inner)


@pytest.mark.parametrize(("path", "value"), [*((path, EVIL) for path in FREE), *BOUND.items()])
def test_a_value_stays_a_value(path: str, value: str) -> None:
    """Whatever characters it has, it makes no field and no object of its own, and it is not shortened."""
    sound = {"store.url": "s3://bucket/a"}.get(path, "https://a" if path in BOUND else "a")
    plain, evil = (render(with_value(path, each)) for each in (sound, value))
    assert [(each["kind"], each["metadata"]["name"]) for each in plain] == [
        (each["kind"], each["metadata"]["name"]) for each in evil
    ]
    plain, evil = ([*each, *(yaml.safe_load(text) for text in every(each, "cluster.yaml"))] for each in (plain, evil))
    for one, other in zip(plain, evil, strict=True):
        assert [name for name, _ in leaves_of(one)] == [name for name, _ in leaves_of(other)]
    texts = [inner for each in evil for _, inner in leaves_of(each) if isinstance(inner, str)]
    assert any(value in text for text in texts)


@pytest.mark.parametrize("path", BOUND)
def test_an_address_has_no_white_space(path: str) -> None:
    """The schema refuses it, so that no line of it can become another argument."""
    with pytest.raises(Refused):
        render(with_value(path, f"{BOUND[path]}\nx"))

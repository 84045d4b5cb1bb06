"""Secrets, images, users and rights in what the chart renders."""

import base64
import json
import re
from typing import Any

import pytest
import yaml

from tests.helm.chart import (
    ACCESS_KEY,
    BUNDLED_EVERYTHING,
    CI,
    DIGESTS,
    EVERYTHING,
    NAMESPACE,
    SECRET_KEY,
    every,
    find,
    of_kind,
    pods,
    render,
)

SETS: dict[str, Any] = {
    **dict(zip(CI, CI, strict=True)),
    "everything": EVERYTHING,
    "bundled everything": BUNDLED_EVERYTHING,
}


@pytest.mark.parametrize("name", ["everything", "bundled everything"])
def test_secrets_stand_in_secrets_alone(name: str) -> None:
    """Neither the keys nor their base64 are in any other object: no argument, variable, annotation or ConfigMap."""
    objects = render(SETS[name])
    marks = [ACCESS_KEY, SECRET_KEY, *(base64.b64encode(key.encode()).decode() for key in (ACCESS_KEY, SECRET_KEY))]
    assert all(mark in json.dumps(of_kind(objects, "Secret")) for mark in marks[2:])
    for each in objects:
        if each["kind"] != "Secret":
            assert not [mark for mark in marks if mark in json.dumps(each)], each["kind"]


def test_no_secret_is_made_beside_an_existing_one() -> None:
    """With existingSecret the chart has none of its own, and everything names that one."""
    objects = render("gpu-production")
    assert not of_kind(objects, "Secret")
    assert {each["name"] for each in every(objects, "secretKeyRef")} == {"latentac-s3"}


@pytest.mark.parametrize("name", SETS)
def test_every_image_can_be_named_by_digest(name: str) -> None:
    """With digests in the values no image is left that a registry could change, in pods and in what the steps read."""
    options = [f"--set=images.{image}.digest={values['digest']}" for image, values in DIGESTS.items()]
    objects = render(SETS[name], *options)
    settings = yaml.safe_load(find(objects, "ConfigMap", "rel-cluster", NAMESPACE)["data"]["cluster.yaml"])
    images = [*every(objects, "image"), *(settings["images"][each] for each in ("pipeline", "train", "serve"))]
    assert len(images) > 5
    assert not [image for image in images if not re.fullmatch(r"[^@:]+(:\d+/[^@:]+)?@sha256:[0-9a-f]{64}", image)]


@pytest.mark.parametrize("name", SETS)
def test_pods_are_restricted(name: str) -> None:
    """Each pod meets PodSecurity's level restricted, with a read-only root, a numeric user where one is wanted, no
    token of the API server, and a place for temporary files."""
    seen = 0
    for where, pod in pods(render(SETS[name])):
        spec, seen = pod["spec"], seen + 1
        if not where.startswith("ServingRuntime"):  # KServe has these on the predictor
            assert spec["automountServiceAccountToken"] is False, where
            assert spec["securityContext"]["runAsNonRoot"] is True, where
            assert ("fsGroup" in spec["securityContext"]) == (name != "openshift"), where
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume], where
        for container in spec["containers"]:
            security = container["securityContext"]
            user = {} if name == "openshift" else {"runAsUser": 65532, "runAsGroup": 65532}
            assert security == {
                "runAsNonRoot": True,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
                **user,
            }, where
            assert "tmp" in {mount["name"] for mount in container["volumeMounts"]}, where
            assert container["imagePullPolicy"] == "IfNotPresent", where
    assert seen >= 5


def test_rights_are_namespaced_and_named() -> None:
    """No ClusterRole, no wildcard; workers and endpoint have no rights and no token."""
    objects = render(EVERYTHING)
    assert not [each["kind"] for each in objects if each["kind"].startswith("ClusterRole")]
    for role in of_kind(objects, "Role"):
        for rule in role["rules"]:
            assert "*" not in json.dumps(rule), role["metadata"]["name"]
    granted = {subject["name"] for each in of_kind(objects, "RoleBinding") for subject in each["subjects"]}
    assert granted == {"rel-pipeline"}
    for name in ("rel-train", "rel-serve"):
        assert find(objects, "ServiceAccount", name)["automountServiceAccountToken"] is False


def test_the_steps_may_read_the_secrets_of_their_artifacts_alone() -> None:
    """By name: those of KFP's launcher, and with its settings in the chart that of the store."""
    for values, expected in (
        ("evaluation", {"mlpipeline-minio-artifact"}),
        (EVERYTHING, {"mlpipeline-minio-artifact", "rel-s3"}),
        ({**EVERYTHING, "pipeline": {"artifactSecrets": [], "launcherConfig": {"enabled": False}}}, set()),
    ):
        rules = [rule for role in of_kind(render(values), "Role") for rule in role["rules"]]
        named = [rule for rule in rules if "secrets" in rule["resources"]]
        assert {name for rule in named for name in rule["resourceNames"]} == expected
        assert all(rule["verbs"] == ["get"] and rule["resources"] == ["secrets"] for rule in named)
        settings = [rule for rule in rules if "configmaps" in rule["resources"]]
        assert [(rule["resourceNames"], rule["verbs"]) for rule in settings] == [(["kfp-launcher"], ["get"])]


def test_the_endpoint_can_ask_for_a_token() -> None:
    """It comes from a Secret as a file, into the serving container alone; without one nothing is mounted."""
    serving = {"tokenSecret": "door", "allowedHosts": ["draw.example"], "allowedOrigins": ["https://app.example"]}
    spec = find(render({**EVERYTHING, "serving": serving}), "ServingRuntime", "rel")["spec"]
    (container,) = spec["containers"]
    assert container["args"][-3:] == [
        "--allow-host=draw.example", "--allow-origin=https://app.example", "--token-file=/etc/latentac-token/token",
    ]  # fmt: skip
    assert {"name": "token", "mountPath": "/etc/latentac-token", "readOnly": True} in container["volumeMounts"]
    secret = {"secretName": "door", "items": [{"key": "token", "path": "token"}]}
    assert {"name": "token", "secret": secret} in spec["volumes"]
    assert "token" not in json.dumps(find(render(EVERYTHING), "ServingRuntime", "rel")["spec"])


def test_rights_follow_the_features() -> None:
    """Without an endpoint the steps may not touch KServe, without a gateway no route."""
    without = json.dumps(of_kind(render({**EVERYTHING, "serving": {"enabled": False}}), "Role"))
    assert "kserve" not in without
    assert "deployments" not in without
    assert "httproutes" not in json.dumps(of_kind(render("evaluation"), "Role"))
    assert "httproutes" in json.dumps(of_kind(render(EVERYTHING), "Role"))


def test_cluster_scoped_objects_only_when_asked_for() -> None:
    """Only a queue is outside of namespaces, and it is off by default; the others name the release's or the steps'."""
    for name in CI:
        scoped = [each["kind"] for each in render(name) if "namespace" not in each["metadata"]]
        assert scoped == (["Queue"] if name == "gpu-production" else [])

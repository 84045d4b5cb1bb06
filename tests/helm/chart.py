"""Renders the chart with a real Helm, and finds things in what comes out."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tools.binaries import program
from tools.golang import Unavailable

CHART = Path(__file__).parents[2] / "helm" / "latentac"
CI = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*.yaml"))}
HELMS = ("helm", "helm3")
RELEASE, NAMESPACE = "rel", "models"
KUBERNETES = "1.34.4"
DIGEST = "sha256:" + "ab" * 32
ACCESS_KEY, SECRET_KEY = "MarkerAccessKey", "MarkerSecretKey0123"
DIGESTS = {name: {"digest": DIGEST} for name in ("pipeline", "train", "serve", "minio")}

BUNDLED: dict[str, Any] = {"minio": {"enabled": True}, "store": {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}}
"""The least values that install something, with credentials that are easy to find again."""

EVERYTHING: dict[str, Any] = {
    "images": {**DIGESTS, "pullSecrets": ["registry"]},
    "store": {
        **BUNDLED["store"],
        "url": "s3://bucket/some/prefix",
        "endpoint": "https://s3.example.com:8443",
        "caConfigMap": "authority",
    },
    "pipeline": {"namespace": "kubeflow", "upload": {"enabled": True}, "launcherConfig": {"enabled": True}},
    "train": {"queue": {"name": "models", "create": True, "capability": {"cpu": 4}}, "secrets": ["hub"]},
    "serving": {
        "gateway": {"name": "public", "namespace": "gateways", "hostname": "a.example", "address": "http://gateway"}
    },
    "rewardServers": {"jpeg": {"reward": "jpeg_compressibility", "settings": {"timeout_seconds": 60}}},
    "networkPolicy": {"clients": ["web"], "extraEgress": [{"ports": [{"port": 443}]}]},
    "monitoring": {"serviceMonitor": True, "alerts": True, "labels": {"release": "prometheus"}},
    "resourceQuota": {"enabled": True, "hard": {"pods": 10}},
}
"""Every option that can be on beside a store of one's own."""

BUNDLED_EVERYTHING: dict[str, Any] = {
    **EVERYTHING,
    **BUNDLED,
    "minio": {"enabled": True, "persistence": {"enabled": True, "storageClass": "fast"}},
}

Object = dict[str, Any]


class Refused(RuntimeError):
    """Helm did not render the chart; the message is its own."""


def helm(*arguments: str, name: str = "helm", stdin: str = "") -> str:
    """stdout of a Helm; skips the test where the program is not built. Raises Refused."""
    try:
        binary = str(program(name))
    except Unavailable as reason:
        pytest.skip(str(reason))
    done = subprocess.run([binary, *arguments], input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


def render(values: Mapping[str, Any] | str | None = None, *options: str, name: str = "helm") -> list[Object]:
    """The chart's objects by the values given: a mapping, or the name of a set of ci values. Raises Refused."""
    given = json.dumps({} if values is None else values, sort_keys=True)
    return [json.loads(each) for each in _rendered(given, options, name)]


@cache
def _rendered(values: str, options: tuple[str, ...], name: str) -> tuple[str, ...]:
    decoded = json.loads(values)
    source = ("-f", str(CI[decoded])) if isinstance(decoded, str) else ("-f", "-")
    text = helm(
        *("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", KUBERNETES, *source, *options),
        name=name,
        stdin="" if isinstance(decoded, str) else values,
    )
    return tuple(json.dumps(each) for each in yaml.load_all(text, yaml.CSafeLoader) if each)


def find(objects: list[Object], kind: str, name: str, namespace: str | None = None) -> Object:
    """The one object of that kind and name."""
    [found] = [
        each
        for each in objects
        if (each["kind"], each["metadata"]["name"]) == (kind, name)
        and namespace in (None, each["metadata"].get("namespace"))
    ]
    return found


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [each for each in objects if each["kind"] == kind]


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """`kind name` and the pod (metadata and spec) that each object makes; a ServingRuntime's is in the same form."""
    for each in objects:
        where = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield where, each
        elif each["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield where, each["spec"]["template"]
        elif each["kind"] == "ServingRuntime":
            yield where, {"metadata": {"labels": each["spec"]["labels"]}, "spec": each["spec"]}


def every(value: Any, key: str) -> Iterator[Any]:
    """What stands under `key` anywhere in the value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from every(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from every(inner, key)


def settings_of(objects: list[Object], namespace: str = NAMESPACE) -> str:
    """The text of cluster.yaml."""
    return str(find(objects, "ConfigMap", f"{RELEASE}-cluster", namespace)["data"]["cluster.yaml"])


def strict_problems(custom: Object, crd: Object) -> list[str]:
    """Where an object of a custom kind does not fit its CRD, or has a field that is unknown there."""
    (schema,) = [
        version["schema"]["openAPIV3Schema"]
        for version in crd["spec"]["versions"]
        if f"{crd['spec']['group']}/{version['name']}" == custom["apiVersion"]
    ]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    validator = Draft202012Validator(_strict(schema))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(custom)]


def _strict(schema: Any) -> Any:
    """A CRD's schema in JSON Schema's words, with every field refused that it does not name."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict.pop("pattern", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and "type" in schema and not open_ended:
        strict["additionalProperties"] = False
    return strict

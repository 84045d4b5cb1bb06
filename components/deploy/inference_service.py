"""The objects of a release: a ServingRuntime named by its content, and the InferenceService that serves one version.

Where a field may stand follows KServe's rules: grace period, security context, init containers and strategy only on
the predictor; its tolerations replace the runtime's; volumes, pull secrets and node selectors are united. KServe
copies labels and annotations of the InferenceService to the pods, so whatever changes there rolls them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentac.components.cluster.objects import (
    CONTAINER_SECURITY,
    RUN,
    ca_volume,
    labels,
    pod_security,
    store_environment,
)
from latentac.components.cluster.settings import Cluster
from latentac.system.errors import ConfigError, Problem

REVISION = "latentac.io/revision"
"""Annotation: what the whole object says, as a digest. A pod that has it was made from just this object."""

VERSION = "latentac.io/version"
PROJECT = "latentac.io/project"
MODEL_FOLDER = "/mnt/models"
FETCHER = "storage-initializer"
"""Name of our init container. KServe injects its own, which PodSecurity `restricted` refuses, unless one has it."""

_MOST_CHARACTERS = 63
_FETCHER_RESOURCES = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}


@dataclass(frozen=True)
class Model:
    """A published version. project: whose; store: URL of the store; folder: of its files in there, a plain exported
    folder."""

    project: str
    run: str
    version: str
    store: str
    folder: str


def green_name(settings: Cluster) -> str:
    """Of the second InferenceService, on which a release is tried before users get it."""
    return f"{settings.deploy.name}-green"


def predictor(name: str) -> str:
    """Name of the Deployment and of the Service that KServe makes for an InferenceService."""
    return f"{name}-predictor"


def check_names(settings: Cluster) -> None:
    """Raises ConfigError for a name that the API server takes and KServe then cannot reconcile."""
    longest = f"{predictor(green_name(settings))}-{settings.namespace}"
    if len(longest) > _MOST_CHARACTERS:
        most = len(settings.deploy.name) - (len(longest) - _MOST_CHARACTERS)
        problem = f"KServe would make the host name {longest}, of {len(longest)} characters"
        remedy = f"At most {_MOST_CHARACTERS} are allowed: "
        remedy += f"use a name of at most {most}." if most > 0 else "use a namespace with a shorter name."
        raise ConfigError([Problem("deploy.name", settings.deploy.name, problem, remedy)])


def check_project(settings: Cluster, live: Mapping[str, Any] | None, project: str) -> None:
    """Raises ConfigError where the endpoint is another project's: by the settings, and where they name none, by what it
    serves. One release of the chart has one endpoint."""
    served = ((live or {}).get("metadata", {}).get("annotations") or {}).get(PROJECT, "")
    owner = settings.deploy.project or served
    if owner and owner != project:
        problem = f"the endpoint {settings.deploy.name} of release {settings.release} is that of project {owner}"
        remedy = "Install another release of the chart for it, or give it this endpoint with its value serving.project."
        raise ConfigError([Problem("project", project, problem, remedy)])


def content_runtime(template: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the chart's ServingRuntime under a name that its content gives.

    An edit of a ServingRuntime rolls all that uses it; nothing but a release shall roll what is served.
    """
    spec = template["spec"]
    name = f"{template['metadata']['name']}-{_digest(spec)[:8]}"
    kept = {key: value for key, value in labels("serve", "").items() if key != RUN}  # it outlives its first run
    metadata = {"name": name, "namespace": template["metadata"]["namespace"], "labels": kept}
    return {"apiVersion": "serving.kserve.io/v1alpha1", "kind": "ServingRuntime", "metadata": metadata, "spec": spec}


def with_owners(
    runtime: Mapping[str, Any], live: Mapping[str, Any] | None, owner: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`runtime` with the owners that `live` has, and `owner`: it goes when the last of them goes."""
    owners = {each["uid"]: each for each in ((live or {}).get("metadata", {}).get("ownerReferences") or [])}
    if owner:
        reference = {field: owner[field] for field in ("apiVersion", "kind")}
        owners[owner["metadata"]["uid"]] = reference | {field: owner["metadata"][field] for field in ("name", "uid")}
    metadata = {field: runtime["metadata"][field] for field in ("name", "namespace", "labels")}
    return {
        **{field: runtime[field] for field in ("apiVersion", "kind", "spec")},
        "metadata": {**metadata, **_given("ownerReferences", list(owners.values()))},
    }


def inference_service(
    settings: Cluster, name: str, model: Model, runtime: str, *, replicas: int, notes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The InferenceService `name` that serves `model` by `runtime`; notes: further annotations."""
    deploy = settings.deploy
    body: dict[str, Any] = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "namespace": settings.namespace,
            "labels": labels("serve", model.run),
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "none",
                VERSION: model.version,
                PROJECT: model.project,
                **(notes or {}),
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": replicas,
                "maxReplicas": replicas,
                "deploymentStrategy": _strategy(deploy.strategy),
                "terminationGracePeriodSeconds": deploy.grace_seconds,
                "serviceAccountName": deploy.service_account,
                "automountServiceAccountToken": False,
                "securityContext": pod_security(settings.security),
                "initContainers": [_fetcher(settings, model)],
                "volumes": [{"name": "model", "emptyDir": {}}, *ca_volume(settings)[0]],
                **_given("imagePullSecrets", [{"name": secret} for secret in settings.images.pull_secrets]),
                **_given("nodeSelector", deploy.node_selector),
                **_given("tolerations", deploy.tolerations),
                "model": {
                    "modelFormat": {"name": "latentac"},
                    "runtime": runtime,
                    "protocolVersion": "v2",
                    "storageUri": f"{model.store.rstrip('/')}/{model.folder}",
                    "volumeMounts": [{"name": "model", "mountPath": MODEL_FOLDER, "readOnly": True}],
                    **_given("resources", deploy.resources.model_dump(exclude_defaults=True)),
                },
            }
        },
    }
    return with_revision(body)


def with_revision(body: dict[str, Any]) -> dict[str, Any]:
    """`body` with the digest of the rest of it among its annotations."""
    metadata = body["metadata"]
    notes = {key: value for key, value in metadata["annotations"].items() if key != REVISION}
    digest = _digest([metadata["labels"], notes, body["spec"]])[:16]
    return {**body, "metadata": {**metadata, "annotations": {**notes, REVISION: digest}}}


def revision(body: Mapping[str, Any] | None) -> str:
    """The revision that an object carries; "" for none."""
    return str(((body or {}).get("metadata", {}).get("annotations") or {}).get(REVISION, ""))


def restorable(live: Mapping[str, Any]) -> dict[str, Any]:
    """What must be applied to have `live` again: its spec, and those of its labels and annotations that we set."""
    metadata = live["metadata"]
    kept = {
        field: {key: value for key, value in (metadata.get(field) or {}).items() if _is_ours(key)}
        for field in ("labels", "annotations")
    }
    return {
        "apiVersion": live["apiVersion"],
        "kind": live["kind"],
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], **kept},
        "spec": live["spec"],
    }


def _is_ours(key: str) -> bool:
    return key.partition("/")[0] in ("latentac.io", "app.kubernetes.io", "serving.kserve.io")


def _strategy(kind: str) -> dict[str, Any]:
    """With RollingUpdate the old pod leaves when the new one is ready, never before."""
    if kind == "Recreate":
        return {"type": kind}
    return {"type": kind, "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def _fetcher(settings: Cluster, model: Model) -> dict[str, Any]:
    """Copies the model, verified, into the pod. Its last words become the container's message when it fails."""
    mounts = [{"name": "model", "mountPath": MODEL_FOLDER}, *ca_volume(settings)[1]]
    command = ["latentac", "fetch-model", "--version", model.version, "--store", model.store, "--to", MODEL_FOLDER]
    return {
        "name": FETCHER,
        "image": settings.images.pipeline,
        "imagePullPolicy": settings.images.pull_policy,
        "args": command,
        "env": [
            *({"name": name, "value": value} for name, value in store_environment(settings).items()),
            *(_secret(settings.store.secret, name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")),
        ],
        "resources": _FETCHER_RESOURCES,
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _secret(name: str, key: str) -> dict[str, Any]:
    return {"name": key, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def _given(field: str, value: Any) -> dict[str, Any]:
    return {field: value} if value else {}


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

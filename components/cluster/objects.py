"""What the objects that steps make have in common: labels, who they run as, how they reach the store."""

import hashlib
import re
from typing import Any

from latentac.components.cluster.settings import Cluster, Security

RUN = "latentac.io/run"
"""Label of what a run made; the same as an annotation holds the run's id as it is."""

CA_FOLDER = "/etc/latentac-ca"

CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


def label(text: str) -> str:
    """`text` as the value of a label: itself where it can be one, else what is left of it and a digest."""
    if re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", text):
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', text)[:50].strip('-')}-{digest}".lstrip("-")


def labels(component: str, run: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/part-of": "latentac",
        "app.kubernetes.io/managed-by": "latentac",
        "app.kubernetes.io/component": component,
        RUN: label(run),
    }


def pod_security(security: Security) -> dict[str, Any]:
    """The pod's security context; a user that is None is the cluster's to choose."""
    users = {"runAsUser": security.user, "runAsGroup": security.group, "fsGroup": security.fs_group}
    chosen = {name: user for name, user in users.items() if user is not None}
    return {"runAsNonRoot": True, **chosen, "seccompProfile": {"type": "RuntimeDefault"}}


def store_environment(settings: Cluster) -> dict[str, str]:
    """Where the store is. Its credentials come from the Secret `settings.store.secret`, whole, as environment."""
    authorities = {"LATENTAC_S3_CA": f"{CA_FOLDER}/ca.crt"} if settings.store.ca_config_map else {}
    return {"LATENTAC_S3_ENDPOINT": settings.store.endpoint, "AWS_REGION": settings.store.region, **authorities}


def ca_volume(settings: Cluster) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and mounts for the store's certificate authority; empty where the system's authorities do."""
    if not settings.store.ca_config_map:
        return [], []
    volume = {"name": "latentac-ca", "configMap": {"name": settings.store.ca_config_map}}
    return [volume], [{"name": "latentac-ca", "mountPath": CA_FOLDER, "readOnly": True}]

"""The pods that Volcano makes of a job, for a control plane that has neither Volcano nor a node.

There the tests bring pods into states that Volcano on a node reaches by chance only: unschedulable for one reason, an
image that is missing, a phase at a moment. On a node the real Volcano makes them.
"""

import copy
from collections.abc import Mapping
from typing import Any


def pod_of(job: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """The pod that Volcano makes of a task's template."""
    name, template = job["metadata"]["name"], copy.deepcopy(task["template"])
    metadata, spec = template.get("metadata", {}), template["spec"]
    marks = {**_marks(job), "volcano.sh/task-spec": task["name"], "volcano.sh/task-index": "0"}
    marks["volcano.sh/queue-name"] = job["spec"]["queue"]
    notes = {"scheduling.k8s.io/group-name": f"{name}-{job['metadata']['uid']}", "volcano.sh/template-uid": ""}
    spec |= {"hostname": f"{name}-{task['name']}-0", "subdomain": name}
    volume = f"{name}-svc"
    spec.setdefault("volumes", []).append({"name": volume, "configMap": {"name": volume}})
    for container in spec["containers"]:
        container.setdefault("env", [])
        container["env"] += [{"name": key, "value": "0"} for key in ("VK_TASK_INDEX", "VC_TASK_INDEX")]
        container["env"] += [
            {"name": key, "valueFrom": {"configMapKeyRef": {"name": volume, "key": key}}}
            for key in hosts(job)
            if key.startswith("VC_")
        ]
        container.setdefault("volumeMounts", []).append({"name": volume, "mountPath": "/etc/volcano"})
    return {
        "metadata": {
            "name": f"{name}-{task['name']}-0",
            "labels": {**metadata.get("labels", {}), **marks},
            "annotations": {**metadata.get("annotations", {}), **marks, **notes},
            "ownerReferences": [_owner(job)],
        },
        "spec": spec,
    }


def hosts(job: Mapping[str, Any]) -> dict[str, str]:
    """The ConfigMap of the plugin `svc`: where each task's pods are found."""
    name = job["metadata"]["name"]
    found: dict[str, str] = {}
    for task in job["spec"]["tasks"]:
        address, key = f"{name}-{task['name']}-0.{name}", task["name"].replace("-", "_").upper()
        found |= {f"{task['name']}.host": address, f"VC_{key}_HOSTS": address, f"VC_{key}_NUM": "1"}
    return found


def _marks(job: Mapping[str, Any]) -> dict[str, str]:
    return {
        "volcano.sh/job-name": job["metadata"]["name"],
        "volcano.sh/job-namespace": job["metadata"]["namespace"],
    }


def _owner(job: Mapping[str, Any]) -> dict[str, Any]:
    metadata = job["metadata"]
    fields = {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "name": metadata["name"],
        "uid": metadata["uid"],
    }
    return {**fields, "controller": True, "blockOwnerDeletion": True}

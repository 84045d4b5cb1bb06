"""The training app as a Volcano job: what TorchX makes of it, shaped so that it survives faults.

TorchX's defaults survive none. Here a lost worker is started again by its agent; a lost replica comes back by itself
(RestartPod) and joins the others; replica 0 holds the rendezvous, so its loss starts the job anew (RestartJob), from
the last checkpoint; and its end is the job's (CompleteJob).
"""

import hashlib
from decimal import Decimal
from typing import Any

from kubernetes.client import ApiClient
from torchx import specs
from torchx.components import dist
from torchx.specs.overlays import PUT, set_overlay

from latentac.components.cluster.objects import (
    CONTAINER_SECURITY,
    RUN,
    ca_volume,
    labels,
    pod_security,
    store_environment,
)
from latentac.components.cluster.settings import Cluster, Train
from latentac.config.schema import Config
from latentac.runs.failures import ATTEMPT as ATTEMPT_VARIABLE
from latentac.runs.workers.lease import SECONDS as LEASE_VARIABLE
from latentac.system.errors import ConfigError, Problem

ROLE = "worker"
CONFIG = "latentac.io/config"
"""Annotation: hash of the configuration that the job trains."""

ATTEMPT = "latentac.io/attempt"
"""Annotation: this submission, as the failures name it that the workers leave in the store."""

JOB_NAME = "volcano.sh/job-name"
"""Label that Volcano gives to a job's pods."""

# last_call_timeout: each start of fewer agents than the maximum waits that long for more of them.
_RENDEZVOUS = "join_timeout=600,last_call_timeout=5,close_timeout=10,timeout=600"
_LOST = ["PodFailed", "PodEvicted"]
_UNITS = {"m": Decimal("0.001"), "k": Decimal(1000)}


def job_name(namespace: str, run: str, config_hash: str) -> str:
    """The same for each submission of a run, so that a step which is started again finds its job."""
    return f"latentac-{hashlib.sha256(f'{namespace}/{run}/{config_hash}'.encode()).hexdigest()[:12]}"


def check_replicas(train: Train, config: Config) -> None:
    """Raises ConfigError unless every number of workers that the app may have leaves each a block of an iteration."""
    problems = []
    if train.min_replicas > train.max_replicas:
        problem, remedy = f"is more than train.max_replicas = {train.max_replicas}", "Correct it in the chart's values."
        problems.append(Problem("train.min_replicas", train.min_replicas, problem, remedy))
    images, block = config.train.images_per_iteration, config.train.block_images
    most = train.max_replicas * train.processes
    if most > config.train.num_blocks:
        problem = (
            f"makes {config.train.num_blocks} blocks of {block}, and the cluster's train.max_replicas x processes = "
            f"{train.max_replicas} x {train.processes} allows {most} workers, of which each needs a block"
        )
        remedy = f"Use at least {most * block}, smaller blocks, or fewer replicas in the chart's values."
        problems.append(Problem("train.images_per_iteration", images, problem, remedy))
    if problems:
        raise ConfigError(problems)


def app(settings: Cluster, run: str, store: str, attempt: str) -> specs.AppDef:
    """The app with what TorchX lets one say of its pods: command, environment, and the overlay of pod-level fields."""
    train = settings.train
    definition = dist.torchrun(
        *(run, store, "/work"),
        m="latentac.runs.workers.supervisor",
        name=ROLE,
        image=settings.images.train,
        j=f"{train.min_replicas}:{train.max_replicas}x{train.processes}",
        rdzv_conf=_RENDEZVOUS,
        env={
            "PET_MAX_RESTARTS": str(train.max_restarts),
            # Below the pod's own grace period, or the agent kills the workers before their checkpoint is written.
            "PET_SHUTDOWN_TIMEOUT": str(max(1, train.grace_seconds - 10)),
            # Without it a replica that is replaced or added hangs a minute and fails (torch 2.13).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "OMP_NUM_THREADS": str(_threads(train)),
            ATTEMPT_VARIABLE: attempt,
            LEASE_VARIABLE: str(train.lease_seconds),
            **store_environment(settings),
        },
    )
    definition.roles[0].name = ROLE  # TorchX names it after the module
    set_overlay(definition.roles[0], "kubernetes", "V1Pod", _overlay(settings))
    return definition


def options(settings: Cluster) -> dict[str, Any]:
    """TorchX's options for the scheduler `kubernetes`."""
    train = settings.train
    return {
        "queue": train.queue,
        "namespace": settings.namespace,
        "service_account": train.service_account,
        "validate_spec": False,  # a trial submission that hides the server's reason
        **({"priority_class": train.priority_class} if train.priority_class else {}),
    }


def shape(made: Any, settings: Cluster, name: str, run: str, config_hash: str, attempt: str) -> dict[str, Any]:
    """`made`, the object that TorchX would submit, with what TorchX has no words for."""
    job: dict[str, Any] = ApiClient().sanitize_for_serialization(made)
    train, marks = settings.train, labels("train", run)
    job["metadata"] = {
        "name": name,
        "namespace": settings.namespace,
        "labels": marks,
        "annotations": {RUN: run, CONFIG: config_hash, ATTEMPT: attempt},
    }
    spec = job["spec"]
    # The webhook's default of 3 is used up by three faults of a run that may take days, and never goes down.
    spec |= {"maxRetry": train.max_retries, "ttlSecondsAfterFinished": train.keep_seconds}
    for index, task in enumerate(spec["tasks"]):
        task["policies"] = [{"events": _LOST, "action": "RestartPod" if index else "RestartJob"}]
        if index == 0:
            task["policies"].append({"event": "TaskCompleted", "action": "CompleteJob"})
        template = task["template"]
        template["metadata"]["labels"] |= {**marks, "app.kubernetes.io/name": "latentac-train"}
        template["metadata"]["labels"]["app.kubernetes.io/instance"] = name
        _shape_container(template["spec"]["containers"][0], settings, name)
    return job


def _shape_container(container: dict[str, Any], settings: Cluster, name: str) -> None:
    train = settings.train
    _, ca_mounts = ca_volume(settings)
    container |= {
        "imagePullPolicy": settings.images.pull_policy,
        "securityContext": CONTAINER_SECURITY,
        "resources": train.resources.model_dump(),
        "envFrom": [
            *({"secretRef": {"name": secret}} for secret in (settings.store.secret, *train.secrets)),
            *({"configMapRef": {"name": config_map}} for config_map in train.config_maps),
        ],
    }
    container["volumeMounts"] += [
        {"name": "work", "mountPath": "/work"},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod's own
        *ca_mounts,
    ]
    for variable in container["env"]:
        if variable["name"] == "TORCHX_JOB_ID":  # TorchX leaves the namespace out, and cannot read that back
            variable["value"] = handle(settings, name)


def requests_of(job: dict[str, Any]) -> dict[str, str]:
    """What a pod of the job requests, resource -> quantity. A limit without a request is one."""
    resources = job["spec"]["tasks"][0]["template"]["spec"]["containers"][0].get("resources") or {}
    return {**(resources.get("limits") or {}), **(resources.get("requests") or {})}


def handle(settings: Cluster, name: str) -> str:
    """TorchX's handle of the job, good in any process."""
    return f"kubernetes://torchx/{settings.namespace}:{name}"


def _overlay(settings: Cluster) -> dict[str, Any]:
    train = settings.train
    ca_volumes, _ = ca_volume(settings)
    volumes = [
        {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": train.shared_memory}},
        {"name": "work", "emptyDir": {"sizeLimit": train.work_size}},
        {"name": "tmp", "emptyDir": {}},
        *ca_volumes,
    ]
    return {
        "spec": {
            PUT("volumes"): volumes,  # TorchX's own /dev/shm has no bound
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": pod_security(settings.security),
            "terminationGracePeriodSeconds": train.grace_seconds,
            **({"nodeSelector": train.node_selector} if train.node_selector else {}),
            **({"tolerations": train.tolerations} if train.tolerations else {}),
            **({"priorityClassName": train.priority_class} if train.priority_class else {}),
            **(
                {"imagePullSecrets": [{"name": name} for name in settings.images.pull_secrets]}
                if settings.images.pull_secrets
                else {}
            ),
        }
    }


def _threads(train: Train) -> int:
    """Arithmetic threads of a worker: its share of the pod's CPU request."""
    asked = train.resources.requests.get("cpu") or train.resources.limits.get("cpu") or "1"
    unit = _UNITS.get(asked[-1])
    cores = Decimal(asked[:-1]) * unit if unit else Decimal(asked)
    return max(1, int(cores / train.processes))

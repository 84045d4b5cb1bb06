"""The graph for one cluster: its images, secrets and resources on every task, and the files that it compiles to.

All of it lands on the steps' pods alone. The pods that KFP makes beside them (its drivers) know none of it.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from kfp import compiler, dsl, kubernetes
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from latentac.components.cluster.settings import KEY as FILE
from latentac.components.cluster.settings import MOUNT, SETTINGS, Cluster, Placement
from latentac.pipelines.pipeline import NAME, compose
from latentac.serving.client import TOKEN
from latentac.system.errors import ConfigError, Problem
from latentac.system.steps import SCORING

WORK = "/work"
"""`output` on a cluster: scratch space that goes with the pod."""

AUTHORITIES = "/etc/latentac-ca"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where torch's workers look for it
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

_DAY = 24 * 3600
_SECONDS = {"train": 14 * _DAY, "finish": _DAY // 4}
"""How long a step's pod may run; not counted before a node is found for it. train waits for the whole training."""

_ACCELERATOR = "/"  # a resource with a vendor's name: nvidia.com/gpu


def compile_pipeline(settings: Cluster, target: Path, *, own_id: bool = False) -> str:
    """Write the pipeline's YAML for the cluster of `settings`; returns the name of its version, a hash of its content.

    own_id: see `compose`. The same settings and source give the same bytes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(
        _pipeline(settings, own_id), str(target), pipeline_parameters=_defaults(settings, own_id)
    )
    return _version(target)


def compile_manifests(settings: Cluster, target: Path) -> None:
    """The same as Kubernetes objects, a Pipeline and a PipelineVersion, for a KFP that keeps its pipelines in the
    Kubernetes API, by Helm or GitOps. The SDK cannot submit such a file."""
    with tempfile.TemporaryDirectory() as folder:
        version = compile_pipeline(settings, Path(folder) / "pipeline.yaml")
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(
        _pipeline(settings),
        str(target),
        pipeline_parameters=_defaults(settings),
        kubernetes_manifest_format=True,
        kubernetes_manifest_options=KubernetesManifestOptions(
            pipeline_name=NAME,
            pipeline_version_name=f"{NAME}-{version}",
            namespace=settings.steps.namespace,
            include_pipeline_manifest=True,
        ),
    )


def _pipeline(settings: Cluster, own_id: bool = False) -> dsl.base_component.BaseComponent:
    return compose(partial(platform, settings=settings), own_id=own_id)


def _defaults(settings: Cluster, own_id: bool = False) -> dict[str, str]:
    """`run` has none where a person starts it: a second run under a known id goes on with the first."""
    return {"store": settings.store.url, "output": WORK, **({"run": "-"} if own_id else {})}


def _version(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def platform(task: dsl.PipelineTask, settings: Cluster) -> None:
    """Everything that a step's pod needs on the cluster of `settings`. Raises ConfigError for resources that KFP
    cannot ask for."""
    compute = task.name in SCORING
    task.set_container_image(settings.images.train if compute else settings.images.pipeline)
    kubernetes.set_image_pull_policy(task, settings.images.pull_policy)
    if settings.images.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(settings.images.pull_secrets))
    _store(task, settings)
    if task.name == "deploy" and settings.deploy.token_secret:
        kubernetes.use_secret_as_env(task, settings.deploy.token_secret, {"token": TOKEN})
    task.set_env_variable(SETTINGS, f"{MOUNT}/{FILE}")
    kubernetes.use_config_map_as_volume(task, f"{settings.release}-cluster", MOUNT)
    kubernetes.empty_dir_mount(task, "work", WORK, size_limit=settings.steps.work_size)
    if compute:
        kubernetes.empty_dir_mount(task, "shm", SHARED_MEMORY, medium="Memory", size_limit=settings.steps.shared_memory)
    _place(task, settings.steps.compute if compute else settings.steps.launch, "compute" if compute else "launch")
    security = settings.security
    kubernetes.set_security_context(task, security.user, security.group, run_as_non_root=True)
    for label, value in _labels(settings).items():
        kubernetes.add_pod_label(task, label, value)
    kubernetes.set_timeout(task, _SECONDS.get(task.name, 2 * _DAY))


def _labels(settings: Cluster) -> Mapping[str, str]:
    """The network policies select by these. A run's id is a parameter, which no label can be."""
    return {
        "app.kubernetes.io/part-of": "latentac",
        "app.kubernetes.io/managed-by": "latentac",
        "app.kubernetes.io/component": "pipeline",
        "app.kubernetes.io/instance": settings.release,
    }


def _store(task: dsl.PipelineTask, settings: Cluster) -> None:
    task.set_env_variable("LATENTAC_S3_ENDPOINT", settings.store.endpoint)
    task.set_env_variable("AWS_REGION", settings.store.region)
    kubernetes.use_secret_as_env(task, settings.store.secret, {name: name for name in SECRETS})
    if settings.store.ca_config_map:
        kubernetes.use_config_map_as_volume(task, settings.store.ca_config_map, AUTHORITIES)
        task.set_env_variable("LATENTAC_S3_CA", f"{AUTHORITIES}/ca.crt")


def _place(task: dsl.PipelineTask, placement: Placement, where: str) -> None:
    resources = placement.resources
    setters: dict[tuple[str, str], Callable[[str], object]] = {
        ("requests", "cpu"): task.set_cpu_request,
        ("requests", "memory"): task.set_memory_request,
        ("limits", "cpu"): task.set_cpu_limit,
        ("limits", "memory"): task.set_memory_limit,
    }
    for kind, quantities in (("requests", resources.requests), ("limits", resources.limits)):
        for name, quantity in quantities.items():
            if (kind, name) in setters:
                setters[kind, name](quantity)
            elif _ACCELERATOR in name:
                task.set_accelerator_type(name).set_accelerator_limit(quantity)
            else:
                remedy = "Ask for cpu, memory and accelerators (vendor/resource)."
                path = f"steps.{where}.resources.{kind}.{name}"
                raise ConfigError([Problem(path, quantity, "Kubeflow Pipelines cannot ask for it", remedy)])
    for label, value in placement.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in placement.tolerations:
        kubernetes.add_toleration(
            task,
            key=toleration.get("key"),
            operator=toleration.get("operator"),
            value=toleration.get("value"),
            effect=toleration.get("effect"),
            toleration_seconds=toleration.get("tolerationSeconds"),
        )

"""What a cluster offers to the steps: one strict file, which the chart renders and every step of a run reads.

The chart's ConfigMap `<release>-cluster` holds it as cluster.yaml. It is mounted into the steps' pods, and
`latentac pipeline submit` reads it to compile the pipeline for that cluster. It holds no secret: those are named.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from latentac.config.fields import MAX_CHARACTERS, DuplicateKey, read_yaml, reason_of
from latentac.config.sections import Fraction, NonNegative, Positive, Rate, Section
from latentac.system.errors import ConfigError, Problem
from latentac.system.reading import read_given

SETTINGS = "LATENTAC_CLUSTER"
"""Environment variable: path of cluster.yaml. Where it is set, train and deploy work on the cluster."""

MOUNT = "/etc/latentac"
KEY = "cluster.yaml"
"""Where a step's pod finds the file: `<MOUNT>/<KEY>`."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Image = Annotated[str, Field(min_length=1)]
Quantities = dict[str, str]


class Images(Section):
    """References by tag or digest. pipeline: launches and decides; train: everything with torch; serve: the server."""

    pipeline: Image
    train: Image
    serve: Image
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pull_secrets: list[Name] = []


class S3(Section):
    """url: where artifacts go, s3://bucket/prefix; secret: holds AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY;
    ca_config_map: holds ca.crt, empty where the system's authorities do."""

    url: Annotated[str, Field(pattern=r"^s3://[^/\s]+(/\S+)?$")]
    endpoint: Annotated[str, Field(pattern=r"^https?://[^/@?#\s]+$")]
    region: str = "us-east-1"
    secret: Name
    ca_config_map: str = ""


class Security(Section):
    """The users of the pods; None leaves the choice to the cluster (OpenShift's security context constraints)."""

    user: Positive | None = 65532
    group: Positive | None = 65532
    fs_group: Positive | None = 65532


class Resources(Section):
    requests: Quantities = {}
    limits: Quantities = {}


class Placement(Section):
    """Where pods may run, as in a pod's spec."""

    resources: Resources = Resources()
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []


class Steps(Section):
    """The pods of the pipeline's steps. namespace: where Kubeflow Pipelines runs them; compute: prepare,
    pretrain-value, evaluate, steer; launch: train, gate, deploy, finish, which wait and decide."""

    namespace: Name
    service_account: Name
    compute: Placement = Placement()
    launch: Placement = Placement()
    work_size: str = "8Gi"
    shared_memory: str = "1Gi"


class Train(Placement):
    """The Volcano job's pods. replicas: pods, as `min:max` of an elastic app; processes: workers in each, one a GPU.

    pending_seconds: how long the job may wait for its pods before the step gives up; keep_seconds: how long a finished
    job stays to be looked at; lease_seconds: after how long without a launching step the job ends by itself; secrets,
    config_maps: further ones that the pods get as environment.
    """

    service_account: Name
    queue: Name = "default"
    min_replicas: Positive = 1
    max_replicas: Positive = 1
    processes: Positive = 1
    priority_class: str = ""
    shared_memory: str = "1Gi"
    work_size: str = "8Gi"
    max_restarts: Positive = 10
    max_retries: Positive = 50
    grace_seconds: Positive = 60
    pending_seconds: Rate = 900.0
    keep_seconds: Positive = 3600
    lease_seconds: Annotated[int, Field(ge=60, le=10**7)] = 900
    secrets: list[Name] = []
    config_maps: list[Name] = []


class Gateway(Section):
    """A Gateway of the Gateway API that splits traffic while a release is watched. weights: percent for the new
    version, in this order; address: where the deploy step reaches the gateway."""

    name: Name
    namespace: Name
    hostname: str
    address: Annotated[str, Field(pattern=r"^https?://[^/@?#\s]+$")]
    weights: list[Annotated[int, Field(gt=0, lt=100)]] = [10, 50]


class Deploy(Placement):
    """The InferenceService and how a release is judged. project: whose models it serves, "" for the first one's that is
    promoted; runtime: the ServingRuntime that the chart made, the template
    of those that releases use; ready_seconds: bound for one rollout; failing_seconds: how long a pod may stay in a
    state that could pass by itself (image pull, unschedulable) before the release is taken back; grace_seconds: what a
    pod gets to finish its requests, above the longest generation; token_secret: holds `token`, which the endpoint asks
    for, "" where it asks for none."""

    name: Name = "latentac"
    project: str = ""
    runtime: Name
    service_account: Name
    replicas: Positive = 1
    strategy: Literal["RollingUpdate", "Recreate"] = "RollingUpdate"
    ready_seconds: Rate = 900.0
    failing_seconds: Rate = 60.0
    grace_seconds: Positive = 120
    request_seconds: Rate = 120.0
    shadow_prompts: Positive = 8
    max_error_fraction: Fraction = 0.0
    max_latency_ratio: Rate = 1.5
    max_reward_loss: NonNegative = 0.05
    token_secret: str = ""
    gateway: Gateway | None = None


class Cluster(Section):
    """namespace: of the chart's release, where jobs, endpoint and secrets live."""

    release: Name
    namespace: Name
    images: Images
    store: S3
    security: Security = Security()
    steps: Steps
    train: Train
    deploy: Deploy


def resolve(fields: Mapping[str, Any], where: str) -> Cluster:
    """Settings from nested dictionaries; `where` names their source. Raises ConfigError with every problem at once."""
    try:
        return Cluster.model_validate(fields)
    except ValidationError as error:
        remedy = "Correct it in the chart's values and upgrade the release."
        raise ConfigError(
            [
                Problem(f"{where}: {'.'.join(map(str, found['loc']))}", found["input"], found["msg"].lower(), remedy)
                for found in error.errors(include_url=False)
            ]
        ) from None


def parse(text: str, where: str) -> Cluster:
    """Settings from YAML; `where` names its source. Raises ConfigError."""
    try:
        return resolve(read_yaml(text) or {}, where)
    except DuplicateKey as error:
        raise ConfigError([Problem(SETTINGS, where, str(error), "Keep one of them.")]) from None
    except yaml.YAMLError as error:
        problem = f"is not YAML: {reason_of(error)}"
        raise ConfigError([Problem(SETTINGS, where, problem, "Name the chart's file.")]) from None


def read(path: Path) -> Cluster:
    """Settings from a file. Raises ConfigError."""
    try:
        text = read_given(path, MAX_CHARACTERS + 1)  # one more than are read
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Name the chart's file."
        raise ConfigError([Problem(SETTINGS, str(path), f"cannot be read: {error}", remedy)]) from None
    return parse(text, path.name)


def here() -> Cluster | None:
    """The settings of the cluster that this process runs on; None off a cluster. Raises ConfigError."""
    named = os.environ.get(SETTINGS)
    return read(Path(named)) if named else None

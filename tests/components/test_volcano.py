"""The training job: its shape, and how it is submitted, adopted, followed, given up and stopped on a real API server.

Volcano's controller is not there: each test writes the job's status as the real one would.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config
from torchx.runner import get_runner

from latentac.components.cluster import settings as cluster_settings
from latentac.components.cluster.api import PODS, VOLCANO_JOBS, Api
from latentac.components.cluster.settings import Cluster
from latentac.components.train import job as jobs
from latentac.components.train.logs import _Seen
from latentac.components.train.volcano import LAST_WORDS, Volcano, abort
from latentac.components.train.waiting import Waiting
from latentac.runs import failures
from latentac.runs.configuration import resolve_recipe
from latentac.runs.workspace import Workspace
from latentac.store import open_store
from latentac.system.errors import ClusterError, ConfigError, RewardError, TrainingError
from tests.cluster.control_plane import ControlPlane
from tests.cluster.volcano import pod_of

RIGHTS = {
    ("create", "batch.volcano.sh/jobs"),
    ("get", "batch.volcano.sh/jobs"),
    ("list", "batch.volcano.sh/jobs"),
    ("delete", "batch.volcano.sh/jobs"),
    ("get", "batch.volcano.sh/jobs/status"),
    ("update", "batch.volcano.sh/jobs/status"),
    ("get", "core/pods"),
    ("list", "core/pods"),
    ("get", "core/pods/log"),
    ("list", "core/events"),
}
"""What the chart grants for training; `test_rights_are_just_those_that_are_used` compares it with the calls."""


def settings_of(namespace: str = "here", **train: Any) -> Cluster:
    return cluster_settings.resolve(
        {
            "release": "latentac",
            "namespace": namespace,
            "images": {"pipeline": "p:1", "train": "t:1", "serve": "s:1", "pull_secrets": ["mirror"]},
            "store": {
                "url": "s3://latentac/store",
                "endpoint": "https://minio:9000",
                "secret": "latentac-s3",
                "ca_config_map": "authorities",
            },
            "steps": {"namespace": namespace, "service_account": "latentac-pipeline"},
            "train": {"service_account": "latentac-train", "min_replicas": 1, "max_replicas": 2, **train},
            "deploy": {"runtime": "latentac", "service_account": "latentac-serve"},
        },
        "cluster.yaml",
    )


def workspace(folder: Path, run: str = "run-1", *overrides: str) -> Workspace:
    """A run that `prepare` has left, but for its backbone."""
    settings = resolve_recipe("shapes-unet-smoke", "", overrides)
    (folder / "made").mkdir(parents=True, exist_ok=True)
    (folder / "made" / "config.json").write_text(json.dumps(settings.model_dump()))
    (folder / run).mkdir(exist_ok=True)
    store = open_store(f"file://{folder}/store")
    prepared = store.publish(f"{run}/prepare", folder / "made", run=run, step="prepare", config_hash=settings.hash)
    return Workspace(run, store, folder / run, settings, prepared)


def shaped(settings: Cluster, run: str = "run-1") -> dict[str, Any]:
    """What would be submitted."""
    with get_runner() as runner:
        definition = jobs.app(settings, run, settings.store.url, "attempt-1")
        made = runner.dryrun(definition, "kubernetes", jobs.options(settings)).request.resource
    return jobs.shape(made, settings, jobs.job_name(settings.namespace, run, "c0ffee"), run, "c0ffee", "attempt-1")


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


# The shape


def test_job_survives_what_may_be_lost() -> None:
    """Replica 0 has the rendezvous, so its loss restarts the job and its end is the job's; others come back alone."""
    spec = shaped(settings_of(max_retries=7, keep_seconds=60, queue="batch"))["spec"]

    first, second = spec["tasks"]
    assert first["policies"] == [
        {"events": ["PodFailed", "PodEvicted"], "action": "RestartJob"},
        {"event": "TaskCompleted", "action": "CompleteJob"},
    ]
    assert second["policies"] == [{"events": ["PodFailed", "PodEvicted"], "action": "RestartPod"}]
    assert (first["minAvailable"], second["minAvailable"]) == (1, 0)
    assert (spec["maxRetry"], spec["ttlSecondsAfterFinished"], spec["queue"]) == (7, 60, "batch")
    assert spec["schedulerName"] == "volcano"
    assert spec["plugins"] == {"svc": ["--publish-not-ready-addresses"], "env": []}


def test_workers_meet_at_replica_0() -> None:
    """The command is torchrun's, elastic, with the store's URL and the work folder; replicas know replica 0 by DNS."""
    tasks = shaped(settings_of(max_replicas=3, processes=2))["spec"]["tasks"]
    commands = [task["template"]["spec"]["containers"][0]["command"] for task in tasks]

    assert [command[:2] for command in commands] == [["bash", "-c"]] * 3
    for number, (*_, command) in enumerate(commands):
        host = "VC_WORKER_0_HOSTS" if number else "TORCHX_RANK0_HOST"
        assert f"--rdzv_endpoint ${{{host}:=localhost}}:29500" in command
        assert "--rdzv_conf join_timeout=600,last_call_timeout=5,close_timeout=10,timeout=600" in command
        assert "--nnodes 1:3 --nproc_per_node 2" in command
        assert command.endswith("-m latentac.runs.workers.supervisor run-1 s3://latentac/store /work")


def test_environment_of_the_workers() -> None:
    """What survives faults is set, the threads are the worker's share of the CPUs, and no secret is among them."""
    resources = {"requests": {"cpu": "3500m"}, "limits": {"nvidia.com/gpu": "2"}}
    settings = settings_of(processes=2, lease_seconds=120, resources=resources, secrets=["hub"], config_maps=["proxy"])
    container = shaped(settings)["spec"]["tasks"][1]["template"]["spec"]["containers"][0]
    values = environment(container)

    assert values["PET_MAX_RESTARTS"] == "10"
    assert values["PET_SHUTDOWN_TIMEOUT"] == "50"
    assert values["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "PET_LOCAL_ADDR" not in values  # the pods find each other by their names
    assert values["OMP_NUM_THREADS"] == "1"
    assert values["LATENTAC_ATTEMPT"] == "attempt-1"
    assert values["LATENTAC_LEASE_SECONDS"] == "120"
    assert values["LATENTAC_S3_ENDPOINT"] == "https://minio:9000"
    assert values["LATENTAC_S3_CA"] == "/etc/latentac-ca/ca.crt"
    assert values["TORCHX_JOB_ID"] == f"kubernetes://torchx/here:{jobs.job_name('here', 'run-1', 'c0ffee')}"
    assert "PET_LOCAL_ADDR" not in values
    assert not [name for name in values if "AWS_SECRET" in name or "AWS_ACCESS" in name]
    assert container["envFrom"] == [
        {"secretRef": {"name": "latentac-s3"}},
        {"secretRef": {"name": "hub"}},
        {"configMapRef": {"name": "proxy"}},
    ]
    assert container["resources"] == resources


@pytest.mark.parametrize(("request_", "processes", "threads"), [("8", 2, "4"), ("500m", 1, "1"), ("", 1, "1")])
def test_threads_of_a_worker(request_: str, processes: int, threads: str) -> None:
    """A worker has the whole cores that are its own, at least one."""
    resources = {"requests": {"cpu": request_}} if request_ else {}
    container = shaped(settings_of(processes=processes, resources=resources))["spec"]["tasks"][0]["template"]
    assert environment(container["spec"]["containers"][0])["OMP_NUM_THREADS"] == threads


def test_pods_are_restricted_and_bounded() -> None:
    """Every pod is as PodSecurity `restricted` wants it, has no token, and writes to volumes of bounded size only."""
    settings = settings_of(
        node_selector={"gpu": "h200"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        priority_class="high",
        shared_memory="2Gi",
        work_size="9Gi",
    )
    job = shaped(settings)
    assert job["spec"]["priorityClassName"] == "high"
    for task in job["spec"]["tasks"]:
        spec = task["template"]["spec"]
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"] == "latentac-train"
        assert spec["restartPolicy"] == "Never"
        assert spec["terminationGracePeriodSeconds"] == 60
        assert spec["nodeSelector"] == {"gpu": "h200"}
        assert spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
        assert spec["priorityClassName"] == "high"
        assert spec["imagePullSecrets"] == [{"name": "mirror"}]
        assert container["imagePullPolicy"] == "IfNotPresent"
        assert container["image"] == "t:1"
        volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
        assert volumes == {
            "dshm": {"emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
            "work": {"emptyDir": {"sizeLimit": "9Gi"}},
            "tmp": {"emptyDir": {}},
            "latentac-ca": {"configMap": {"name": "authorities"}},
        }
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"dshm": "/dev/shm", "work": "/work", "tmp": "/tmp", "latentac-ca": "/etc/latentac-ca"}  # noqa: S108


def test_users_may_be_the_clusters_to_choose() -> None:
    """Where a cluster gives each namespace its own range of users, none is asked for."""
    chosen = settings_of().model_copy(
        update={"security": cluster_settings.Security(user=None, group=None, fs_group=None)}
    )
    spec = shaped(chosen)["spec"]["tasks"][0]["template"]["spec"]
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_labels_and_name() -> None:
    """A job is found by its run, and its name depends on run, namespace and configuration alone."""
    run = "Some_run.with-a-name-of-more-than-sixty-three-characters-which-no-label-takes"
    job = shaped(settings_of(), run)

    name = job["metadata"]["name"]
    assert name == jobs.job_name("here", run, "c0ffee") != jobs.job_name("there", run, "c0ffee")
    assert len(name) == 21
    assert job["metadata"]["annotations"] == {
        "latentac.io/run": run,
        "latentac.io/config": "c0ffee",
        "latentac.io/attempt": "attempt-1",
    }
    for labels in (job["metadata"]["labels"], *(t["template"]["metadata"]["labels"] for t in job["spec"]["tasks"])):
        assert labels["app.kubernetes.io/part-of"] == labels["app.kubernetes.io/managed-by"] == "latentac"
        assert labels["app.kubernetes.io/component"] == "train"
        assert len(labels["latentac.io/run"]) <= 63


@pytest.mark.parametrize(
    ("replicas", "fits"),
    [
        ((1, 2, 1), True),
        ((2, 4, 1), True),
        ((2, 5, 1), False),
        ((1, 1, 3), True),
        ((1, 2, 3), False),
        ((2, 1, 1), False),
    ],
)
def test_every_worker_must_have_a_block(tmp_path: Path, replicas: tuple[int, int, int], fits: bool) -> None:
    """An iteration has four blocks, so there may be 1 to 4 workers; what an app may grow to is checked first."""
    low, high, processes = replicas
    train = settings_of(min_replicas=low, max_replicas=high, processes=processes).train
    config = workspace(tmp_path).config
    if fits:
        jobs.check_replicas(train, config)
    else:
        with pytest.raises(ConfigError, match="chart's values"):
            jobs.check_replicas(train, config)


# Logs and waiting


def test_lines_are_passed_on_once_whatever_is_read_again() -> None:
    """A log that broke off is read again from the whole second on; equal times are told apart, zones understood."""
    seen = _Seen()
    log = ["2026-01-01T10:00:00.5Z", "2026-01-01T10:00:00.50Z", "2026-01-01T10:00:01.123456789Z"]
    assert [seen.add(stamp) for stamp in log] == [True, True, True]
    assert seen.attach() == "2026-01-01T10:00:01Z"
    again = [log[2], "2026-01-01T10:00:01.123456789Z", "2026-01-01T12:00:02.1+02:00", "unable"]
    assert [seen.add(stamp) for stamp in again] == [False, True, True, False]
    assert seen.attach() == "2026-01-01T10:00:02Z"
    assert [seen.add(stamp) for stamp in log] == [False, False, False]


def pending_pod(name: str, **waiting: str) -> dict[str, Any]:
    status: dict[str, Any] = {"phase": "Pending"}
    if waiting:
        status["containerStatuses"] = [{"name": "worker-0", "state": {"waiting": waiting}}]
    return {"metadata": {"name": name, "uid": name}, "status": status}


def test_what_does_not_pass_is_given_up_soon_and_what_may_pass_later() -> None:
    """A missing Secret is watched for seconds, a lack of room as long as the settings say."""
    now = [0.0]
    running = [{"metadata": {"name": "job-worker-0-0"}, "status": {"phase": "Running"}}]
    missing = [pending_pod("job-worker-0-0", reason="CreateContainerConfigError", message="secret not found")]

    waiting = Waiting("job-worker-0-0", 1, 900.0, {}, lambda: now[0])
    assert waiting.over(missing, list) is None
    now[0] = 25.0
    assert "secret not found" in (waiting.over(missing, list) or "")

    waiting = Waiting("job-worker-0-0", 1, 900.0, {}, lambda: now[0])
    full = [{"type": "Warning", "reason": "Unschedulable", "involvedObject": {"name": "job", "kind": "PodGroup"}}]
    assert waiting.over([], lambda: full) is None
    now[0] = 500.0
    assert waiting.over([], lambda: full) is None
    now[0] = 930.0
    assert "Unschedulable" in (waiting.over([], lambda: full) or "")
    assert waiting.over(running, lambda: full) is None
    now[0] = 1800.0
    assert waiting.over([], list) is None, "the clock starts again when the pods were there in between"


GANG = "0/0 tasks in gang unschedulable: pod group is not ready, 2 minAvailable"
REQUESTS = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"}


def event(kind: str, reason: str, message: str) -> dict[str, Any]:
    involved = {"kind": kind, "name": f"{kind.lower()}-1"}
    return {"type": "Warning", "reason": reason, "message": message, "involvedObject": involved}


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "no event says which resource is short; each pod requests cpu 8, memory 64Gi, nvidia.com/gpu 4, and 2 of"),
        (
            [
                event(
                    "Pod",
                    "FailedScheduling",
                    "0/3 nodes are available: 1 Insufficient cpu, 3 Insufficient nvidia.com/gpu.",
                )
            ],
            "short of cpu, nvidia.com/gpu; each pod requests cpu 8, memory 64Gi, nvidia.com/gpu 4, and 2 of them must",
        ),
        (
            [
                event(
                    "PodGroup", "NotEnoughResources", "queue default: resource quota insufficient: insufficient memory"
                )
            ],
            "short of memory; each pod",
        ),
        ([event("Pod", "FailedScheduling", "Insufficient pods")], "no event says which resource is short; each pod"),
    ],
)
def test_a_lack_of_room_is_told_with_the_resource_and_the_requests(events: list[dict[str, Any]], words: str) -> None:
    """Volcano says of a job only that its tasks cannot be scheduled; events of pods and of the queue may say more."""
    now = [0.0]
    waiting = Waiting("job-worker-0-0", 2, 900.0, REQUESTS, lambda: now[0])
    told = [event("PodGroup", "Unschedulable", GANG), *events]
    assert waiting.over([], lambda: told) is None
    now[0] = 930.0
    reason = waiting.over([], lambda: told) or ""
    assert f"room in the cluster and the queue: {words}" in reason


def test_what_is_no_lack_of_room_is_not_called_one() -> None:
    """A Secret that is missing says nothing of requests."""
    now = [0.0]
    waiting = Waiting("job-worker-0-0", 1, 900.0, REQUESTS, lambda: now[0])
    missing = [pending_pod("job-worker-0-0", reason="CreateContainerConfigError", message="secret not found")]
    assert waiting.over(missing, list) is None
    now[0] = 25.0
    assert "requests" not in (waiting.over(missing, list) or "requests")


def test_requests_of_a_pod_are_its_limits_where_it_has_none() -> None:
    """As Kubernetes takes them."""
    resources = {"requests": {"cpu": "2"}, "limits": {"cpu": "3", "nvidia.com/gpu": "1"}}
    assert jobs.requests_of(shaped(settings_of(resources=resources))) == {"cpu": "2", "nvidia.com/gpu": "1"}


# The API server


@dataclass
class Site:
    """A namespace with the launcher's account, and what the test sees as the administrator."""

    plane: ControlPlane
    namespace: str
    api: Api
    admin: Api
    settings: Cluster
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.namespace}:latentac-pipeline"

    def start(self, space: Workspace, settings: Cluster | None = None) -> "Training":
        training = Training(Volcano(settings or self.settings, self.api, poll_seconds=0.2), space)
        training.start()
        self.threads.append(training)
        return training

    def job(self, space: Workspace) -> dict[str, Any]:
        name = jobs.job_name(self.namespace, space.run, space.config.hash)
        return until(lambda: self.admin.get(VOLCANO_JOBS, name))

    def write(self, space: Workspace, phase: str, **more: Any) -> None:
        """The status that Volcano's controller would write."""
        name = self.job(space)["metadata"]["name"]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        status = {"state": {"phase": phase, "lastTransitionTime": now}, "minAvailable": 1, **more}
        patch = json.dumps({"status": status})
        self.plane.kubectl(
            *("patch", "-n", self.namespace, "jobs.batch.volcano.sh", name, "--subresource=status"),
            *("--type=merge", "-p", patch),
        )

    def make_pod(self, space: Workspace, phase: str, index: int = 0) -> str:
        """A pod as Volcano makes it, in a phase that no kubelet is here to bring about."""
        job = self.job(space)
        pod = self.admin.create(PODS, pod_of(job, job["spec"]["tasks"][index]))
        name = str(pod["metadata"]["name"])
        patch = json.dumps({"status": {"phase": phase}})
        self.plane.kubectl(
            *("patch", "-n", self.namespace, "pod", name, "--subresource=status", "--type=merge", "-p", patch)
        )
        return name


class Training(threading.Thread):
    """The train step's launcher at work."""

    def __init__(self, volcano: Volcano, space: Workspace) -> None:
        super().__init__(daemon=True)
        self.volcano, self.space = volcano, space
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.volcano(self.space)
        except Exception as error:  # noqa: BLE001 - the test asks for it
            self.error = error

    def result(self, seconds: float = 60.0) -> Exception | None:
        self.join(seconds)
        assert not self.is_alive(), "it still follows the job"
        return self.error


def until(look: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)
    return found


def within(sent: Any, received: Any) -> bool:
    """Whether all that was sent is there; the server adds its defaults."""
    if isinstance(sent, dict):
        return isinstance(received, dict) and all(within(value, received.get(key)) for key, value in sent.items())
    if isinstance(sent, list):
        return len(sent) == len(received) and all(map(within, sent, received))
    return bool(sent == received)


def api_of(kubeconfig: Path, namespace: str) -> Api:
    configuration = client.Configuration()
    config.load_kube_config(str(kubeconfig), client_configuration=configuration)
    return Api(configuration, namespace)


def role(name: str, rights: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """A Role of just these rights and its binding to the pipeline's account."""
    rules = []
    for verb, resource in sorted(rights):
        group, _, rest = resource.partition("/")
        rules.append({"apiGroups": ["" if group == "core" else group], "resources": [rest], "verbs": [verb]})
    account = {"kind": "ServiceAccount", "name": "latentac-pipeline"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    version = "rbac.authorization.k8s.io/v1"
    return [
        {"apiVersion": version, "kind": "Role", "metadata": {"name": name}, "rules": rules},
        {
            "apiVersion": version,
            "kind": "RoleBinding",
            "metadata": {"name": name},
            "roleRef": reference,
            "subjects": [account],
        },
    ]


@pytest.fixture
def site(control_plane: ControlPlane, crds: list[Path]) -> Iterator[Site]:
    namespace = control_plane.namespace("train", restricted=True)
    accounts = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}
        for name in ("latentac-pipeline", "latentac-train")
    ]
    objects = {"apiVersion": "v1", "kind": "List", "items": [*accounts, *role("train", RIGHTS)]}
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(objects))
    api = api_of(control_plane.kubeconfig_of(namespace, "latentac-pipeline"), namespace)
    admin = api_of(control_plane.kubeconfig, namespace)
    made = Site(control_plane, namespace, api, admin, settings_of(namespace))
    yield made
    control_plane.kubectl("delete", "-n", namespace, "jobs.batch.volcano.sh", "--all")
    for thread in made.threads:
        thread.join(30)
    control_plane.delete_namespace(namespace, wait=False)


def publish(space: Workspace, max_world_size: int = 2) -> None:
    """What the leader leaves at the end."""
    metrics = {"max_world_size": max_world_size}
    made = space.folder.parent / "made"
    space.store.publish(
        f"{space.run}/train", made, run=space.run, step="train", config_hash=space.config.hash, metrics=metrics
    )


@pytest.mark.slow
def test_job_is_accepted_strictly_and_followed_to_its_end(site: Site, tmp_path: Path) -> None:
    """The API server knows every field of the job; nothing is dropped on the way; a completed one ends the step."""
    space = workspace(tmp_path)
    training = site.start(space)
    job = site.job(space)

    sent = shaped(site.settings, space.run)
    name = job["metadata"]["name"]
    strict = {**sent, "metadata": {**sent["metadata"], "name": "strict"}}
    site.plane.kubectl(
        *("create", "-n", site.namespace, "--dry-run=server", "--validate=strict", "-f", "-"), stdin=json.dumps(strict)
    )
    for mine, theirs in zip(sent["spec"]["tasks"], job["spec"]["tasks"], strict=True):
        mine_spec, theirs_spec = mine["template"]["spec"], theirs["template"]["spec"]
        for container in (mine_spec["containers"][0], theirs_spec["containers"][0]):
            del container["env"], container["command"]  # an id drawn at each submission is in them
        assert within(mine_spec, theirs_spec)
        assert mine["policies"] == theirs["policies"]
    pod = site.make_pod(space, "Running")
    site.write(space, "Running", running=1, taskStatusCount={"worker-0": {"phase": {"Running": 1}}})
    publish(space)
    site.write(space, "Completed", succeeded=1)

    assert training.result() is None
    assert pod == f"{name}-worker-0-0"


@pytest.mark.slow
def test_restricted_namespace_takes_the_pods(site: Site, tmp_path: Path) -> None:
    """PodSecurity `restricted` admits a pod that is made of the template, with what Volcano adds."""
    space = workspace(tmp_path)
    site.start(space)
    assert site.make_pod(space, "Pending", 1).endswith("-worker-1-0")


@pytest.mark.slow
def test_running_job_is_adopted_by_a_step_that_was_started_again(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second launcher submits nothing and sees the same job to its end."""
    space = workspace(tmp_path)
    first = site.start(space)
    before = site.job(space)["metadata"]["uid"]
    site.make_pod(space, "Running")
    site.write(space, "Running", running=1)
    second = site.start(space)
    time.sleep(1.0)
    publish(space)
    site.write(space, "Completed")

    assert first.result() is None
    assert second.result() is None
    assert site.job(space)["metadata"]["uid"] == before


@pytest.mark.slow
def test_ended_job_makes_room_for_a_new_one(site: Site, tmp_path: Path) -> None:
    """A run that is resumed after a failure gets a new job and a new attempt; one of somebody else is left alone."""
    space = workspace(tmp_path)
    first = site.start(space)
    old = site.job(space)
    site.write(space, "Failed", failed=1)
    assert isinstance(first.result(), TrainingError)

    second = site.start(space)
    until(lambda: site.job(space)["metadata"]["uid"] != old["metadata"]["uid"])
    note = "latentac.io/attempt"
    assert site.job(space)["metadata"]["annotations"][note] != old["metadata"]["annotations"][note]
    name = old["metadata"]["name"]
    site.plane.kubectl(
        "annotate", "-n", site.namespace, "--overwrite", "jobs.batch.volcano.sh", name, f"{jobs.CONFIG}=x"
    )
    third = site.start(space)
    error = third.result()
    assert isinstance(error, ClusterError)
    assert "is not this run's" in str(error)
    assert second.is_alive()
    site.write(space, "Aborted")
    assert isinstance(second.result(), TrainingError)


@pytest.mark.slow
def test_cancelled_run_aborts_its_job(site: Site, tmp_path: Path) -> None:
    """`abort` stops the run's own active job, once; jobs of other runs and ended ones stay as they are."""
    space, other = workspace(tmp_path), workspace(tmp_path, "run-2")
    training = site.start(space)
    site.job(space)  # two threads cannot be in TorchX at once: it parses its own source
    further = site.start(other)
    for each in (space, other):
        site.make_pod(each, "Running")
        site.write(each, "Running", running=1, taskStatusCount={"worker-0": {"phase": {"Running": 1}}})

    abort(site.settings, "run-1", site.api)

    assert site.job(space)["status"]["state"]["phase"] == "Aborted"
    assert site.job(other)["status"]["state"]["phase"] == "Running"
    error = training.result()
    assert isinstance(error, TrainingError)
    assert "ended Aborted" in str(error)
    assert further.is_alive()
    version = site.job(space)["metadata"]["resourceVersion"]
    abort(site.settings, "run-1", site.api)
    assert site.job(space)["metadata"]["resourceVersion"] == version
    abort(site.settings, "run-2", site.api)
    further.result()


@pytest.mark.slow
def test_failed_job_fails_the_step_and_keeps_what_was_said(site: Site, tmp_path: Path) -> None:
    """The error names the job; last words are in the run's folder and in the store, also where there were none."""
    space = workspace(tmp_path)
    training = site.start(space)
    site.make_pod(space, "Failed")
    site.write(space, "Failed", failed=1, retryCount=50)

    error = training.result()
    assert isinstance(error, TrainingError)
    assert "ended Failed" in str(error)
    assert "last log lines" in str(error)
    assert (space.folder / LAST_WORDS).exists()
    assert space.store.read_json("failures/run-1.words.json") == []


@pytest.mark.slow
def test_completed_job_without_its_artifact_fails_the_step(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job can end well and have trained nothing: the artifact in the store is what counts."""
    from latentac.runs import steps as run

    space = workspace(tmp_path)
    volcano = Volcano(site.settings, site.api, poll_seconds=0.2)
    writer = threading.Thread(target=lambda: site.write(space, "Completed"))
    writer.start()
    with pytest.raises(TrainingError, match="not in the store"):
        run.train("run-1", space.store.url, str(tmp_path), launch=volcano)
    writer.join()


@pytest.mark.slow
@pytest.mark.parametrize("expected", ["violates PodSecurity", "exceeded quota: gpus"])
def test_refused_pods_are_reported_within_a_bound(site: Site, tmp_path: Path, expected: str) -> None:
    """The job itself stays Pending for ever; the event says why, the job is stopped, and its reason is the error."""
    space = workspace(tmp_path)
    training = site.start(space, settings_of(site.namespace, pending_seconds=3.0))
    job = site.job(space)
    site.write(space, "Pending", pending=1)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    involved = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "namespace": site.namespace}
    involved |= {"name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "refused"},
        "involvedObject": involved,
        "reason": "FailedCreate",
        "type": "Warning",
        "message": f'Error creating pods: [failed to create pod, err: pods "x" is forbidden: {expected}]',
        "lastTimestamp": now,
        "firstTimestamp": now,
        "count": 1,
    }
    site.plane.kubectl("create", "-n", site.namespace, "-f", "-", stdin=json.dumps(event))

    error = training.result(30)
    assert isinstance(error, ClusterError)
    assert expected in str(error)
    assert site.job(space)["status"]["state"]["phase"] == "Aborted"


@pytest.mark.slow
def test_pods_that_find_no_node_are_reported_within_a_bound(site: Site, tmp_path: Path) -> None:
    """The scheduler's own words about the pod are the error: this cluster has no node at all."""
    space = workspace(tmp_path)
    training = site.start(space, settings_of(site.namespace, pending_seconds=3.0))
    site.make_pod(space, "Pending")
    site.write(space, "Pending", pending=1)

    error = training.result(30)
    assert isinstance(error, ClusterError)
    assert "no nodes available to schedule pods" in str(error)
    assert "no event says which resource is short; each pod requests nothing, and 1 of them must fit" in str(error)


@pytest.mark.slow
def test_failure_of_a_worker_ends_the_job_at_once(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker left in the store is raised as it was; what an earlier attempt left is not."""
    space = workspace(tmp_path)
    monkeypatch.setenv(failures.ATTEMPT, "another")
    failures.report(space.store, space.run, RewardError("old", "old", "old"), 1)
    training = site.start(space)
    attempt = site.job(space)["metadata"]["annotations"]["latentac.io/attempt"]
    site.make_pod(space, "Running")
    site.write(space, "Running", running=1)
    time.sleep(1.0)
    assert training.is_alive()
    monkeypatch.setenv(failures.ATTEMPT, attempt)
    failures.report(space.store, space.run, RewardError("rewards.x", "gave NaN", "Look at it"), 2)

    error = training.result()
    assert isinstance(error, RewardError)
    assert "rewards.x: gave NaN. Look at it" in str(error)
    assert site.job(space)["status"]["state"]["phase"] == "Aborted"


@pytest.mark.slow
def test_job_belongs_to_the_workflow_of_its_step(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the step's pod says its workflow, the job goes with it; not from another namespace."""
    kind = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}
    # A real one: what belongs to an owner that is not there is deleted by the cluster, sooner or later.
    workflow = json.dumps({**kind, "metadata": {"name": "wf"}, "spec": {}})
    made = site.plane.kubectl("create", "-n", site.namespace, "-o", "json", "-f", "-", stdin=workflow)
    owner = {**kind, "name": "wf", "uid": json.loads(made)["metadata"]["uid"]}
    spec = pod_of({"metadata": {"name": "x", "namespace": "x", "uid": "x"}, "spec": {"queue": "q", "tasks": []}}, {
        "name": "t", "template": {"spec": shaped(site.settings)["spec"]["tasks"][0]["template"]["spec"]}
    })["spec"]  # fmt: skip
    pod = {"metadata": {"name": "step", "ownerReferences": [owner]}, "spec": spec}
    monkeypatch.setenv("KFP_POD_NAME", "step")
    space = workspace(tmp_path)
    site.start(space)
    assert "ownerReferences" not in site.job(space)["metadata"], "there is no such pod yet"
    abort(site.settings, space.run, site.api)
    site.admin.create(PODS, pod)
    volcano = Volcano(site.settings, site.api)
    assert volcano._owners() == [owner]
    elsewhere = site.settings.steps.model_copy(update={"namespace": "kubeflow"})
    assert Volcano(site.settings.model_copy(update={"steps": elsewhere}), site.api)._owners() == []


@pytest.mark.slow
def test_rights_are_just_those_that_are_used(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submitting, following, adopting, aborting and submitting again need every right of the Role, and no other."""
    space = workspace(tmp_path)
    monkeypatch.setenv("KFP_POD_NAME", "step")
    first = site.start(space)
    site.make_pod(space, "Running")
    counts = {"worker-0": {"phase": {"Running": 1}}}
    site.write(space, "Running", running=1, taskStatusCount=counts)
    time.sleep(1.5)
    second = site.start(space)
    time.sleep(1.5)
    abort(site.settings, space.run, site.api)
    first.result()
    second.result()
    site.plane.kubectl("delete", "pod", "-n", site.namespace, "--all", "--force", "--grace-period=0")
    old = site.job(space)["metadata"]["uid"]
    third = site.start(space)
    until(lambda: site.job(space)["metadata"]["uid"] != old)
    site.make_pod(space, "Running")
    publish(space)
    site.write(space, "Completed")
    assert third.result() is None

    assert until(lambda: site.plane.calls(site.user)) == RIGHTS

"""The rollout against a real API server: what is applied, what is waited for, what comes back when it fails.

The model servers are real ones on loopback. KServe's controller and the kubelet are played: `tests.cluster.kserve` and
`tests.cluster.kubelet` write the statuses that the real ones were seen to write; Deployments, ReplicaSets and pods are
the controller manager's own.
"""

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from latentac.backbones import load_backbone
from latentac.components.cluster.api import DEPLOYMENTS, INFERENCE_SERVICES, SERVING_RUNTIMES, Api
from latentac.components.cluster.settings import Cluster, resolve
from latentac.components.deploy import inference_service as objects
from latentac.components.deploy.rollout import BEFORE, PROMOTES, Rollout, abandon
from latentac.config.schema import Config
from latentac.critic import Critic
from latentac.runs.release.deploy import Candidate
from latentac.runs.resolution import Resolved, resolve_all
from latentac.runs.steps import prepare
from latentac.runs.workspace import open_run
from latentac.serving.exported import export
from latentac.serving.process import ServerProcess
from latentac.system.errors import ClusterError, ConfigError, LatentacError, ServingError
from latentac.worlds.builtin import builtin_pipeline
from tests.cluster import kubelet
from tests.cluster.control_plane import ControlPlane
from tests.cluster.gateway import Gateway
from tests.cluster.kserve import Controller, administrator
from tests.cluster.kubelet import Behaviour, Kubelet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RIGHTS = {
    ("get", "serving.kserve.io/servingruntimes"),
    ("create", "serving.kserve.io/servingruntimes"),
    ("patch", "serving.kserve.io/servingruntimes"),
    ("get", "serving.kserve.io/inferenceservices"),
    ("create", "serving.kserve.io/inferenceservices"),
    ("patch", "serving.kserve.io/inferenceservices"),
    ("delete", "serving.kserve.io/inferenceservices"),
    ("get", "apps/deployments"),
    ("list", "core/pods"),
    ("get", "core/pods/log"),
}
"""What the deploy step may do, and the clean-up of a run after it."""

ROUTES = {(verb, "gateway.networking.k8s.io/httproutes") for verb in ("get", "create", "patch")}
"""And this where a gateway splits the traffic."""

RUN = "some-run"
SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@pytest.fixture(scope="session")
def resolved() -> Resolved:
    return resolve_all(
        {
            "recipe": "test",
            "backbone": {"source": "builtin:shapes-unet"},
            "kernel": {"num_steps": 3},
            "prompts": {"source": "builtin:shapes"},
            "rewards": [{"use": "shapes_verifier"}, {"use": "jpeg_compressibility", "weight": 0.0}],
            "steering": {"methods": [{"use": "value_gradient"}]},
            "gate": {"reward": "shapes_verifier"},
        }
    )


@pytest.fixture(scope="session")
def config(resolved: Resolved) -> Config:
    return resolved.config


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, resolved: Resolved) -> dict[str, Path]:
    """version -> exported folder. v1 and v2 steer; flat has a critic without an opinion, which no smoke test passes."""
    made, config = {}, resolved.config
    backbone = load_backbone(config.backbone, builtin_pipeline("shapes-unet"), torch.device("cpu"))
    for version, std in (("v1", 0.5), ("v2", 0.5), ("flat", 0.0)):
        folder = tmp_path_factory.mktemp("models") / version
        shutil.copytree(builtin_pipeline("shapes-unet"), folder)
        torch.manual_seed(0)
        critic = Critic(backbone, config.reward_names, config.critic)
        torch.nn.init.normal_(critic.heads.weight, std=std)
        critic.save(folder / "critic")
        export(folder, config, run=RUN, version=version, extensions=resolved.described())
        made[version] = folder
    return made


class Servers:
    """Real model servers, each from the first time that it is asked for."""

    def __init__(self, models: dict[str, Path], stack: ExitStack) -> None:
        self._models, self._stack, self._addresses = models, stack, dict[str, str]()

    def __getitem__(self, version: str) -> str:
        """The address of the server of `version`."""
        if version not in self._addresses:
            server = ServerProcess(self._models[version], ready_seconds=300, device="cpu")
            self._addresses[version] = self._stack.enter_context(server).address
        return self._addresses[version]


@pytest.fixture(scope="session")
def servers(models: dict[str, Path]) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(models, stack)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared run, as deploy finds one."""
    folder = tmp_path_factory.mktemp("run")
    prepare(RUN, f"file://{folder}/store", str(folder), "shapes-unet-smoke", overrides=["kernel.num_steps=3"])
    return f"file://{folder}/store"


@dataclass
class World:
    """A namespace with the chart's runtime, a played KServe and kubelet; `api` has the step's rights and no more.

    served: name of an InferenceService -> version whose server answers there, instead of its Deployment's
    behaviours: name of an InferenceService -> what becomes of its new pods, instead of `kubelet.works`
    """

    plane: ControlPlane
    namespace: str
    admin: Api
    api: Api
    settings: Cluster
    servers: Servers
    models: dict[str, Path]
    store: str
    folder: Path
    served: dict[str, str] = field(default_factory=dict)
    behaviours: dict[tuple[str, str], Behaviour] = field(default_factory=dict)

    def candidate(self, version: str) -> Candidate:
        space = open_run(RUN, self.store, str(self.folder))
        manifest = space.store.publish(
            f"models/{version}", self.models[version], run=RUN, step="deploy", config_hash=space.config.hash
        )
        request = {"prompt": space.prompts.held_out[0].text, "seed": 7, "count": 1}
        return Candidate(space, self.models[version], manifest, version, request)

    def rollout(self, **changes: Any) -> Rollout:
        return Rollout(self.api, self.with_deploy(**changes), self.address)

    def with_deploy(self, **changes: Any) -> Cluster:
        return self.settings.model_copy(update={"deploy": self.settings.deploy.model_copy(update=changes)})

    def address(self, name: str) -> str:
        """Of the server whose version the pods of that InferenceService have."""
        return self.servers[self.served.get(name) or self.version(name)]

    def version(self, name: str) -> str:
        made = self.admin.get(DEPLOYMENTS, f"{name}-predictor")
        return made["spec"]["template"]["metadata"]["annotations"][objects.VERSION] if made else ""

    def behaviour(self, pod: kubelet.Pod) -> dict[str, Any]:
        name = pod["metadata"]["labels"]["serving.kserve.io/inferenceservice"]
        version = pod["metadata"]["annotations"][objects.VERSION]
        return self.behaviours.get((name, version), kubelet.works)(pod)

    def get(self, name: str) -> dict[str, Any] | None:
        return self.admin.get(INFERENCE_SERVICES, name)

    def calls(self) -> set[tuple[str, str]]:
        return self.plane.calls(f"system:serviceaccount:{self.namespace}:pipeline")


@pytest.fixture
def world(
    control_plane: ControlPlane,
    crds: list[Path],
    servers: Servers,
    models: dict[str, Path],
    store: str,
    tmp_path: Path,
) -> Iterator[World]:
    namespace = control_plane.namespace("rollout", restricted=True)
    admin = administrator(control_plane.kubeconfig, namespace)
    control_plane.kubectl("create", "serviceaccount", "pipeline", "-n", namespace)
    control_plane.kubectl("create", "serviceaccount", "serve", "-n", namespace)
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(role(RIGHTS | ROUTES)))
    binding = ["--role=deployer", f"--serviceaccount={namespace}:pipeline"]
    control_plane.kubectl("create", "rolebinding", "deployer", "-n", namespace, *binding)
    admin.apply(SERVING_RUNTIMES, runtime(namespace))
    api = administrator(control_plane.kubeconfig_of(namespace, "pipeline"), namespace)
    settings = resolve(settings_fields(namespace), "test")
    made = World(control_plane, namespace, admin, api, settings, servers, models, store, tmp_path)
    with Controller(admin, kubelet.NO_SCHEDULER), Kubelet(admin, made.behaviour):
        yield made
    control_plane.delete_namespace(namespace, wait=False)


def role(rights: set[tuple[str, str]]) -> dict[str, Any]:
    rules = []
    for verb, place in sorted(rights):
        group, _, resource = place.partition("/")
        rules.append({"apiGroups": ["" if group == "core" else group], "resources": [resource], "verbs": [verb]})
    meta = {"name": "deployer"}
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": meta, "rules": rules}


def runtime(namespace: str) -> dict[str, Any]:
    """As the chart makes it."""
    container = {
        "name": "kserve-container",
        "image": "latentac/serve:dev",
        "args": ["--model=/mnt/models", "--host=0.0.0.0", "--port=8080", "--name=latentac"],
        "ports": [{"containerPort": 8080, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/v2/models/latentac/ready", "port": 8080}},
        "securityContext": SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - in the pod
        "resources": {"requests": {"cpu": "100m"}},
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": "latentac", "namespace": namespace},
        "spec": {
            "supportedModelFormats": [{"name": "latentac", "version": "1", "autoSelect": False}],
            "protocolVersions": ["v1", "v2"],
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }


def settings_fields(namespace: str) -> dict[str, Any]:
    return {
        "release": "latentac",
        "namespace": namespace,
        "images": {"pipeline": "latentac/pipeline:dev", "train": "latentac/train:dev", "serve": "latentac/serve:dev"},
        "store": {"url": "s3://models/demo", "endpoint": "http://minio:9000", "secret": "latentac-s3"},
        "steps": {"namespace": namespace, "service_account": "pipeline"},
        "train": {"service_account": "train"},
        "deploy": {
            "runtime": "latentac",
            "service_account": "serve",
            "failing_seconds": 3.0,
            "ready_seconds": 60.0,
            "shadow_prompts": 2,
            "max_latency_ratio": 100.0,
        },
    }


def gone(world: World, name: str) -> bool:
    """Within a few seconds: with the InferenceService its Deployment goes, by the garbage collector."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if world.get(name) is None and world.admin.get(DEPLOYMENTS, f"{name}-predictor") is None:
            return True
        time.sleep(0.2)
    return False


def test_an_endpoint_belongs_to_one_project() -> None:
    """The one that the chart names; else that of what it serves; else the first that comes. Nothing else is known of
    an InferenceService from before projects."""
    fields = settings_fields("here")
    free = resolve(fields, "test")
    owned = resolve(fields | {"deploy": fields["deploy"] | {"project": "mine"}}, "test")
    model = objects.Model("theirs", RUN, "v1", "s3://models/demo", "models/v1/files-0")
    live = objects.inference_service(free, "latentac", model, "latentac", replicas=1)
    assert live["metadata"]["annotations"][objects.PROJECT] == "theirs"
    assert objects.restorable(live)["metadata"]["annotations"][objects.PROJECT] == "theirs"
    for settings, before, project in ((free, None, "mine"), (free, live, "theirs"), (owned, live, "mine")):
        objects.check_project(settings, before, project)
    objects.check_project(free, {"metadata": {"name": "old"}}, "mine")
    for settings, before, project in ((free, live, "mine"), (owned, None, "theirs"), (owned, live, "theirs")):
        with pytest.raises(ConfigError, match=f"project = '{project}': the endpoint latentac .* is that of project"):
            objects.check_project(settings, before, project)


def test_a_run_of_another_project_is_refused_before_anything_is_applied(world: World) -> None:
    """By what the endpoint serves."""
    world.rollout()(world.candidate("v1"))
    before = world.get("latentac")
    candidate = world.candidate("v2")
    config = candidate.space.config.model_copy(update={"project": "another"})
    space = dataclasses.replace(candidate.space, config=config)
    with pytest.raises(ConfigError, match="project = 'another': the endpoint latentac of release latentac is that of"):
        world.rollout()(dataclasses.replace(candidate, space=space))
    assert world.get("latentac") == before
    assert world.get("latentac-green") is None


def test_first_release_serves(world: World) -> None:
    """The stable InferenceService serves it, from a runtime named by its content that goes when it goes; green is
    gone; the image is the server's; nothing was there to compare with, and that is said."""
    proof = world.rollout()(world.candidate("v1"))
    stable = world.get("latentac")
    assert stable is not None
    assert (proof.version, world.version("latentac")) == ("v1", "v1")
    assert proof.endpoint == f"{world.servers['v1']}/v1/models/latentac:predict"
    assert proof.image.startswith(b"\x89PNG")
    assert proof.shadow is not None
    assert (proof.shadow["blue"], proof.shadow["green"]["error_fraction"]) == (None, 0.0)
    assert proof.shadow["green"]["reward"] is not None
    assert "no version served before" in proof.shadow["notes"][0]
    assert stable["spec"]["predictor"]["model"]["storageUri"].startswith(f"{world.store}/models/v1/files-")
    assert stable["metadata"]["labels"]["latentac.io/run"] == RUN
    used = world.admin.get(SERVING_RUNTIMES, stable["spec"]["predictor"]["model"]["runtime"])
    assert used is not None
    assert used["metadata"]["name"].startswith("latentac-")
    assert stable["metadata"]["uid"] in [owner["uid"] for owner in used["metadata"]["ownerReferences"]]
    assert gone(world, "latentac-green")


def test_better_version_is_promoted_and_a_second_try_finds_it_so(world: World) -> None:
    """Both versions answer the same shadow prompts; then the stable one rolls. The step run again changes nothing."""
    world.rollout()(world.candidate("v1"))
    proof = world.rollout()(world.candidate("v2"))
    assert (proof.version, world.version("latentac")) == ("v2", "v2")
    assert proof.shadow is not None
    assert proof.shadow["blue"]["error_fraction"] == 0.0
    assert proof.shadow["reward_loss"] == 0.0  # the same weights
    assert proof.shadow["latency_ratio"] > 0
    assert gone(world, "latentac-green")
    before = world.get("latentac")
    assert world.rollout()(world.candidate("v2")).version == "v2"
    assert (world.get("latentac") or {})["metadata"]["generation"] == (before or {})["metadata"]["generation"]


FAILURES: dict[str, tuple[Behaviour, str]] = {
    "image pull": (kubelet.image_pull, "ImagePullBackOff.*for 3 s"),
    "crash": (kubelet.crash, "exit code 8: serving: the folder cannot be loaded"),
    "credentials": (
        kubelet.fetch_fails("latentac: http://minio:9000, bucket models: the server says InvalidAccessKeyId"),
        "storage-initializer: Error, exit code 3: .*InvalidAccessKeyId",
    ),
    "missing model": (
        kubelet.fetch_fails("latentac: s3://models/demo/models/v2: nothing was published there"),
        "storage-initializer: Error, exit code 3: .*nothing was published there",
    ),
    "store away": (kubelet.fetch_fails("latentac: no answer", 75), "exit code 75: latentac: no answer, for 3 s"),
    "unschedulable": (kubelet.unschedulable, r"Insufficient nvidia.com/gpu\., for 3 s"),
    "never ready": (kubelet.never_ready, "its readiness probe fails, for 3 s"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_first_release_that_cannot_start_is_reported_and_removed(world: World, name: str) -> None:
    """Within seconds, in the words of the pods; nothing is left of it."""
    behaviour, words = FAILURES[name]
    world.behaviours["latentac-green", "v1"] = behaviour
    began = time.monotonic()
    with pytest.raises(ServingError, match=f"{words}.*nothing served before"):
        world.rollout()(world.candidate("v1"))
    print(f"{name}: told after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 30
    assert world.get("latentac") is None
    assert gone(world, "latentac-green")


@pytest.mark.parametrize("name", FAILURES)
def test_stable_one_that_cannot_roll_goes_back(world: World, name: str) -> None:
    """Green was fine and the stable one's new pods are not: the version before is back and ready, and it is said."""
    world.rollout()(world.candidate("v1"))
    before = world.get("latentac")
    behaviour, words = FAILURES[name]
    world.behaviours["latentac", "v2"] = behaviour
    with pytest.raises(ServingError, match=f"{words}.*version v1 is back and ready"):
        world.rollout()(world.candidate("v2"))
    after = world.get("latentac")
    assert after is not None
    assert before is not None
    assert after["spec"] == before["spec"]
    assert after["metadata"]["annotations"] == before["metadata"]["annotations"]
    assert (world.version("latentac"), gone(world, "latentac-green")) == ("v1", True)


@pytest.mark.parametrize("serving", [False, True])
def test_refusal_by_pod_security_is_reported(world: World, serving: bool) -> None:
    """A runtime without a security context is refused by the namespace, as only the Deployment says; v1 stays."""
    if serving:
        world.rollout()(world.candidate("v1"))
    poor = runtime(world.namespace)
    del poor["spec"]["containers"][0]["securityContext"]
    world.admin.apply(SERVING_RUNTIMES, poor)
    with pytest.raises(ServingError, match=r"FailedCreate.*violates PodSecurity"):
        world.rollout()(world.candidate("v2"))
    assert world.version("latentac") == ("v1" if serving else "")
    assert gone(world, "latentac-green")


def test_runtime_that_is_missing_is_reported(world: World) -> None:
    """The chart's at once, before anything is touched; a release's own as KServe tells it."""
    with pytest.raises(ConfigError, match=r"deploy.runtime.*no such ServingRuntime"):
        world.rollout(runtime="elsewhere")(world.candidate("v1"))
    assert world.get("latentac-green") is None

    class Losing(Api):
        """Somebody deletes the runtime between the two calls."""

        def apply(self, kind, body):
            if kind == INFERENCE_SERVICES:
                world.admin.delete(SERVING_RUNTIMES, body["spec"]["predictor"]["model"]["runtime"])
            return super().apply(kind, body) if kind == INFERENCE_SERVICES else dict(body)

    losing = Losing(world.api.client.configuration, world.namespace)
    with pytest.raises(ServingError, match="RuntimeNotRecognized: Specified runtime does not exist"):
        Rollout(losing, world.settings, world.address)(world.candidate("v1"))
    assert gone(world, "latentac-green")


def test_answers_that_are_wrong_keep_it_from_serving(world: World) -> None:
    """A version that steers nothing is found out on green: the stable one is never touched."""
    world.rollout()(world.candidate("v1"))
    before = world.get("latentac")
    with pytest.raises(ServingError, match="the steered image is the unsteered one; version v1 serves as before"):
        world.rollout()(world.candidate("flat"))
    assert world.get("latentac") == before
    assert gone(world, "latentac-green")


def test_stable_one_that_answers_wrongly_goes_back(world: World) -> None:
    """Its address keeps answering with another version than the one that rolled."""
    world.rollout()(world.candidate("v1"))
    world.served["latentac"] = "v1"
    with pytest.raises(ServingError, match="answers with version v1, not v2; version v1 is back and ready"):
        world.rollout()(world.candidate("v2"))
    assert world.version("latentac") == "v1"
    assert gone(world, "latentac-green")


def test_worse_version_does_not_serve(world: World) -> None:
    """The measured number and its bound are in the error."""
    world.rollout()(world.candidate("v1"))
    with pytest.raises(ServingError, match=r"takes [\d.]+ times as long .*1e-09 allowed; version v1 serves as before"):
        world.rollout(max_latency_ratio=1e-9)(world.candidate("v2"))
    assert world.version("latentac") == "v1"
    assert gone(world, "latentac-green")


class Killed(BaseException):
    """What a process that is gone would have gone on with does not happen."""


class Cut(Api):
    """An API whose caller is killed when it has applied the InferenceService `last`."""

    last, dead = "", False

    def _call(self, *arguments, **options):
        if self.dead:
            raise Killed
        return super()._call(*arguments, **options)

    def apply(self, kind, body):
        done = super().apply(kind, body)
        self.dead = kind == INFERENCE_SERVICES and body["metadata"]["name"] == self.last
        return done


def kill_after(world: World, last: str, version: str) -> None:
    cut = Cut(world.api.client.configuration, world.namespace)
    cut.last = last
    with pytest.raises(Killed):
        Rollout(cut, world.settings, world.address)(world.candidate(version))


@pytest.mark.parametrize("last", ["latentac-green", "latentac"])
def test_step_that_was_killed_is_taken_up(world: World, last: str) -> None:
    """With green up, and with the stable one half rolled: the next try goes on, and knows what served before."""
    world.rollout()(world.candidate("v1"))
    kill_after(world, last, "v2")
    green = world.get("latentac-green")
    assert green is not None
    notes = green["metadata"]["annotations"]
    assert json.loads(notes[BEFORE])["metadata"]["annotations"][objects.VERSION] == "v1"
    assert notes[PROMOTES]
    if last == "latentac":  # and it can still go back
        world.served["latentac"] = "v1"
        with pytest.raises(ServingError, match="answers with version v1, not v2; version v1 is back and ready"):
            world.rollout()(world.candidate("v2"))
        assert world.version("latentac") == "v1"
    else:
        assert world.rollout()(world.candidate("v2")).version == "v2"
        assert world.version("latentac") == "v2"
    assert gone(world, "latentac-green")


def test_run_that_ends_early_leaves_nothing_half_way(world: World) -> None:
    """`abandon` takes back a first release and an update, and only those of its own run."""
    kill_after(world, "latentac", "v1")
    abandon(world.settings, "other-run", world.api)
    assert world.get("latentac-green") is not None
    abandon(world.settings, RUN, world.api)
    assert gone(world, "latentac-green")
    assert gone(world, "latentac")
    world.rollout()(world.candidate("v1"))
    kill_after(world, "latentac", "v2")
    abandon(world.settings, RUN, world.api)
    assert gone(world, "latentac-green")
    stable = world.get("latentac")
    assert stable is not None
    assert stable["metadata"]["annotations"][objects.VERSION] == "v1"
    abandon(world.settings, RUN, world.api)
    assert world.get("latentac") == stable or world.version("latentac") == "v1"


def test_green_that_is_still_going_is_waited_for(world: World) -> None:
    """KServe's finalizer keeps a deleted one for a moment; what is applied to it would go with it."""
    model = objects.Model("mine", RUN, "v1", world.store, "models/v1/files-0")
    body = objects.inference_service(world.settings, "latentac-green", model, "latentac", replicas=1)
    world.admin.apply(INFERENCE_SERVICES, body)
    finalizers = ["-n", world.namespace, "inferenceservice/latentac-green", "--type=merge", "-p"]
    world.plane.kubectl("patch", *finalizers, '{"metadata": {"finalizers": ["latentac.test/later"]}}')
    world.admin.delete(INFERENCE_SERVICES, "latentac-green")
    with pytest.raises(ServingError, match="is being deleted, and does not go"):
        world.rollout(failing_seconds=1.0)(world.candidate("v1"))
    release = threading.Timer(1.0, world.plane.kubectl, ["patch", *finalizers, '{"metadata": {"finalizers": null}}'])
    release.start()
    assert world.rollout(failing_seconds=30.0)(world.candidate("v1")).version == "v1"
    release.join()
    assert gone(world, "latentac-green")


def test_gateway_splits_traffic_and_takes_it_back(world: World) -> None:
    """The weights in their order and then all to the stable one; where green fails behind the gateway, all goes back
    at once, and the stable one never rolls. What a route needs of rights is asked for then alone."""
    if not world.plane.has_gateway:
        pytest.skip("the Gateway API's CRDs are not there: `make node-build` fetches them")
    with Gateway(world.admin, lambda backend: world.address(backend.removesuffix("-predictor"))) as gateway:
        split = {"name": "gateway", "namespace": "gateways", "hostname": "endpoint.example.org", "weights": [25, 75]}
        fields = settings_fields(world.namespace)
        fields["deploy"] |= {"gateway": {**split, "address": gateway.address}, "shadow_prompts": 4}
        settings = resolve(fields, "test")
        Rollout(world.api, settings, world.address)(world.candidate("v1"))
        stable, green = "latentac-predictor", "latentac-green-predictor"
        assert gateway.shares == [{stable: 100}]
        proof = Rollout(world.api, settings, world.address)(world.candidate("v2"))
        assert gateway.shares[1:] == [{stable: 75, green: 25}, {stable: 25, green: 75}, {stable: 100}]
        assert proof.shadow is not None
        assert [(step["weight"], step["error_fraction"]) for step in proof.shadow["canary"]] == [(25, 0.0), (75, 0.0)]
        assert gateway.hosts == {"endpoint.example.org"}
        gateway.broken.add(green)
        generation = (world.get("latentac") or {})["metadata"]["generation"]
        with pytest.raises(ServingError, match=r"at \d+ % of the traffic a fraction of .* failed; version v2 serves"):
            Rollout(world.api, settings, world.address)(world.candidate("v1"))
        time.sleep(1)
        assert gateway.shares[-1] == {stable: 100}
        assert (world.get("latentac") or {})["metadata"]["generation"] == generation
    routes = {call for call in world.calls() if "httproutes" in call[1]}
    assert routes | {("create", "gateway.networking.k8s.io/httproutes")} == ROUTES


def test_rights_are_just_those_that_are_used(world: World) -> None:
    """The audit log of a good and a failed release is the list of rights; server-side apply of what is not there asks
    for `create` too, which the log calls a patch. Without one of them the missing right is named."""
    world.rollout()(world.candidate("v1"))
    world.behaviours["latentac", "v2"] = kubelet.crash
    with pytest.raises(ServingError, match="version v1 is back"):
        world.rollout()(world.candidate("v2"))
    created = {("create", f"serving.kserve.io/{kind}") for kind in ("servingruntimes", "inferenceservices")}
    assert world.calls() | created == RIGHTS
    less = RIGHTS - {("create", "serving.kserve.io/inferenceservices")}
    world.plane.kubectl("apply", "-n", world.namespace, "-f", "-", stdin=json.dumps(role(less)))
    world.behaviours.clear()
    with pytest.raises(LatentacError, match="Grant the right to this service account") as caught:
        world.rollout()(world.candidate("v2"))
    assert "inferenceservices" in str(caught.value)
    assert world.version("latentac") == "v1"


def test_name_that_is_too_long_is_refused(world: World) -> None:
    """KServe takes it and cannot reconcile it, so it is told before anything is applied."""
    with pytest.raises(ConfigError, match=r"deploy\.name.*of \d+ characters.*at most \d+"):
        world.rollout(name="a" * 33)(world.candidate("v1"))
    assert world.calls() == set()


def test_every_object_is_valid_strictly(world: World) -> None:
    """All that settings may add is known to KServe's schema: the API server refuses unknown fields."""
    fields = settings_fields(world.namespace)
    fields["images"] |= {"pull_secrets": ["registry"], "pull_policy": "Always"}
    fields["store"] |= {"ca_config_map": "authority"}
    fields["security"] = {"user": None, "group": None, "fs_group": None}
    fields["deploy"] |= {
        "strategy": "Recreate",
        "replicas": 3,
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
        "node_selector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    }
    settings = resolve(fields, "test")
    model = objects.Model("mine", "Run_1.", "v1", "s3://models/demo", "models/v1/files-0")
    body = objects.inference_service(settings, "other", model, "latentac", replicas=3)
    live = world.admin.apply(INFERENCE_SERVICES, body)
    assert live["spec"]["predictor"]["deploymentStrategy"] == {"type": "Recreate"}
    (fetch,) = live["spec"]["predictor"]["initContainers"]
    assert {each["name"] for each in fetch["env"]} == {
        "LATENTAC_S3_ENDPOINT",
        "AWS_REGION",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "LATENTAC_S3_CA",
    }
    assert fetch["args"][:2] == ["latentac", "fetch-model"]
    with pytest.raises(ClusterError, match="field not declared in schema"):
        world.admin.apply(INFERENCE_SERVICES, {**body, "spec": {**body["spec"], "unknown": 1}})

"""The serve image behind the chart's runtime, in real pods: a release from nothing, an update, and what cannot work.

KServe's controller, the pods, their probes, the Services and the store are real. The chart is
rendered with the values of an evaluation, so that settings, runtime and rollout are of one piece.
"""

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from latentac.components.cluster.api import INFERENCE_SERVICES, PODS, SERVING_RUNTIMES, Api, Kind
from latentac.components.cluster.settings import Cluster, resolve
from latentac.components.deploy.rollout import Rollout
from latentac.critic import Critic
from latentac.runs.release.deploy import Candidate
from latentac.runs.steps import prepare
from latentac.runs.workspace import EXTENSIONS, open_run
from latentac.serving.client import Client
from latentac.serving.exported import export
from latentac.system.errors import ServingError
from latentac.worlds.builtin import builtin_pipeline
from tests.cluster.kserve import SERVICES, administrator
from tests.cluster.node import Node
from tools.binaries import program
from tools.docker import Docker
from tools.minio import Server

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
RUN = "some-run"
IMAGES = ("latentac/serve:dev", "latentac/pipeline:dev")
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
ACCOUNTS, SECRETS = Kind("", "v1", "serviceaccounts"), Kind("", "v1", "secrets")


@dataclass
class Place:
    """A namespace with the chart's runtime and a store that pods reach."""

    node: Node
    api: Api
    settings: Cluster
    models: dict[str, Path]
    folder: Path

    def candidate(self, version: str) -> Candidate:
        space = open_run(RUN, self.settings.store.url, str(self.folder))
        manifest = space.store.publish(
            f"models/{version}", self.models[version], run=RUN, step="deploy", config_hash=space.config.hash
        )
        request = {"prompt": space.prompts.held_out[0].text, "seed": 7, "count": 1}
        return Candidate(space, self.models[version], manifest, version, request)

    def address(self, name: str) -> str:
        """Of the Service: this machine has no cluster DNS, and reaches Services by their addresses."""
        service = self.api.get(SERVICES, f"{name}-predictor")
        assert service is not None
        return f"http://{service['spec']['clusterIP']}"

    def rollout(self, settings: Cluster | None = None) -> Rollout:
        return Rollout(self.api, settings or self.settings, self.address)

    def pods(self, name: str) -> list[dict[str, Any]]:
        found = self.api.find(PODS, labels=f"serving.kserve.io/inferenceservice={name}")
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def serves(self) -> str:
        request = {"prompt": "a red circle", "seed": 1, "count": 1}
        return str(Client(self.address("latentac")).predict(request)["version"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """version -> exported folder, and a run's working folder; v1 and v2 are equally good."""
    from latentac.backbones import load_backbone

    folder = tmp_path_factory.mktemp("serve")
    prepare(RUN, "", str(folder / "local"), "shapes-unet-smoke", overrides=["kernel.num_steps=3"])
    space = open_run(RUN, "", str(folder / "local"))
    config, extensions = space.config, json.loads((space.artifact("prepare") / EXTENSIONS).read_text())
    backbone = load_backbone(config.backbone, builtin_pipeline("shapes-unet"), torch.device("cpu"))
    made = {}
    for version in ("v1", "v2"):
        made[version] = folder / version
        shutil.copytree(builtin_pipeline("shapes-unet"), made[version])
        torch.manual_seed(0)
        critic = Critic(backbone, config.reward_names, config.critic)
        torch.nn.init.normal_(critic.heads.weight, std=0.5)
        critic.save(made[version] / "critic")
        export(made[version], config, run=RUN, version=version, extensions=extensions)
    return made, folder


@pytest.fixture(scope="module")
def place(
    node: Node,
    crds: list[Path],
    docker_daemon: Docker,
    minio_binary: Path,
    models: tuple[dict[str, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    node.load(IMAGES, docker_daemon)
    namespace = node.namespace("serve", restricted=True)
    api = administrator(node.kubeconfig, namespace)
    server = Server(tmp_path_factory.mktemp("minio") / "data", address=node.ip).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        made, folder = models
        settings = installed(api, namespace, server)
        prepare(RUN, settings.store.url, str(folder), "shapes-unet-smoke", overrides=["kernel.num_steps=3"])
        yield Place(node, api, settings, made, folder)
    node.delete_namespace(namespace)
    server.stop()


def installed(api: Api, namespace: str, server: Server) -> Cluster:
    """What of the chart serving needs, applied; the settings as the chart renders them."""
    values: dict[str, Any] = {"images": {name: {"registry": "", "tag": "dev"} for name in ("pipeline", "serve")}}
    values["minio"] = {"enabled": False}
    values["store"] = {
        "url": f"s3://{server.bucket}/demo",
        "endpoint": server.endpoint,
        "existingSecret": "latentac-s3",
    }
    chart = ROOT / "helm" / "latentac"
    command = [str(program("helm")), "template", "latentac", str(chart), "--namespace", namespace, "--values"]
    command += [str(chart / "ci" / "evaluation-values.yaml"), "--values", "-", "--set", "prerequisites.check=never"]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rendered = [each for each in yaml.safe_load_all(done.stdout) if each]
    named = {(each["kind"], each["metadata"]["name"]): each for each in rendered}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "latentac-s3", "namespace": namespace}}
    api.apply(SECRETS, {**secret, "stringData": {key: server.environment[key] for key in KEYS}})
    api.apply(ACCOUNTS, named["ServiceAccount", "latentac-serve"])
    api.apply(SERVING_RUNTIMES, named["ServingRuntime", "latentac"])
    fields = yaml.safe_load(named["ConfigMap", "latentac-cluster"]["data"]["cluster.yaml"])
    fields["deploy"] |= {"failing_seconds": 20.0, "max_latency_ratio": 100.0}
    return resolve(fields, "cluster.yaml")


@pytest.fixture(scope="module")
def first(place: Place) -> Any:
    """The first release: v1 serves."""
    return place.rollout()(place.candidate("v1"))


def test_the_image_paints_through_a_service(place: Place, first: Any) -> None:
    """In a namespace that enforces `restricted`, from a model that the init container fetched and verified: a steered
    image, the same for the same seed, another without steering. No token, no way to write but its own folders."""
    print(f"ready after {first.ready_seconds:.0f} s, released after {first.seconds:.0f} s")
    assert (first.version, first.image[:4]) == ("v1", b"\x89PNG")
    assert first.endpoint == f"{place.address('latentac')}/v1/models/latentac:predict"
    assert first.shadow["green"]["error_fraction"] == 0.0
    (pod,) = place.pods("latentac")
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod["spec"]["serviceAccountName"] == "latentac-serve"
    assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume]
    name = pod["metadata"]["name"]
    inside = ["exec", "-n", place.api.namespace, name, "-c", "kserve-container", "--", "python3", "-c"]
    script = "import os, pathlib; print(os.getuid(), os.access('/opt', os.W_OK), os.access('/mnt/models', os.W_OK))"
    assert place.node.kubectl(*inside, script).split()[:2] == ["65532", "False"]
    write = "try:\n    open('/mnt/models/x', 'w')\nexcept OSError as error:\n    print(error.strerror)"
    assert place.node.kubectl(*inside, write).strip() == "Read-only file system"
    with closing(urllib.request.urlopen(f"{place.address('latentac')}/metrics", timeout=30)) as answer:
        assert b"python_info" in answer.read()
    assert place.api.get(INFERENCE_SERVICES, "latentac-green") is None


def test_an_update_loses_no_request(place: Place, first: Any) -> None:
    """v2 beside v1, compared, promoted, while somebody keeps asking: every answer is one, of v1 first and v2 last."""
    command = ["-c", ASKER, place.address("latentac")]
    environment = {key: value for key, value in os.environ.items() if key not in KEYS}
    with subprocess.Popen(
        [shutil.which("python3") or "python3", *command], stdout=subprocess.PIPE, text=True, env=environment
    ) as asker:
        try:
            proof = place.rollout()(place.candidate("v2"))
            time.sleep(2)
        finally:
            asker.terminate()
        assert asker.stdout is not None
        answers = asker.stdout.read().split()
    print(f"{len(answers)} requests, {json.dumps(proof.shadow)}")
    assert proof.version == place.serves() == "v2"
    assert proof.shadow is not None
    assert proof.shadow["blue"]["error_fraction"] == 0.0
    assert proof.shadow["reward_loss"] == 0.0
    assert answers[0] == "v1"
    assert answers[-1] == "v2"
    assert {*answers} == {"v1", "v2"}


ASKER = """
import json, sys, time, urllib.request
body = json.dumps({"instances": [{"prompt": "a red circle", "num_steps": 2}]}).encode()
while True:
    time.sleep(0.3)
    try:
        form = {"Content-Type": "application/json"}
        request = urllib.request.Request(sys.argv[1] + "/v1/models/latentac:predict", body, form)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            print(json.load(answer)["predictions"][0]["version"], flush=True)
    except OSError as error:
        print(str(error).replace(" ", "-"), flush=True)
"""


def test_what_cannot_start_is_reported_by_its_pods(place: Place, first: Any) -> None:
    """An image that is nowhere, and a key that the store does not know: the pod's own words, and what served serves."""
    before = place.serves()
    other = "v1" if before == "v2" else "v2"
    runtime = place.api.get(SERVING_RUNTIMES, "latentac")
    assert runtime is not None
    spec = json.loads(json.dumps(runtime["spec"]))
    spec["containers"][0]["image"] = "registry.invalid/latentac/serve:nowhere"
    name = {"name": "latentac-broken", "namespace": place.api.namespace}
    place.api.apply(SERVING_RUNTIMES, {**runtime, "metadata": name, "spec": spec})
    deploy = place.settings.deploy
    broken = place.settings.model_copy(update={"deploy": deploy.model_copy(update={"runtime": "latentac-broken"})})
    began = time.monotonic()
    with pytest.raises(ServingError, match=rf"(ErrImagePull|ImagePullBackOff).*version {before} serves as before"):
        place.rollout(broken)(place.candidate(other))
    print(f"image: told after {time.monotonic() - began:.0f} s")

    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "wrong", "namespace": place.api.namespace}}
    place.api.apply(SECRETS, {**secret, "stringData": dict.fromkeys(KEYS, "wrong")})
    store = place.settings.store.model_copy(update={"secret": "wrong"})
    wrong = place.settings.model_copy(update={"store": store})
    began = time.monotonic()
    with pytest.raises(ServingError, match=r"storage-initializer.*exit code 3.*the server says InvalidAccessKeyId"):
        place.rollout(wrong)(place.candidate(other))
    print(f"credentials: told after {time.monotonic() - began:.0f} s")
    assert place.serves() == before
    assert place.api.get(INFERENCE_SERVICES, "latentac-green") is None


def test_stable_one_that_cannot_roll_comes_back(place: Place, first: Any) -> None:
    """Green works; the stable one's pods find no node with room. What served before is back and ready."""
    before = place.serves()
    other = "v1" if before == "v2" else "v2"

    class Selective(Api):
        """Somebody gives the stable one a node selector that no node has, in the moment of its promotion."""

        def apply(self, kind, body):
            mine = kind == INFERENCE_SERVICES and body["metadata"]["name"] == "latentac"
            if mine and body["metadata"]["annotations"]["latentac.io/version"] == other:
                predictor = {**body["spec"]["predictor"], "nodeSelector": {"nobody": "has-this"}}
                body = {**body, "spec": {"predictor": predictor}}
            return super().apply(kind, body)

    selective = Selective(place.api.client.configuration, place.api.namespace)
    with pytest.raises(ServingError, match=rf"PodScheduled|node.*version {before} is back and ready"):
        Rollout(selective, place.settings, place.address)(place.candidate(other))
    assert place.serves() == before

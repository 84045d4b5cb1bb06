"""The graph as it is compiled: the golden files, the order, the branch, the exit, what each step's pod gets."""

import itertools
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from latentac.components.cluster.settings import Cluster, read, resolve
from latentac.pipelines.__main__ import GOLDEN, MANIFESTS, SETTINGS, main
from latentac.pipelines.cluster import SHARED_MEMORY, WORK, compile_manifests, compile_pipeline
from latentac.system.errors import ConfigError
from latentac.system.steps import NAMES as STEPS
from latentac.system.steps import SCORING
from tools import manifests


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("compiled") / "latentac.yaml"
    assert main(["compile", "--to", str(target), "--manifests", str(target.with_name("manifests.yaml"))]) == 0
    return target


def loaded(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's own document, and what of each executor is Kubernetes' alone."""
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.fixture(scope="module")
def pipeline(compiled: Path) -> dict[str, Any]:
    return loaded(compiled)[0]


@pytest.fixture(scope="module")
def pods(compiled: Path) -> dict[str, Any]:
    """Step -> what kfp-kubernetes puts on its pod."""
    return {name.removeprefix("exec-"): executor for name, executor in loaded(compiled)[1].items()}


def inner(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The tasks within the exit handler, all but finish."""
    tasks: dict[str, Any] = pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    return tasks


def settings(**changes: Any) -> Cluster:
    fields = yaml.safe_load(SETTINGS.read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = fields
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return resolve(fields, "test")


def test_golden_files_are_what_is_compiled(compiled: Path) -> None:
    """Byte for byte: after a change that is meant, `make compile` writes them anew."""
    assert compiled.read_text() == GOLDEN.read_text()
    assert compiled.with_name("manifests.yaml").read_text() == MANIFESTS.read_text()


def test_steps_run_in_their_order(pipeline: dict[str, Any]) -> None:
    """Each step waits for the one before it, directly or not."""
    names = ["condition-2" if step == "deploy" else step for step in STEPS if step != "finish"]
    tasks = inner(pipeline)
    assert sorted(tasks) == sorted(names)
    for before, after in itertools.pairwise(names):
        assert before in tasks[after]["dependentTasks"]


def test_finish_runs_whatever_became_of_the_others(pipeline: dict[str, Any]) -> None:
    """It needs nothing that another step makes, and waits for their end, not for their success."""
    tasks = pipeline["root"]["dag"]["tasks"]

    assert sorted(tasks) == ["exit-handler-1", "finish"]
    assert tasks["finish"]["dependentTasks"] == ["exit-handler-1"]
    assert tasks["finish"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert set(tasks["finish"]["inputs"]) == {"parameters"}


def test_only_a_promotion_is_deployed(pipeline: dict[str, Any]) -> None:
    """The condition compares the gate's return value: kfp.local takes any other output for False, without a word."""
    condition = inner(pipeline)["condition-2"]["triggerPolicy"]["condition"]

    assert condition == "inputs.parameter_values['pipelinechannel--gate-Output'] == 'promote'"
    assert list(pipeline["components"]["comp-condition-2"]["dag"]["tasks"]) == ["deploy"]


def test_no_step_is_cached(pipeline: dict[str, Any]) -> None:
    """A step itself knows whether its artifact is there; KFP's cache knows only names."""
    tasks = {
        **pipeline["root"]["dag"]["tasks"],
        **inner(pipeline),
        **pipeline["components"]["comp-condition-2"]["dag"]["tasks"],
    }

    assert [name for name, task in tasks.items() if task.get("cachingOptions")] == []


def test_manifests_are_handed_from_step_to_step(pipeline: dict[str, Any]) -> None:
    """Lineage: every step but the first takes the manifest of a step before it."""
    given = {
        name: [source["taskOutputArtifact"]["producerTask"] for source in task["inputs"].get("artifacts", {}).values()]
        for name, task in inner(pipeline).items()
    }

    assert given == {
        "prepare": [],
        "pretrain-value": ["prepare"],
        "train": ["pretrain-value"],
        "evaluate": ["train"],
        "steer": ["train"],
        "gate": ["evaluate", "steer"],
        "condition-2": ["train"],
    }


def test_only_the_steps_that_compute_get_the_image_with_torch(pipeline: dict[str, Any]) -> None:
    """On a cluster train launches a job and deploy asks a controller: neither needs 5 GB of torch."""
    executors = pipeline["deploymentSpec"]["executors"]
    images = {name.removeprefix("exec-"): executor["container"]["image"] for name, executor in executors.items()}
    names = read(SETTINGS).images

    assert sorted(images) == sorted(STEPS)
    assert {step for step, image in images.items() if image == names.train} == set(SCORING)
    assert {image for step, image in images.items() if step not in SCORING} == {names.pipeline}


def test_only_the_run_has_no_default(pipeline: dict[str, Any]) -> None:
    """On a cluster nobody can guess it; the store is the release's."""
    parameters = pipeline["root"]["inputDefinitions"]["parameters"]

    assert [name for name, spec in parameters.items() if not spec.get("isOptional")] == ["run"]
    assert set(parameters) == {"run", "recipe", "config", "overrides", "package", "store", "output"}
    assert parameters["store"]["defaultValue"] == "s3://latentac/latentac"
    assert parameters["output"]["defaultValue"] == "/work"


def test_a_recurring_run_is_named_by_kfp(tmp_path: Path) -> None:
    """All runs of a schedule have the same parameters: were their id one of them, all but the first would do nothing.
    The backend replaces the placeholder only where it is the whole value."""
    compile_pipeline(settings(), tmp_path / "x.yaml", own_id=True)
    pipeline, _ = loaded(tmp_path / "x.yaml")
    tasks = {**pipeline["root"]["dag"]["tasks"], **inner(pipeline)}
    tasks |= pipeline["components"]["comp-condition-2"]["dag"]["tasks"]
    given = {
        name: task["inputs"]["parameters"]["run"]
        for name, task in tasks.items()
        if "run" in task["inputs"]["parameters"]
    }

    assert sorted(given) == sorted(STEPS)
    assert [*given.values()] == [{"runtimeValue": {"constant": "{{$.pipeline_job_uuid}}"}}] * len(STEPS)
    assert pipeline["root"]["inputDefinitions"]["parameters"]["run"]["defaultValue"] == "-"


def test_each_pod_is_allowed_in_a_restricted_namespace(pods: dict[str, Any]) -> None:
    """A number for the user: Argo's pods ask for runAsNonRoot, and a name proves nothing."""
    assert sorted(pods) == sorted(STEPS)
    for step, pod in pods.items():
        assert pod["securityContext"] == {"runAsUser": "65532", "runAsGroup": "65532", "runAsNonRoot": True}, step


def test_each_pod_knows_cluster_and_store_and_holds_no_secret(pipeline: dict[str, Any], pods: dict[str, Any]) -> None:
    """Settings by a ConfigMap, credentials by reference to a Secret, everything else as plain environment."""
    for step, pod in pods.items():
        (mounted,) = pod["configMapAsVolume"]
        assert (mounted["configMapName"], mounted["mountPath"]) == ("latentac-cluster", "/etc/latentac")
        (secret,) = pod["secretAsEnv"]
        assert secret["secretName"] == "latentac-s3"
        container = pipeline["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == {
            "LATENTAC_CLUSTER": "/etc/latentac/cluster.yaml",
            "LATENTAC_S3_ENDPOINT": "http://latentac-minio.latentac.svc.cluster.local:9000",
            "AWS_REGION": "us-east-1",
        }
        volumes = {volume["mountPath"] for volume in pod["emptyDirMounts"]}
        assert volumes == ({WORK, SHARED_MEMORY} if step in SCORING else {WORK})
        assert pod["podMetadata"]["labels"]["app.kubernetes.io/component"] == "pipeline"
        assert int(pod["activeDeadlineSeconds"]) >= 6 * 3600


def test_the_deploy_step_alone_knows_the_endpoints_token(tmp_path: Path) -> None:
    """By reference to its Secret."""
    compile_pipeline(settings(deploy__token_secret="door"), tmp_path / "x.yaml")
    _, pods = loaded(tmp_path / "x.yaml")
    found = {
        step.removeprefix("exec-"): [each["secretName"] for each in pod["secretAsEnv"]] for step, pod in pods.items()
    }
    assert {step for step, names in found.items() if "door" in names} == {"deploy"}
    (door,) = [each for each in pods["exec-deploy"]["secretAsEnv"] if each["secretName"] == "door"]
    assert [(each["secretKey"], each["envVar"]) for each in door["keyToEnv"]] == [("token", "LATENTAC_TOKEN")]


def test_settings_reach_the_pods(tmp_path: Path) -> None:
    """Accelerators, nodes, tolerations, pull secrets, the store's authority; users that the cluster chooses itself."""
    changed = settings(
        store__ca_config_map="our-ca",
        images__pull_secrets=["mirror"],
        images__pull_policy="Never",
        security__user=None,
        security__group=None,
        steps__compute__resources={"requests": {"cpu": "500m"}, "limits": {"nvidia.com/gpu": "1"}},
        steps__compute__node_selector={"gpu": "yes"},
        steps__compute__tolerations=[{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    )
    compile_pipeline(changed, tmp_path / "x.yaml")
    pipeline, pods = loaded(tmp_path / "x.yaml")
    container, pod = pipeline["deploymentSpec"]["executors"]["exec-evaluate"]["container"], pods["exec-evaluate"]

    assert container["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert container["resources"]["accelerator"]["resourceCount"] == "1"
    assert container["resources"]["resourceCpuRequest"] == "500m"
    assert {"name": "LATENTAC_S3_CA", "value": "/etc/latentac-ca/ca.crt"} in container["env"]
    assert [mount["configMapName"] for mount in pod["configMapAsVolume"]] == ["latentac-cluster", "our-ca"] or [
        mount["configMapName"] for mount in pod["configMapAsVolume"]
    ] == ["our-ca", "latentac-cluster"]
    assert pod["nodeSelector"]["labels"] == {"gpu": "yes"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["imagePullSecret"][0]["secretName"] == "mirror"
    assert pod["imagePullPolicy"] == "Never"
    assert pod["securityContext"] == {"runAsNonRoot": True}
    assert "nodeSelector" not in pods["exec-train"]


def test_a_resource_that_kfp_cannot_ask_for_is_named(tmp_path: Path) -> None:
    """It would be left out without a word."""
    changed = settings(steps__launch__resources={"requests": {"ephemeral-storage": "1Gi"}})
    with pytest.raises(ConfigError, match=r"steps\.launch\.resources\.requests\.ephemeral-storage = '1Gi'"):
        compile_pipeline(changed, tmp_path / "x.yaml")


def test_the_version_is_the_content(tmp_path: Path) -> None:
    """The same pipeline is uploaded once; another image is another version."""
    first = compile_pipeline(settings(), tmp_path / "a.yaml")

    assert compile_pipeline(settings(), tmp_path / "b.yaml") == first
    assert compile_pipeline(settings(images__train="mirror/train:1"), tmp_path / "c.yaml") != first


def test_kubernetes_objects_are_valid(tmp_path: Path) -> None:
    """Pipeline and PipelineVersion against the schemas of KFP's own CRDs."""
    paths = [path for folder in manifests.crds() for path in folder.rglob("pipelines.kubeflow.org_*.yaml")]
    if not paths:
        pytest.skip(
            f"no CRDs of Kubeflow Pipelines: put those of its release into a folder and export it as {manifests.NAMED}"
        )
    schemas = {}
    for path in paths:
        for document in yaml.safe_load_all(path.read_text()):
            if document and document.get("kind") == "CustomResourceDefinition":
                for version in document["spec"]["versions"]:
                    key = f"{document['spec']['group']}/{version['name']}", document["spec"]["names"]["kind"]
                    schemas[key] = version["schema"]["openAPIV3Schema"]
    compile_manifests(settings(), tmp_path / "x.yaml")
    documents = list(yaml.safe_load_all((tmp_path / "x.yaml").read_text()))

    assert [document["kind"] for document in documents] == ["Pipeline", "PipelineVersion"]
    for document in documents:
        jsonschema.validate(document, schemas[document["apiVersion"], document["kind"]])
        assert document["metadata"]["namespace"] == "latentac"
    assert documents[1]["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

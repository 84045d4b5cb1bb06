"""What the chart tells the steps: cluster.yaml, as the steps themselves read it."""

from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from latentac.components.cluster.settings import Cluster, resolve
from tests.helm.chart import BUNDLED, CI, EVERYTHING, NAMESPACE, find, render, settings_of


@pytest.mark.parametrize("name", [*CI, "everything"])
def test_settings_resolve(name: str) -> None:
    """The rendered file is what the steps' strict schema wants, with no field left to a default of theirs."""
    fields = yaml.safe_load(settings_of(render(EVERYTHING if name == "everything" else name)))
    settings = resolve(fields, name)
    assert (settings.release, settings.namespace) == ("rel", NAMESPACE)
    assert not _left_out("", fields, settings)


def _left_out(path: str, fields: Mapping[str, Any], section: BaseModel) -> list[str]:
    """Fields of the schema that the file does not say. A gateway that is not there is not said."""
    missing = []
    for name in type(section).model_fields:
        value, here = getattr(section, name), f"{path}.{name}".lstrip(".")
        if name not in fields:
            # requests and limits stand in the file where they ask for something, weights where they are not the usual
            missing += [] if name in ("gateway", "requests", "limits", "weights") else [here]
        elif isinstance(value, BaseModel):
            missing += _left_out(here, fields[name], value)
    return missing


def _settings(values: Mapping[str, Any] | str) -> Cluster:
    return resolve(yaml.safe_load(settings_of(render(values))), "cluster.yaml")


def test_values_reach_their_fields() -> None:
    """A value of the chart is the field of the same meaning, with quantities as text whatever the file wrote."""
    settings = _settings(EVERYTHING)
    assert settings.store.url == "s3://bucket/some/prefix"
    assert settings.store.endpoint == "https://s3.example.com:8443"
    assert (settings.store.secret, settings.store.ca_config_map) == ("rel-s3", "authority")
    assert (settings.steps.namespace, settings.steps.service_account) == ("kubeflow", "rel-pipeline")
    assert (settings.train.queue, settings.train.secrets) == ("models", ["hub"])
    assert settings.deploy.gateway is not None
    assert settings.deploy.gateway.weights == [10, 50]
    assert (settings.deploy.runtime, settings.deploy.name) == ("rel", "latentac")
    gpus = _settings("gpu-production").train
    assert gpus.resources.limits == {"memory": "48Gi", "nvidia.com/gpu": "1"}
    assert (gpus.min_replicas, gpus.max_replicas) == (2, 8)
    assert gpus.tolerations == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_users_can_be_left_to_the_cluster() -> None:
    """Without users in the values no pod names one, and neither do the pods that the steps make."""
    assert _settings("openshift").security.model_dump() == {"user": None, "group": None, "fs_group": None}
    assert _settings(BUNDLED).security.user == 65532


def test_a_mirror_takes_the_place_of_every_registry() -> None:
    """global.imageRegistry stands before every image, whatever its own was; a digest stands instead of a tag."""
    settings = _settings("air-gapped")
    assert settings.images.train == f"registry.example.internal/mirror/latentac/train@sha256:{'2' * 64}"
    minio = find(
        render({**BUNDLED, "global": {"imageRegistry": "mirror.example"}, "images": {"minio": {"digest": ""}}}),
        "StatefulSet",
        "rel-minio",
    )
    image = minio["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "mirror.example/minio/minio:RELEASE.2025-09-07T16-13-09Z"


def test_names_without_a_registry() -> None:
    """Images that were built and loaded on the nodes have no registry in their name."""
    local = {"registry": "", "tag": "dev", "digest": ""}
    settings = _settings({**BUNDLED, "images": {"train": local, "pullPolicy": "Never"}})
    assert (settings.images.train, settings.images.pull_policy) == ("latentac/train:dev", "Never")


def test_steps_of_another_namespace_find_settings_and_credentials() -> None:
    """Where KFP runs the steps elsewhere, ConfigMap and Secret are there too, and the account has both Roles."""
    objects = render(EVERYTHING)
    assert settings_of(objects, "kubeflow") == settings_of(objects)
    here, there = (find(objects, "Secret", "rel-s3", namespace) for namespace in (NAMESPACE, "kubeflow"))
    assert here["data"] == there["data"]
    for name, namespace in (("release", NAMESPACE), ("steps", "kubeflow")):
        binding = find(objects, "RoleBinding", f"rel-pipeline-{name}", namespace)
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "rel-pipeline", "namespace": "kubeflow"}]
    assert find(objects, "ServiceAccount", "rel-pipeline")["metadata"]["namespace"] == "kubeflow"


def test_an_account_of_kfp_is_granted_and_not_made() -> None:
    """With KFP alone the rights go to the account that its runs have, which is not the chart's to make."""
    objects = render("air-gapped")
    assert {each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"} == {
        "rel-train",
        "rel-serve",
    }
    binding = find(objects, "RoleBinding", "rel-pipeline-release")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "pipeline-runner", "namespace": "kubeflow"}]
    assert _settings("air-gapped").steps.service_account == "pipeline-runner"


def test_kserve_finds_the_store_by_the_secret() -> None:
    """The Secret has KServe's annotations, and the endpoint's account lists it."""
    objects = render(EVERYTHING)
    assert find(objects, "Secret", "rel-s3", NAMESPACE)["metadata"]["annotations"] == {
        "serving.kserve.io/s3-endpoint": "s3.example.com:8443",
        "serving.kserve.io/s3-usehttps": "1",
        "serving.kserve.io/s3-verifyssl": "1",
        "serving.kserve.io/s3-region": "us-east-1",
    }
    assert find(objects, "ServiceAccount", "rel-serve")["secrets"] == [{"name": "rel-s3"}]


def test_launcher_settings_of_kfp() -> None:
    """KFP's own ConfigMap, only when told to, sends its artifacts to the store with the store's credentials."""
    data = find(render(EVERYTHING), "ConfigMap", "kfp-launcher", "kubeflow")["data"]
    provider = yaml.safe_load(data["providers"])["s3"]["default"]
    assert data["defaultPipelineRoot"] == "s3://bucket/some/prefix/kfp"
    assert (provider["endpoint"], provider["disableSSL"]) == ("s3.example.com:8443", False)
    assert provider["credentials"]["secretRef"]["secretName"] == "rel-s3"
    assert not [each for each in render(BUNDLED) if each["metadata"]["name"] == "kfp-launcher"]

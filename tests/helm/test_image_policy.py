"""The optional policy by which a cluster's Kyverno verifies our images; what Kyverno makes of it is in tests/images."""

from typing import Any

import pytest
import yaml

from tests.helm.chart import (
    BUNDLED,
    CHART,
    HELMS,
    NAMESPACE,
    Object,
    Refused,
    find,
    helm,
    of_kind,
    render,
    strict_problems,
)
from tools.binaries import kyverno_crd

KIND = "NamespacedImageValidatingPolicy"
PEM = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----\n"
KEYLESS = {"issuer": "https://issuer.example.com", "subject": "https://ci.example.com/release"}


def policies(name: str = "helm", **policy: Any) -> list[Object]:
    return of_kind(render({**BUNDLED, "imagePolicy": {"enabled": True, **policy}}, name=name), KIND)


def policy(**values: Any) -> dict[str, Any]:
    (found,) = policies(**values)
    spec: dict[str, Any] = found["spec"]
    return spec


def test_no_cluster_needs_kyverno_by_default() -> None:
    """Nothing of it is rendered, and nothing is asked of the cluster, unless it is wanted."""
    assert not of_kind(render(BUNDLED), KIND)


@pytest.mark.parametrize("name", HELMS)
@pytest.mark.parametrize("values", [{"publicKey": PEM}, {"keyless": KEYLESS}], ids=["key", "keyless"])
def test_the_policy_is_valid(name: str, values: dict[str, Any]) -> None:
    """It fits Kyverno's CRD under both Helms, and no field of it is unknown there."""
    crd = kyverno_crd()
    if crd is None:
        pytest.skip("Kyverno's CRD is not there: `make node-build` fetches it")
    (found,) = policies(name, **values)
    assert not strict_problems(found, yaml.load(crd.read_text(), yaml.CSafeLoader))


def test_nothing_of_the_policy_is_cluster_wide() -> None:
    """It stands in the release's namespace, and in that of the steps where that is another one."""
    steps = {"namespace": "kubeflow", "serviceAccount": {"create": False, "name": "pipeline-runner"}}
    values = {**BUNDLED, "pipeline": steps, "imagePolicy": {"enabled": True, "publicKey": PEM}}
    assert [each["metadata"]["namespace"] for each in of_kind(render(values), KIND)] == [NAMESPACE, "kubeflow"]
    assert [each["metadata"]["namespace"] for each in policies(publicKey=PEM)] == [NAMESPACE]


def test_every_reference_to_our_images_is_covered() -> None:
    """By tag, by digest and by neither, under a mirror's name as well; MinIO where it is named."""
    mirror = {"global": {"imageRegistry": "mirror.example.com/x"}}
    values = {**BUNDLED, **mirror, "imagePolicy": {"enabled": True, "publicKey": PEM, "images": ["serve", "minio"]}}
    (found,) = of_kind(render(values), KIND)
    name = "mirror.example.com/x/latentac/serve"
    assert {each["glob"] for each in found["spec"]["matchImageReferences"]} >= {name, f"{name}:*", f"{name}@*"}
    assert {"glob": "mirror.example.com/x/minio/minio@*"} in found["spec"]["matchImageReferences"]
    assert all("minio/minio" not in each["glob"] for each in policy(publicKey=PEM)["matchImageReferences"])


def test_who_must_have_signed_is_what_the_values_say() -> None:
    """A key, or an identity; outside of the transparency log only where the values say so."""
    (attestor,) = policy(publicKey=PEM)["attestors"]
    assert attestor["cosign"] == {"key": {"data": PEM}}
    (attestor,) = policy(publicKey=PEM, transparencyLog=False)["attestors"]
    assert attestor["cosign"]["ctlog"] == {"insecureIgnoreTlog": True, "insecureIgnoreSCT": True}
    (attestor,) = policy(keyless=KEYLESS)["attestors"]
    assert attestor["cosign"] == {"keyless": {"identities": [KEYLESS]}}


def test_a_policy_that_only_reports_stops_nothing() -> None:
    """`Audit` reports, and lets pods start where Kyverno cannot answer; `Deny` lets none start then."""
    assert (policy(publicKey=PEM)["validationActions"], policy(publicKey=PEM)["failurePolicy"]) == (["Deny"], "Fail")
    audited = policy(publicKey=PEM, action="Audit")
    assert (audited["validationActions"], audited["failurePolicy"]) == (["Audit"], "Ignore")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "imagePolicy.publicKey: nobody is named"),
        ({"keyless": {"issuer": KEYLESS["issuer"]}}, "imagePolicy.publicKey: nobody is named"),
        ({"publicKey": PEM, "keyless": KEYLESS}, "both are given"),
        ({"keyless": KEYLESS, "transparencyLog": False}, "imagePolicy.transparencyLog"),
        ({"publicKey": "cosign.pub"}, "/imagePolicy/publicKey"),
        ({"publicKey": PEM, "images": []}, "/imagePolicy/images"),
    ],
)
def test_a_policy_that_could_not_work_is_refused(values: dict[str, Any], said: str) -> None:
    """Before an installation, with the values' names and the way out."""
    with pytest.raises(Refused, match=said):
        policies(**values)


def test_a_cluster_without_kyverno_is_reported() -> None:
    """Where the cluster can be asked, by the API that is missing and what does without it."""
    values = {**BUNDLED, "imagePolicy": {"enabled": True, "publicKey": PEM}}
    with pytest.raises(Refused, match="Kyverno: the cluster has no API policies") as refusal:
        render({**values, "prerequisites": {"check": "always"}})
    assert "imagePolicy.enabled=false does without" in str(refusal.value)


def test_the_values_of_a_release_are_the_charts(tmp_path: Any) -> None:
    """What `make release-images` writes renders with `--values`: images by digest, one flag turns the policy on."""
    from images.publish import RELEASED, Signer, values

    digests = {name: f"sha256:{index:064x}" for index, name in enumerate(RELEASED)}
    signer = Signer("", KEYLESS["subject"], KEYLESS["issuer"])
    written = tmp_path / "values.yaml"
    written.write_text(yaml.safe_dump(values(signer, "registry.example.com/ml/latentac", digests), sort_keys=False))
    text = helm(
        *("template", "rel", str(CHART), "-n", NAMESPACE, "--kube-version", "1.34.4", "--values", str(written)),
        *("--set", "minio.enabled=true,imagePolicy.enabled=true"),
    )
    objects = [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]
    runtime = find(objects, "ServingRuntime", "rel")["spec"]["containers"][0]["image"]
    assert runtime == f"registry.example.com/ml/latentac/serve@{digests['serve']}"
    (found,) = of_kind(objects, KIND)
    assert {"glob": "registry.example.com/ml/latentac/minio@*"} in found["spec"]["matchImageReferences"]

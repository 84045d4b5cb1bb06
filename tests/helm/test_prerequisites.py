"""What stops an installation before it begins, and what it says."""

from typing import Any

import pytest

from tests.helm.chart import BUNDLED, CHART, NAMESPACE, Refused, helm, render

ASKED = "apiregistration.k8s.io/v1"
"""An API that every real cluster has and that plain `helm template` does not know."""

NEEDED = (
    "batch.volcano.sh/v1alpha1",
    "argoproj.io/v1alpha1",
    "serving.kserve.io/v1alpha1",
    "serving.kserve.io/v1beta1",
)


def apis(*names: str) -> str:
    return "--api-versions=" + ",".join(names)


def refusal(values: dict[str, Any], *options: str) -> str:
    with pytest.raises(Refused) as refused:
        render(values, *options)
    return str(refused.value)


def test_nothing_given_says_everything_that_is_missing() -> None:
    """Without a store and its credentials: both at once, with what to set."""
    text = refusal({})
    assert "store.url, store.endpoint" in text
    assert "store.existingSecret" in text
    assert "minio.enabled=true" in text


@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_api_is_named(missing: str) -> None:
    """On a cluster without one of the operators: which, by its API, what does without it, and how to go on anyway."""
    text = refusal(BUNDLED, apis(ASKED, *(set(NEEDED) - {missing})))
    assert f"the cluster has no API {missing}" in text
    assert "prerequisites.check=never" in text
    assert not [each for each in NEEDED if each != missing and f"no API {each}" in text]


def test_a_complete_cluster_is_accepted() -> None:
    """With all of them there, or where nobody can be asked, or asked not to, the chart renders."""
    assert render(BUNDLED, apis(ASKED, *NEEDED))
    assert render(BUNDLED)
    assert render({**BUNDLED, "prerequisites": {"check": "never"}}, apis(ASKED))
    assert "Volcano" in refusal({**BUNDLED, "prerequisites": {"check": "always"}})


def test_what_is_off_is_not_asked_for() -> None:
    """Without an endpoint KServe may be missing, and `auto` takes it as it comes; a gateway asks for its own API."""
    without = NEEDED[:2]
    assert render({**BUNDLED, "serving": {"enabled": False}}, apis(ASKED, *without))
    assert render({**BUNDLED, "serving": {"enabled": "auto"}}, apis(ASKED, *without))
    gateway = {"name": "g", "namespace": "n", "hostname": "h", "address": "http://h"}
    assert "Gateway API" in refusal({**BUNDLED, "serving": {"gateway": gateway}}, apis(ASKED, *NEEDED))


def test_an_old_kubernetes_is_refused() -> None:
    """Helm itself says which version is needed and which is there."""
    with pytest.raises(Refused, match=r"1\.30.*1\.27"):
        helm("template", "rel", str(CHART), "-n", NAMESPACE, "--kube-version", "1.27.0", "--set", "minio.enabled=true")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"serving": {"name": "a" * 50}}, "serving.name"),
        ({"train": {"replicas": {"min": 3, "max": 2}}}, "train.replicas: min 3 is more than max 2"),
        ({"train": {"queue": {"create": True}}}, "train.queue.create"),
        ({"pipeline": {"serviceAccount": {"create": False}}}, "pipeline.serviceAccount.name"),
        ({"store": {**BUNDLED["store"], "endpoint": "http://s3"}}, "store.endpoint"),
        ({"store": {**BUNDLED["store"], "existingSecret": "mine"}}, "store.existingSecret"),
        ({"store": {"accessKey": "only"}}, "store.accessKey, store.secretKey"),
        ({"store": {"accessKey": "key", "secretKey": "short"}}, "at least 8 characters"),
    ],
)
def test_values_that_contradict_each_other(values: dict[str, Any], said: str) -> None:
    """A combination that could not work is refused with the values' names and the way out."""
    assert said in refusal({**BUNDLED, **values})


def test_a_long_release_name_is_refused() -> None:
    """Names of objects are made of the release's: one that would not fit, or has a dot, is told at once."""
    for name in ("r" * 41, "a.b"):
        with pytest.raises(Refused, match="the release's name"):
            helm("template", name, str(CHART), "--kube-version", "1.34.4", "--set", "minio.enabled=true")

"""The chart's policy in Kyverno's own engine, against images in a real registry: who may start and who may not."""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from images.publish import Signer, sign, values
from tests.helm.chart import BUNDLED, NAMESPACE, of_kind, render
from tests.registry import Registry
from tools.binaries import program
from tools.golang import Unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="session")
def kyverno() -> str:
    try:
        return str(program("kyverno"))
    except Unavailable:
        pytest.skip("Kyverno's command is not here: `python -m tools.binaries --kyverno` builds it")


class Judge:
    """The policy of a release whose images are under `ours` in the registry, signed by one key outside of a log."""

    def __init__(self, kyverno: str, folder: Path, registry: Registry, signer: Signer) -> None:
        self.kyverno, self.folder, self.host = kyverno, folder, registry.host
        written = values(signer, f"{registry.host}/ours", {"train": f"sha256:{0:064x}"})
        written["imagePolicy"]["enabled"] = True
        (policy,) = of_kind(render({**BUNDLED, **written}), "NamespacedImageValidatingPolicy")
        (folder / "policy.yaml").write_text(yaml.safe_dump(policy))

    def refusal(self, *images: str, init: Sequence[str] = ()) -> str:
        """Why a pod with these images may not start; empty where it may."""
        spec = {
            "containers": [{"name": f"c{index}", "image": image} for index, image in enumerate(images)],
            "initContainers": [{"name": f"i{index}", "image": image} for index, image in enumerate(init)],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "namespace": NAMESPACE}, "spec": spec}
        (self.folder / "pod.yaml").write_text(yaml.safe_dump(pod))
        command = [self.kyverno, "apply", str(self.folder / "policy.yaml"), "-r", str(self.folder / "pod.yaml")]
        done = subprocess.run([*command, "--registry", "--policy-report"], capture_output=True, text=True, timeout=120)
        report = yaml.safe_load(done.stdout[done.stdout.index("apiVersion:") :])
        (judged,) = report["results"]
        assert judged["result"] in ("pass", "fail"), judged  # an error would refuse a pod, too
        assert (judged["result"] == "pass") == (done.returncode == 0)
        return "" if judged["result"] == "pass" else str(judged["message"])


@pytest.fixture
def judge(kyverno: str, tmp_path: Path, registry: Registry, key: Callable[[str], Path]) -> Judge:
    return Judge(kyverno, tmp_path, registry, Signer(str(key("ours")), log=False))


@pytest.fixture
def ours(registry: Registry, key: Callable[[str], Path], predicates: dict[str, Path]) -> str:
    """An image that was released: signed and attested by our key."""
    return signed(registry, "released", key("ours"), predicates)


def signed(registry: Registry, tag: str, key: Path, predicates: Mapping[str, Path]) -> str:
    """`name@sha256:...` of a new image under `ours`, signed by that key, with these attestations."""
    subject = f"{registry.host}/ours/train@{registry.push('ours/train', tag)}"
    sign(Signer(str(key), log=False), subject, predicates)
    return subject


def test_a_released_image_may_start(judge: Judge, ours: str) -> None:
    """As container and as init container; also beside an image of another name, which is not the policy's business."""
    assert judge.refusal(ours) == ""
    assert judge.refusal(ours, init=[ours]) == ""
    assert judge.refusal(ours, f"{judge.host}/sidecars/unsigned@sha256:{1:064x}") == ""


def test_an_image_without_a_signature_may_not(judge: Judge, registry: Registry, ours: str) -> None:
    """Wherever it stands in the pod."""
    bare = f"{registry.host}/ours/train@{registry.push('ours/train', 'bare')}"
    for reported in (judge.refusal(bare), judge.refusal(ours, bare), judge.refusal(ours, init=[bare])):
        assert reported == "an image of latentac is not signed by whom imagePolicy names"


def test_an_image_that_another_key_signed_may_not(
    judge: Judge, registry: Registry, key: Callable[[str], Path], predicates: dict[str, Path]
) -> None:
    """Even with signature and attestations complete."""
    found = judge.refusal(signed(registry, "theirs", key("theirs"), predicates))
    assert found == "an image of latentac is not signed by whom imagePolicy names"


@pytest.mark.parametrize(("left", "what"), [("cyclonedx", "bill of materials"), ("slsaprovenance1", "provenance")])
def test_an_image_without_an_attestation_may_not(
    judge: Judge, registry: Registry, key: Callable[[str], Path], predicates: dict[str, Path], left: str, what: str
) -> None:
    """Signed by the right key, but without its bill of materials, or its provenance."""
    others = {kind: file for kind, file in predicates.items() if kind != left}
    found = judge.refusal(signed(registry, f"without-{left}", key("ours"), others))
    assert found == f"an image of latentac has no {what} by whom imagePolicy names"

"""`make release-images`: what stops a release, and signatures and attestations in a real registry by a real cosign."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from images import publish
from images.build import OCI, ROOT
from images.provenance import provenance
from images.publish import ATTESTED, Signer, cosign, sign, split, verify
from tests.images.conftest import PASSWORD
from tests.registry import Registry
from tools.golang import Unavailable
from tools.minio import free_port

BASE = {f"{OCI}base.name": "registry.example.com/python:3.11", f"{OCI}base.digest": f"sha256:{'ab' * 32}"}
KEYLESS = Signer(identity="https://ci.example.com/release", issuer="https://issuer.example.com")


@pytest.fixture
def released(registry: Registry, key: Callable[[str], Path], predicates: dict[str, Path]) -> tuple[Signer, str]:
    """A signer, and an image that this signer signed."""
    signer = Signer(str(key("ours")), log=False)
    subject = f"{registry.host}/ours/train@{registry.push('ours/train', '1')}"
    sign(signer, subject, predicates)
    return signer, subject


def test_what_was_signed_verifies_again(released: tuple[Signer, str], predicates: dict[str, Path]) -> None:
    """The signature, the bill of materials and the provenance are found in the registry, of that very digest."""
    signer, subject = released
    verify(signer, subject, predicates)
    with signer.verifying() as options:
        found = cosign("verify-attestation", *options, "--type", "slsaprovenance1", subject)
    statement = json.loads(base64.b64decode(json.loads(found.splitlines()[0])["payload"]))
    assert statement["predicateType"] == ATTESTED["slsaprovenance1"]
    assert statement["subject"][0]["digest"]["sha256"] == subject.rpartition(":")[2]
    assert statement["predicate"]["buildDefinition"]["externalParameters"]["dockerfile"] == "images/train.Dockerfile"


def test_what_others_signed_does_not_verify(
    registry: Registry, key: Callable[[str], Path], predicates: dict[str, Path], released: tuple[Signer, str]
) -> None:
    """Neither an image without a signature, nor one by another key."""
    signer, subject = released
    with pytest.raises(Unavailable, match="cosign verify "):
        verify(signer, f"{registry.host}/ours/train@{registry.push('ours/train', 'unsigned')}", predicates)
    with pytest.raises(Unavailable, match="cosign verify "):
        verify(Signer(str(key("theirs")), log=False), subject, predicates)


def test_what_is_only_partly_signed_does_not_verify(
    registry: Registry, key: Callable[[str], Path], predicates: dict[str, Path]
) -> None:
    """Neither without an attestation, nor with one of other content, nor with attestations and no signature."""
    signer = Signer(str(key("ours")), log=False)
    subject = f"{registry.host}/ours/train@{registry.push('ours/train', 'partly')}"
    bill = {"cyclonedx": predicates["cyclonedx"]}
    with signer.signing() as options:
        cosign("attest", *options, "--type", "cyclonedx", "--predicate", str(bill["cyclonedx"]), subject)
    with pytest.raises(Unavailable, match="no signature by this signer"):
        verify(signer, subject, bill)
    sign(signer, subject, {})
    verify(signer, subject, bill)
    with pytest.raises(Unavailable, match="cosign verify-attestation "):
        verify(signer, subject, predicates)
    with pytest.raises(Unavailable, match="what was attested as cyclonedx is not what"):
        verify(signer, subject, {"cyclonedx": predicates["slsaprovenance1"]})


def test_a_second_release_of_an_image_verifies(released: tuple[Signer, str], predicates: dict[str, Path]) -> None:
    """A release that was cut short is done again: what is there already is in nobody's way."""
    signer, subject = released
    sign(signer, subject, predicates)
    verify(signer, subject, predicates)


def test_a_signature_outside_of_the_log_asks_nobody_else(
    released: tuple[Signer, str], predicates: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TLOG=no cosign talks to the registry alone: whatever else it asked would go through a proxy that is none."""
    signer, subject = released
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    real = subprocess.run
    reported: list[str] = []

    def heard(*arguments: Any, **options: Any) -> Any:
        done = real(*arguments, **options)
        reported.append(done.stderr)
        return done

    monkeypatch.setattr(subprocess, "run", heard)
    sign(signer, subject, predicates)
    verify(signer, subject, predicates)
    assert "tuf" not in "".join(reported).lower()


def test_no_password_is_in_a_command_line(
    key: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever cosign is started with, it learns the password from its environment."""
    real, log = publish.cosign_program(), tmp_path / "log"
    spy = tmp_path / "bin" / "cosign"
    spy.parent.mkdir()
    spy.write_text(f'#!/bin/sh\necho "$@" >>{log}\nexec {real} "$@"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}{os.pathsep}{os.environ['PATH']}")
    assert "PUBLIC KEY" in Signer(str(key("ours"))).public_key()
    assert log.read_text().startswith("public-key --key")
    assert PASSWORD not in log.read_text()


def test_a_wrong_password_is_reported_at_once(key: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is opened before anything is pushed."""
    name = str(key("ours"))
    monkeypatch.setenv("COSIGN_PASSWORD", "another")
    with pytest.raises(Unavailable, match="cosign public-key ended with 1"):
        Signer(name).public_key()


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree that is a commit, and a registry that nobody has to ask."""
    monkeypatch.setattr(publish, "revision", lambda: "a" * 40)
    for name in (*publish.TOKENS, "COSIGN_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


def test_everything_that_is_missing_is_said_at_once(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree with changes, no cosign, no key, no registry in the name: each with what to do."""
    monkeypatch.setattr(publish, "revision", lambda: "a" * 40 + "-dirty")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    found = "\n".join(publish.problems(Signer(), "latentac"))
    for said in ("git status", "cosign is not on PATH: install it", "COSIGN_KEY=<file>", "PREFIX=latentac names no"):
        assert said in found


@pytest.mark.parametrize(
    ("signer", "said"),
    [
        (Signer("/nonexistent/cosign.key"), "is not a file: `cosign generate-key-pair`"),
        (Signer("/nonexistent/cosign.key"), "COSIGN_PASSWORD is not in the environment"),
        (KEYLESS, "there is no key and no identity"),
        (Signer(), "IDENTITY and ISSUER"),
        (replace(KEYLESS, log=False), "leave TLOG=no out"),
    ],
)
def test_nobody_to_sign_is_refused(clean: None, signer: Signer, said: str) -> None:
    """Each way of signing says what it lacks."""
    assert any(said in each for each in signer.problems())


def test_a_signer_who_has_all_is_taken(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key with its password, a key management service, or an identity of a CI's job."""
    (tmp_path / "cosign.key").touch()
    assert not Signer("awskms://alias/latentac").problems()
    monkeypatch.setenv("COSIGN_PASSWORD", "")
    assert not Signer(str(tmp_path / "cosign.key")).problems()
    monkeypatch.setenv("SIGSTORE_ID_TOKEN", "token")
    assert not KEYLESS.problems()


def test_a_registry_that_does_not_answer_is_named(clean: None, registry: Registry) -> None:
    """With its address; the one that answers is no problem."""
    port = free_port()
    found = "\n".join(publish.problems(Signer(), f"127.0.0.1:{port}/ours"))
    assert f"no registry answers at http://127.0.0.1:{port}/v2/" in found
    assert "no registry" not in "\n".join(publish.problems(Signer(), f"{registry.host}/ours"))


def test_nothing_is_done_where_something_is_missing(tmp_path: Path) -> None:
    """The command ends with the list, in seconds and without docker."""
    environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none"}
    command = [sys.executable, "-m", "images.publish", "serve", "horse"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "make release-images: nothing was pushed:\n- IMAGES names horse; there are" in done.stderr


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [
        ("registry.example.com/ml/latentac", ("registry.example.com", "ml/latentac")),
        ("localhost/latentac", ("localhost", "latentac")),
        ("127.0.0.1:5000/latentac", ("127.0.0.1:5000", "latentac")),
        ("ml/latentac", ("", "ml/latentac")),
        ("latentac", ("", "latentac")),
    ],
)
def test_the_registry_is_the_part_with_a_dot_or_a_port(prefix: str, parts: tuple[str, str]) -> None:
    """As docker reads names."""
    assert split(prefix) == parts


def dependencies(name: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = provenance(name, labels)["buildDefinition"]["resolvedDependencies"]
    return found


def test_provenance_names_commit_base_and_locks() -> None:
    """Each by its digest: the commit, the base of the labels, every lock that the image and its torch layer install."""
    commit, base, *locks = dependencies("train", BASE)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    assert commit["digest"]["gitCommit"].removesuffix("-dirty") == head
    assert base == {"uri": "oci://registry.example.com/python:3.11", "digest": {"sha256": "ab" * 32}}
    names = ("kfp", "tools", "torch", "train")
    assert [each["name"] for each in locks] == [f"requirements/images/{name}.lock" for name in names]
    for each in locks:
        output = subprocess.check_output(["sha256sum", each["name"]], cwd=ROOT, text=True).split()[0]
        assert each["digest"] == {"sha256": output}


def test_provenance_claims_no_digest_that_nobody_knows() -> None:
    """A base that was made here is named without one, and an image without labels has none."""
    assert dependencies("pipeline", {**BASE, f"{OCI}base.digest": ""})[1] == {"uri": f"oci://{BASE[f'{OCI}base.name']}"}
    assert not [each for each in dependencies("pipeline", {}) if each.get("uri", "").startswith("oci:")]


def test_provenance_says_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the builder is in it that is not meant for the public: no mirror, no password."""
    monkeypatch.setenv("PIP_INDEX_URL", "https://user:word@mirror.example.com/simple")
    monkeypatch.setenv("COSIGN_PASSWORD", "secret-word")
    found = json.dumps(provenance("train", BASE))
    assert "mirror.example.com" not in found
    assert "secret-word" not in found


def test_provenance_names_the_job_of_a_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address, where the CI says it; otherwise a name that no other run has."""
    for part in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID", "CI_JOB_URL", "BUILD_URL"):
        monkeypatch.delenv(part, raising=False)
    first, second = (provenance("train", BASE)["runDetails"]["metadata"]["invocationId"] for _ in range(2))
    assert first.startswith("urn:uuid:")
    assert first != second
    monkeypatch.setenv("CI_JOB_URL", "https://ci.example.com/jobs/7")
    run = provenance("train", BASE, "https://ci.example.com/runner")["runDetails"]
    assert run["metadata"]["invocationId"] == "https://ci.example.com/jobs/7"
    assert run["builder"]["id"] == "https://ci.example.com/runner"

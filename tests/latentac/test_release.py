"""A release: the model is published, somebody proves that it serves, and only then it is the one in production."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from latentac.backbones import load_backbone
from latentac.config.sections import Extension
from latentac.critic import Critic
from latentac.runs.release.deploy import Candidate, candidate_key
from latentac.runs.release.incumbent import pointer, production
from latentac.runs.steps import deploy, prepare
from latentac.runs.workspace import open_run
from latentac.serving.deployment import Deployment
from latentac.serving.exported import Exported, read
from latentac.store import Store
from latentac.system.errors import ArtifactNotFound, ServingError
from latentac.worlds.builtin import builtin_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PRODUCTION, CANDIDATE = pointer("shapes-unet-smoke"), candidate_key("shapes-unet-smoke")
PROMOTED = {"decision": "promote", "reasons": ["gain: 0.100 is at least 0.050"], "checks": []}


def trained_run(run: str, output: Path) -> Store:
    """A run as deploy finds it: prepared, trained, judged."""
    prepare(run, "", str(output), "shapes-unet-smoke", overrides=[f"seed={len(run)}"])
    space = open_run(run, "", str(output))
    made = output / run / "made"
    shutil.copytree(builtin_pipeline("shapes-unet"), made / "policy")
    backbone = load_backbone(Extension(use="unet"), made / "policy", torch.device("cpu"))
    Critic(backbone, space.config.reward_names, space.config.critic).save(made / "critic")
    config_hash = space.config.hash
    space.store.publish(f"{run}/train", made, run=run, step="train", config_hash=config_hash, metrics={"run": run})
    (made / "decision").mkdir()
    (made / "decision" / "gate.json").write_text(json.dumps(PROMOTED))
    space.store.publish(f"{run}/gate", made / "decision", run=run, step="gate", config_hash=config_hash)
    return space.store


def proved(candidate: Candidate) -> Deployment:
    return Deployment("http://here", candidate.version, candidate.request, b"PNG", "0" * 64, {}, 10, 1.0, 2.0, {"n": 1})


def test_what_is_proved_is_in_production(tmp_path: Path) -> None:
    """The proof gets the whole exported model, as it is in the store; its numbers are in deployment.json; the next run
    names this one as the one before it."""
    store = trained_run("first", tmp_path)
    seen: list[Candidate] = []

    def prove(candidate: Candidate) -> Deployment:
        seen.append(candidate)
        assert read(candidate.folder).version == candidate.version
        assert store.manifest(f"models/{candidate.version}") == candidate.manifest
        assert store.read_json(CANDIDATE) == {"version": candidate.version, "run": "first"}
        with pytest.raises(ArtifactNotFound):
            store.read_json(PRODUCTION)
        return proved(candidate)

    manifest = deploy("first", "", str(tmp_path), prove=prove)
    (candidate,) = seen
    version = manifest.metrics["version"]
    assert version == candidate.version
    assert version.startswith("first-")
    now = production(store, "shapes-unet-smoke")
    assert now is not None
    assert (now.version, now.run, now.previous, now.forced) == (version, "first", None, ())
    store.fetch("first/deploy", tmp_path / "deployed")
    content = json.loads((tmp_path / "deployed" / "deployment.json").read_text())
    assert (content["endpoint"], content["shadow"], content["previous"]) == ("http://here", {"n": 1}, None)
    assert (tmp_path / "deployed" / "image.png").read_bytes() == b"PNG"

    trained_run("second", tmp_path)
    deploy("second", "", str(tmp_path), prove=proved)
    assert store.read_json(PRODUCTION)["previous"] == version
    deploy("first", "", str(tmp_path), prove=proved)
    assert store.read_json(PRODUCTION)["run"] == "second"  # a step that is done is not done again by a resume
    deploy("first", "", str(tmp_path), prove=proved, force=True)
    assert store.read_json(PRODUCTION)["run"] == "first"  # the way back is asked for
    assert store.read_json(PRODUCTION)["forced"] == []


def test_what_is_not_proved_stays_a_candidate(tmp_path: Path) -> None:
    """The model is there to be looked at, and production is what it was; the step can be run again."""
    store = trained_run("first", tmp_path)

    def refuse(candidate: Candidate) -> Deployment:
        raise ServingError("here", "answers nothing", "Look.")

    with pytest.raises(ServingError, match="answers nothing"):
        deploy("first", "", str(tmp_path), prove=refuse)
    with pytest.raises(ArtifactNotFound):
        store.read_json(PRODUCTION)
    version = store.read_json(CANDIDATE)["version"]
    assert store.keys("models") == [f"models/{version}"]
    assert deploy("first", "", str(tmp_path), prove=proved).metrics["version"] == version


def test_the_best_arm_of_the_benchmark_is_the_default(tmp_path: Path) -> None:
    """Of a request that names no method: its method, strength and particles, not those that are configured first."""
    trained_run("first", tmp_path)
    space = open_run("first", "", str(tmp_path))
    configured = [method.name for method in space.config.steering.methods]
    arms = [("none", 0.0, 1, 0.9), (configured[0], 5.0, 1, 0.5), ("svdd", 3.0, 2, 0.7)]
    rows = [
        {
            "method": method,
            "strength": strength,
            "particles": count,
            "nfe": 5,
            "reward": "shapes_verifier",
            "mean": mean,
        }
        for method, strength, count, mean in arms
    ]
    (tmp_path / "steered").mkdir()
    (tmp_path / "steered" / "steering.json").write_text(json.dumps(rows))
    space.store.publish(
        "first/steer", tmp_path / "steered", run="first", step="steer", config_hash=space.config.hash, metrics={}
    )
    found: list[Exported] = []

    def prove(candidate: Candidate) -> Deployment:
        found.append(read(candidate.folder))
        return proved(candidate)

    deploy("first", "", str(tmp_path), prove=prove)
    (exported,) = found
    assert configured[0] != "svdd"
    assert exported.default_method == "svdd"
    assert (exported.methods["svdd"].strength, exported.methods["svdd"].particles) == (3.0, 2)

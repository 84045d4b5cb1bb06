"""The model in production as a second run meets it: compared where it fits, named with the reason where it does not."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL

from latentac.config.fields import merge
from latentac.runs import steps
from latentac.runs.release.incumbent import (
    BEFORE_PROJECTS,
    in_production,
    load_incumbent,
    pointer,
    put_in_production,
    trouble,
)
from latentac.runs.workspace import EXTENSIONS, Workspace, open_run
from latentac.serving.exported import FILE, export
from latentac.store import copy_folder
from latentac.system.errors import ConfigError, IntegrityError
from latentac.training.value_pretraining import new_critic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

POINTER = pointer("shapes-unet-smoke")
SMALL = [
    *("kernel.num_steps=2", "evaluation.num_images=8", "evaluation.num_gallery_prompts=2"),
    *("evaluation.num_diversity_prompts=3", "evaluation.images_per_prompt=2", "steering.methods=[]"),
]


def start(output: Path, run: str, *overrides: str) -> Workspace:
    """A prepared run with a `train` artifact as training would leave it: the untrained policy and a new critic."""
    steps.prepare(run, "", str(output), "shapes-unet-smoke", overrides=[*SMALL, *overrides])
    space = open_run(run, "", str(output))
    policy, folder = space.base_policy(), output / f"made-{run}"
    policy.backbone.save(folder / "policy")
    new_critic(space.config, policy).save(folder / "critic")
    (folder / "history.json").write_text("[]")
    space.store.publish(
        f"{run}/train",
        folder,
        run=run,
        step="train",
        config_hash=space.config.hash,
        parents=[space.prepared],
        metrics={"iterations": 0},
    )
    return space


def promote(space: Workspace, version: str) -> None:
    """Put the run's model in production, as `deploy` does, without asking a server."""
    folder = space.folder.parent / f"model-{version}"
    copy_folder(space.artifact("train") / "policy", folder)
    copy_folder(space.artifact("train") / "critic", folder / "critic")
    answer = json.loads((space.artifact("prepare") / EXTENSIONS).read_text())
    export(folder, space.config, run=space.run, version=version, extensions=answer)
    put(space, version, folder)


def put(space: Workspace, version: str, folder: Path) -> None:
    space.store.publish(
        f"models/{version}",
        folder,
        run=space.run,
        step="deploy",
        config_hash=space.config.hash,
        parents=[space.store.manifest(f"{space.run}/train")],
    )
    put_in_production(space, version)


def read(space: Workspace, step: str, name: str) -> Any:
    return json.loads((space.artifact(step) / name).read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run whose model is in production."""
    output = tmp_path_factory.mktemp("runs")
    space = start(output, "first")
    promote(space, "first-1")
    return space


@pytest.fixture
def copy(first: Workspace, tmp_path: Path) -> Workspace:
    """The same store and folders, to be spoilt."""
    output = tmp_path / "runs"
    shutil.copytree(first.folder.parent, output)
    return open_run("first", "", str(output))


def test_a_kernel_that_does_not_fit_the_backbone_is_reported_by_field(tmp_path: Path) -> None:
    """The message names the kernel, both noise paths, and the kernels that would fit."""
    with pytest.raises(ConfigError, match=r"kernel.use = 'cps': samples flow models, and unet is .* Use one of ddim"):
        start(tmp_path, "misfit", "kernel.use=cps")


def again(space: Workspace, run: str, *overrides: str) -> Workspace:
    return start(space.folder.parent, run, *overrides)


def test_a_second_run_is_held_against_the_first(copy: Workspace) -> None:
    """The same weights, prompts and noise: no difference in any image, all diversity kept, promoted, deployable."""
    place = {"run": "second", "store": "", "output": str(copy.folder.parent)}
    space = again(copy, "second")
    assert steps.evaluate(**place).metrics["diversity_kept_incumbent"] == 1.0
    evaluation = read(space, "evaluate", "evaluation.json")
    digest = space.store.manifest("models/first-1").digest
    assert evaluation["production"] == {"version": "first-1", "sha256": digest, "problem": ""}
    assert evaluation["incumbent"] == evaluation["trained"]
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 8}
    assert evaluation["incumbent_difference"] == dict.fromkeys(space.config.reward_names, nothing)
    assert evaluation["latency"]["incumbent"]["median"] > 0
    assert set(next(iter(evaluation["categories"].values()))) == {"base", "trained", "incumbent"}
    assert (space.artifact("evaluate") / "gallery" / "incumbent.png").is_file()

    steps.steer(**place)
    assert steps.gate(**place).metrics["decision"] == "promote"
    reasons = (space.artifact("gate") / "reasons.md").read_text()
    assert "| passed | files of the incumbent | as published | is as published |" in reasons
    assert "| passed | model in production, still the one that was compared | first-1 | is first-1 |" in reasons


def test_an_incumbent_that_was_damaged_after_the_evaluation_holds(copy: Workspace) -> None:
    """One changed byte in its stored weights: the gate looks again before it decides."""
    place = {"run": "second", "store": "", "output": str(copy.folder.parent)}
    space = again(copy, "second")
    steps.evaluate(**place)
    steps.steer(**place)
    weights = next((copy.folder.parent / "store" / "models" / "first-1").rglob("diffusion_pytorch_model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert steps.gate(**place).metrics["decision"] == "hold"
    (reason,) = read(space, "gate", "gate.json")["reasons"]
    assert reason.startswith("files of the incumbent: ")
    assert "sha256" in reason


def test_a_model_promoted_in_between_holds(copy: Workspace) -> None:
    """The comparison is of a model that no longer serves."""
    place = {"run": "second", "store": "", "output": str(copy.folder.parent)}
    space = again(copy, "second")
    steps.evaluate(**place)
    steps.steer(**place)
    promote(copy, "first-2")
    assert steps.gate(**place).metrics["decision"] == "hold"
    assert read(space, "gate", "gate.json")["reasons"][0] == (
        "model in production, still the one that was compared: first-2, not first-1"
    )


def test_nothing_in_production_is_nothing_to_compare(copy: Workspace) -> None:
    """No pointer, or one of this very run without a version before it."""
    assert in_production(copy) is None
    copy.store.write_json(POINTER, {"version": "first-1", "run": "first", "previous": "older-1"})
    assert in_production(copy) == "older-1"
    (copy.folder.parent / "store" / POINTER).unlink()
    found = load_incumbent(copy, copy.base_policy())
    assert (found.version, found.sha256, found.problem, found.policy) == (None, None, "", None)


@pytest.mark.parametrize("content", [{}, [], {"version": 3, "run": "x"}, {"run": "first"}], ids=repr)
def test_a_pointer_that_names_nothing_is_refused(copy: Workspace, content: object) -> None:
    """A damaged registry is not an empty registry."""
    copy.store.write_json(POINTER, content)
    with pytest.raises(IntegrityError, match="it names no version and run"):
        in_production(copy)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (FILE, {"backbone": {"use": "dit"}}, "models/bad-1: its backbone is dit, that of this run unet"),
        (FILE, {"schema": 1}, "is not valid"),
        ("unet/config.json", {"sample_size": 16}, r"its latents are \(4, 16, 16\), those of this run \(4, 8, 8\)"),
        (FILE, {"kernel": {"use": "elsewhere:Kernel"}}, "names a kernel that is not built in"),
        (FILE, {"kernel": {"noise": -1}}, r"kernel\.noise"),
        (None, {}, "nothing was published there"),
    ],
    ids=["backbone", "schema", "latents", "class", "setting", "missing"],
)
def test_an_incumbent_that_does_not_fit_is_named_with_the_reason(
    copy: Workspace, part: str | None, change: dict[str, Any], words: str
) -> None:
    """No comparison, no crash: the evaluation says why, and the gate holds by it."""
    if part is None:
        copy.store.write_json(POINTER, {"version": "bad-1", "run": "first", "previous": None})
    else:
        folder = copy.folder.parent / "bad"
        shutil.copytree(copy.folder.parent / "model-first-1", folder)
        content = json.loads((folder / part).read_text())
        (folder / part).write_text(json.dumps(merge(content, change)))
        put(copy, "bad-1", folder)
    space = again(copy, "second")
    found = load_incumbent(space, space.base_policy())
    assert found.version == "bad-1"
    assert found.policy is None
    assert re.search(words, found.problem), found.problem


def test_a_model_of_another_project_judges_nobody(copy: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    """A demo in the same store is not an incumbent of another model: by its name, by its file's, by what it is for."""
    mine = copy.folder.parent / "mine.yaml"
    mine.write_text("evaluation: {num_images: 8}\n")
    named = again(copy, "named", "project=mine")
    steps.prepare("filed", "", str(copy.folder.parent), "shapes-unet-smoke", config=str(mine), overrides=SMALL)
    filed = open_run("filed", "", str(copy.folder.parent))
    aimed = again(copy, "aimed", "gate.reward=jpeg_compressibility")
    names = [space.config.project for space in (copy, named, filed, aimed)]
    assert names == ["shapes-unet-smoke", "mine", "mine", "shapes-unet-smoke-jpeg_compressibility"]
    assert [in_production(space) for space in (named, filed, aimed)] == [None] * 3
    assert load_incumbent(named, named.base_policy()).version is None
    place = {"run": "named", "store": "", "output": str(copy.folder.parent)}
    steps.evaluate(**place)
    steps.steer(**place)
    assert steps.gate(**place).metrics["decision"] == "promote"
    assert read(named, "evaluate", "evaluation.json")["production"]["version"] is None
    put_in_production(named, "named-1")
    assert in_production(filed) == "named-1"
    assert in_production(again(copy, "second")) == "first-1"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_pointer_from_before_projects_judges_nobody_and_is_reported(
    copy: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing says whose model it was."""
    (copy.folder.parent / "store" / POINTER).unlink()
    copy.store.write_json(BEFORE_PROJECTS, {"version": "old-1", "run": "old", "previous": None})
    space = again(copy, "second")
    assert load_incumbent(space, space.base_policy()).version is None
    assert f"{BEFORE_PROJECTS} is of a version of latentac without projects" in caplog.text


def test_an_incumbent_that_was_published_again_is_fetched_again(copy: Workspace) -> None:
    """What lies in the run's folder from an earlier try is of the content that it had then."""
    space = again(copy, "second")
    assert load_incumbent(space, space.base_policy()).problem == ""
    folder = copy.folder.parent / "anew"
    shutil.copytree(copy.folder.parent / "model-first-1", folder)
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**content, "examples": ["a red circle"]}))
    put(copy, "first-1", folder)
    found = load_incumbent(space, space.base_policy())
    assert (found.problem, found.sha256) == ("", copy.store.manifest("models/first-1").digest)


def test_trouble_is_reported_and_what_it_was_made_from_may_be_gone(copy: Workspace) -> None:
    """The incumbent's own bytes count; its run may have been cleared away."""
    digest = copy.store.manifest("models/first-1").digest
    copy.store.delete("first/train")
    assert trouble(copy, "first-1", digest) == ""
    assert trouble(copy, "first-1", "0" * 64) == "models/first-1 was replaced after the evaluation"
    assert "nothing was published there" in trouble(copy, "gone-1", digest)


def test_an_incumbent_with_images_of_another_size_does_not_fit(copy: Workspace) -> None:
    """Its latents have the size of this run's, and its autoencoder has one layer fewer that doubles it."""
    folder = copy.folder.parent / "small"
    shutil.copytree(copy.folder.parent / "model-first-1", folder)
    described = json.loads((folder / "vae" / "config.json").read_text())
    layers = {name: described[name][:-1] for name in ("block_out_channels", "down_block_types", "up_block_types")}
    shutil.rmtree(folder / "vae")
    AutoencoderKL.from_config({**described, **layers}).save_pretrained(folder / "vae")
    put(copy, "small-1", folder)
    space = again(copy, "second")
    found = load_incumbent(space, space.base_policy())
    assert found.policy is None
    assert re.search(r"its \w+ are \(16, 16, 3\), those of this run \(32, 32, 3\)", found.problem), found.problem

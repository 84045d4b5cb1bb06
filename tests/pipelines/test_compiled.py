"""The graph as it is compiled: the golden file, the order, the branch, no caching."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import IMAGE
from pipelines.__main__ import GOLDEN, main
from pipelines.pipeline import STEPS


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("compiled") / "latentac.yaml"
    assert main(["compile", "--to", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def pipeline(compiled: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(compiled.read_text()))


def test_golden_file_is_what_is_compiled(compiled: Path) -> None:
    """Byte for byte: after a change that is meant, `make compile` writes it anew."""
    assert compiled.read_text() == GOLDEN.read_text()


def test_steps_run_in_their_order(pipeline: dict[str, Any]) -> None:
    """Each step waits for the one before it, directly or not."""
    tasks = pipeline["root"]["dag"]["tasks"]
    names = ["condition-1" if step == "deploy" else step for step in STEPS]
    assert sorted(tasks) == sorted(names)
    for before, after in itertools.pairwise(names):
        assert before in tasks[after]["dependentTasks"]


def test_only_a_promotion_is_deployed(pipeline: dict[str, Any]) -> None:
    """The condition compares the gate's return value: kfp.local takes any other output for False, without a word."""
    condition = pipeline["root"]["dag"]["tasks"]["condition-1"]["triggerPolicy"]["condition"]

    assert condition == "inputs.parameter_values['pipelinechannel--gate-Output'] == 'promote'"
    assert list(pipeline["components"]["comp-condition-1"]["dag"]["tasks"]) == ["deploy"]


def test_no_step_is_cached(pipeline: dict[str, Any]) -> None:
    """A verb itself knows whether its artifact is there; KFP's cache knows only names."""
    tasks = {**pipeline["root"]["dag"]["tasks"], **pipeline["components"]["comp-condition-1"]["dag"]["tasks"]}

    assert [name for name, task in tasks.items() if task.get("cachingOptions")] == []


def test_manifests_are_handed_from_step_to_step(pipeline: dict[str, Any]) -> None:
    """Lineage: every step but the first takes the manifest of a step before it."""
    tasks = pipeline["root"]["dag"]["tasks"]
    given = {
        name: [source["taskOutputArtifact"]["producerTask"] for source in task["inputs"].get("artifacts", {}).values()]
        for name, task in tasks.items()
    }

    assert given == {
        "prepare": [],
        "pretrain-value": ["prepare"],
        "train": ["pretrain-value"],
        "evaluate": ["train"],
        "steer": ["train"],
        "gate": ["evaluate", "steer"],
        "condition-1": ["train"],
    }


def test_every_step_runs_in_the_one_image(pipeline: dict[str, Any]) -> None:
    """The golden file is compiled with the default of `LATENTAC_IMAGE`."""
    executors = pipeline["deploymentSpec"]["executors"].values()

    assert {executor["container"]["image"] for executor in executors} == {IMAGE}


def test_run_and_store_have_no_default(pipeline: dict[str, Any]) -> None:
    """On a cluster nobody can guess them; the rest can be left out."""
    parameters = pipeline["root"]["inputDefinitions"]["parameters"]

    assert [name for name, spec in parameters.items() if not spec.get("isOptional")] == ["run", "store"]
    assert set(parameters) == {"run", "recipe", "config", "overrides", "store", "output"}

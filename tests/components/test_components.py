"""A component is its step: the same name, the same arguments, nothing imported before it runs."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from latentac import components
from latentac.runs import steps
from latentac.system.steps import NAMES as STEPS
from latentac.system.steps import SCORING

FOLDER = Path(components.__file__).parent
SHOWN = {
    "pretrain_value": ("metrics",),
    "evaluate": ("metrics", "page"),
    "steer": ("metrics", "page"),
    "gate": ("Output", "metrics", "reasons"),
    "finish": ("report", "card"),
}
"""What a step gives beside its manifest: the gate's decision, and numbers and pages for the UI."""
FOLDERS = sorted(path.parent.name for path in FOLDER.glob("*/component.py"))


def component(name: str) -> Any:
    return getattr(importlib.import_module(f"components.{name}.component"), name)


def source(name: str) -> str:
    return (FOLDER / name / "component.py").read_text()


def test_folders_are_the_steps_are_the_functions() -> None:
    """Who knows one knows all three: `pretrain-value` is pretrain_value where Python wants a name."""
    assert sorted(STEPS) == sorted(name.replace("_", "-") for name in FOLDERS)
    assert sorted(STEPS) == sorted(steps.FUNCTIONS)


@pytest.mark.parametrize("name", FOLDERS)
def test_parameters_are_the_steps_parameters(name: str) -> None:
    """The component's plain inputs are exactly what the step takes; artifacts are manifests and come on top."""
    inputs = {
        key: spec for key, spec in component(name).component_spec.inputs.items() if not spec.type.startswith("system.")
    }

    taken = set(inspect.signature(getattr(steps, name)).parameters)
    # A component passes in how a cluster launches and serves. Only a person forces a deployment or overrides a gate.
    assert set(inputs) == taken - {"launch", "prove", "force"} - ({"overrides"} if name == "gate" else set())
    assert {spec.type for spec in inputs.values()} <= {"String", "List"}


@pytest.mark.parametrize("name", FOLDERS)
def test_output_is_the_manifest(name: str) -> None:
    """Weights go to the store; the pipeline carries manifests, and the gate's decision."""
    outputs = component(name).component_spec.outputs

    assert set(outputs) == {"manifest", *SHOWN.get(name, ())}


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_of_latentac_is_imported_outside_the_function(name: str) -> None:
    """KFP ships the function's source alone, and compiling must not need torch. The image's name is read then."""
    outside = [node for node in ast.parse(source(name)).body if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [ast.unparse(node) for node in outside if "latentac" in ast.unparse(node)]

    assert all(line.startswith("from latentac.components import ") for line in ours)


@pytest.mark.parametrize("name", FOLDERS)
def test_step_runs_in_the_image_and_installs_nothing(name: str) -> None:
    """The default of KFP is to pip-install itself in every pod."""
    container = component(name).component_spec.implementation.container

    step = name.replace("_", "-")
    assert container.image == (components.TRAIN if step in SCORING else components.PIPELINE)
    assert "pip install" not in " ".join([*container.command, *container.args])


@pytest.mark.parametrize("name", FOLDERS)
def test_component_is_thin(name: str) -> None:
    """One step, no logic: at most 60 lines."""
    assert len(source(name).splitlines()) <= 60
    assert source(name).count("from latentac.runs.steps import") == 1


def test_readme_names_every_step_and_its_artifact() -> None:
    """The table of components/README.md is complete."""
    readme = (FOLDER / "README.md").read_text()

    assert [step for step in STEPS if f"| `{step}` |" not in readme] == []

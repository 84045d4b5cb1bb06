"""One exported folder for all tests of serving: the shipped pipeline and a critic that has an opinion."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from latentac.backbones import load_backbone
from latentac.config.schema import Config
from latentac.critic import Critic
from latentac.runs.resolution import Resolved, resolve_all
from latentac.sampling.steering import STEERING
from latentac.serving.exported import FILE, add_base, export
from latentac.serving.generator import Generator
from latentac.serving.process import ServerProcess
from latentac.worlds.builtin import builtin_pipeline
from tests.latentac.serving import fuzzing

READY_SECONDS = 240.0


@pytest.fixture(scope="session")
def resolved() -> Resolved:
    always = {"start": 0.0, "stop": 1.0}  # costs are told as if every step were steered
    return resolve_all(
        {
            "recipe": "test",
            "backbone": {"source": "builtin:shapes-unet"},
            "prompts": {"source": "builtin:shapes"},
            "rewards": [{"use": "shapes_verifier"}, {"use": "jpeg_compressibility", "weight": 0.0}],
            "steering": {"methods": [{"use": name, **always} for name in STEERING]},
            "gate": {"reward": "shapes_verifier"},
        }
    )


@pytest.fixture(scope="session")
def config(resolved: Resolved) -> Config:
    return resolved.config


@pytest.fixture(scope="session")
def exported_folder(tmp_path_factory: pytest.TempPathFactory, resolved: Resolved) -> Path:
    """Not trained; the heads get random weights, because those of a new critic are zero and steer nothing."""
    folder, config = tmp_path_factory.mktemp("exported"), resolved.config
    shutil.copytree(builtin_pipeline("shapes-unet"), folder, dirs_exist_ok=True)
    backbone = load_backbone(config.backbone, folder, torch.device("cpu"))
    torch.manual_seed(0)
    critic = Critic(backbone, config.reward_names, config.critic)
    torch.nn.init.normal_(critic.heads.weight, std=0.5)
    critic.save(folder / "critic")
    add_base(folder, builtin_pipeline("shapes-unet"))
    answered = resolved.described()
    export(folder, config, run="some-run", version="some-version", examples=["two red squares"], extensions=answered)
    return folder


@pytest.fixture(scope="session")
def generator(exported_folder: Path) -> Generator:
    return Generator(exported_folder, torch.device("cpu"))


def changed(exported_folder: Path, folder: Path, **sections: dict[str, Any]) -> Path:
    """The exported folder with other settings. Its other files are the same ones, by hard links."""
    shutil.copytree(exported_folder, folder, copy_function=os.link, dirs_exist_ok=True)
    (folder / FILE).unlink()
    described = json.loads((exported_folder / FILE).read_text())
    for name, fields in sections.items():
        described[name] |= fields
    (folder / FILE).write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="session")
def small(exported_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose limits are so low that the largest request takes a moment. It cuts long prompts: how many tokens a
    text has no JSON schema can tell. For all tests that only ask it."""
    limits = {"max_images": 2, "max_steps": 3, "max_particles": 3, "allow_truncation": True}
    quick = {"batch_rows": 6, "batch_wait_seconds": 0.0}
    folder = tmp_path_factory.mktemp("small")
    changed(exported_folder, folder, limits=limits, kernel={"num_steps": 2}, batching=quick)
    with ServerProcess(folder, ready_seconds=READY_SECONDS) as server:
        yield server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was fuzzed in this process."""
    if lines := list(fuzzing.answered()):
        terminalreporter.section(f"fuzzed from seed {fuzzing.SEED}")
        for line in lines:
            terminalreporter.line(line)

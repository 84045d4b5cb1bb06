"""A run as its steps find it: the resolved configuration, the store, and the artifacts of the steps before.

torch and diffusers are imported where they are needed: the steps that only launch or decide do without them.
"""

import functools
import getpass
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentac.config.schema import Config
from latentac.config.validation import resolve
from latentac.runs.package import changed_sources, make_unpacked_importable
from latentac.runs.reporting.summary import prepared
from latentac.store import Manifest, Store, open_store
from latentac.store.published import parse, read
from latentac.system.errors import ArtifactNotFound
from latentac.system.names import working_folder

if TYPE_CHECKING:
    import torch

    from latentac.critic import Critic
    from latentac.rewards.configured import ConfiguredReward
    from latentac.sampling.policy import Policy
    from latentac.worlds.prompts import Prompt, PromptSet

_log = logging.getLogger(__name__)

EXTENSIONS = "extensions.json"
"""In the artifact of `prepare`: what the classes of the extensions say of themselves, for steps without torch."""

PACKAGE = "package"
"""There too: the folder of the user's own code, if the run has any."""

SHARED = "shared"
"""In a run's folder, where that is all that can be written to: what its local copies share."""

CHECKPOINTS = "checkpoints"
"""In a run's folder: the checkpoints of a training that has not ended. Also the first part of their keys in a store."""


@dataclass(frozen=True)
class Workspace:
    """run: its id; folder: `<output>/<run>`, the local working folder; everything lasting is in the store."""

    run: str
    store: Store
    folder: Path
    config: Config
    prepared: Manifest

    def finished(self, step: str) -> Manifest | None:
        """The manifest of `step` if it was published for this very configuration."""
        try:
            manifest = self.store.manifest(f"{self.run}/{step}")
        except ArtifactNotFound:
            return None
        return manifest if manifest.config_hash == self.config.hash else None

    def artifact(self, step: str) -> Path:
        """The verified local copy of a step's artifact, read-only: its files are shared with other copies (see
        `latentac.store.pool`). Raises ArtifactNotFound where the step has not run."""
        folder = self.folder / step
        self.store.fetch(f"{self.run}/{step}", folder, cache=cache_beside(self.folder))
        return folder

    def decision(self) -> dict[str, Any] | None:
        """gate.json as it is published now, None where the gate has not decided. Not kept: it can be replaced."""
        if self.finished("gate") is None:
            return None
        with tempfile.TemporaryDirectory() as scratch:
            self.store.fetch(f"{self.run}/gate", Path(scratch) / "gate")
            return dict(read(Path(scratch) / "gate" / "gate.json", f"{self.run}/gate/gate.json"))

    @functools.cached_property
    def device(self) -> "torch.device":
        from latentac.sampling.devices import pick_device

        return pick_device(self.config.backbone.device)

    @functools.cached_property
    def prompts(self) -> "PromptSet":
        from latentac.worlds.prompts import load_prompts

        return load_prompts(str(self.artifact("prepare") / "prompts.json"))

    @functools.cached_property
    def presentable(self) -> "tuple[Prompt, ...]":
        """The held-out prompts that the served model takes; `prepare` has seen to it that there are some."""
        from latentac.worlds.prompts import within

        lengths = self.artifact("prepare") / "lengths.json"
        cut = read(lengths)["truncated"]["held_out"] if lengths.exists() else []
        return within(self.prompts.held_out, self.config.serving, cut)

    def rewards(self) -> "list[ConfiguredReward]":
        from latentac.rewards.configured import load_rewards

        found = load_rewards(self.config.rewards)
        before = read(self.artifact("prepare") / EXTENSIONS).get("code", {})
        for address in changed_sources(self.config, before):
            _log.warning(
                "%s: its code has changed since the run was prepared, so this run has results of both. To separate "
                "them, start a new run. `--package` keeps the code with the run.",
                address,
            )
        return found

    def base_policy(self) -> "Policy":
        """The untrained policy."""
        return self._policy(self.artifact("prepare") / "backbone")

    def trained_policy(self) -> "Policy":
        return self._policy(self.artifact("train") / "policy")

    def critic(self, step: str) -> "Critic":
        """The critic that `step` (`pretrain-value` or `train`) left."""
        from latentac.critic import Critic
        from latentac.training.checkpoint import loading

        folder, backbone = self.artifact(step) / "critic", self.base_policy().backbone
        with loading(str(folder)):
            return Critic.load(folder, backbone, own=True)

    def _policy(self, folder: Path) -> "Policy":
        from latentac.backbones import load_backbone
        from latentac.sampling.policy import configured_policy

        return configured_policy(self.config, load_backbone(self.config.backbone, folder, self.device))


def open_run(run: str, store: str, output: str) -> Workspace:
    """The workspace of a prepared run. Raises ConfigError where `prepare` has not published."""
    opened = open_store(store or default_store(output))
    folder = working_folder(run, output)
    [manifest] = prepared(opened, [run])
    settings = parse(opened.read(manifest.key, "config.json"), f"{manifest.key}/config.json")
    config = resolve(settings)  # not the backbone: some steps need none
    if any(file.path.startswith(f"{PACKAGE}/") for file in manifest.files):
        opened.fetch_files(
            manifest.key, folder / "code", lambda path: path.startswith(f"{PACKAGE}/"), cache=cache_beside(folder)
        )
        make_unpacked_importable(folder / "code" / PACKAGE)
    return Workspace(run, opened, folder, config, manifest)


def cache_beside(folder: Path) -> Path:
    """Where the local copies of the run in `folder` share equal files: with the other runs of its output, or among
    themselves in a container, which has the run's folder alone."""
    return folder.parent if os.access(folder.parent, os.W_OK) else folder / SHARED


def default_store(output: str) -> str:
    """Where artifacts go when no --store is named."""
    return f"file://{Path(output).absolute()}/store"


def existing(path: Path) -> Path:
    """`path`, or the nearest above it that is there."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def free_bytes(output: Path) -> int:
    """Of the disk that `output` is or would be on."""
    return shutil.disk_usage(existing(output)).free


def person() -> str | None:
    """Who runs this process, for what only a person decides; None where that has no name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None

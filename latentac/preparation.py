"""What `prepare` checks and fetches, so that a run that cannot end well never begins."""

import os
import platform
import socket
from collections.abc import Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from latentac import sizing
from latentac.algorithms import ALGORITHMS
from latentac.backbones import BACKBONES, layout_of
from latentac.backbones.layout import copy
from latentac.backbones.source import locate
from latentac.config import Config, suggestion
from latentac.critic import BODIES
from latentac.errors import ConfigError, LatentacError, Problem, ResourceError, RewardError
from latentac.prompts import PromptSet
from latentac.rewards import REWARDS, load_reward
from latentac.store import commit

_PACKAGES = ("torch", "diffusers", "transformers", "kfp", "torchx-nightly", "kserve", "minio")


def check_names(config: Config) -> None:
    """Every name must be a row of its table or `module:Class`. Raises ConfigError with all that are not."""
    named: list[tuple[str, str, Sequence[str]]] = [
        ("backbone.name", config.backbone.name, list(BACKBONES)),
        ("algorithm.name", config.algorithm.name, list(ALGORITHMS)),
        ("critic.body", config.critic.body, list(BODIES)),
        *((f"rewards.{i}.name", reward.name, list(REWARDS)) for i, reward in enumerate(config.rewards)),
    ]
    problems = [
        Problem(path, name, "does not exist", f"{suggestion(name, known)} Your own: module:Class.")
        for path, name, known in named
        if name not in known and ":" not in name
    ]
    if problems:
        raise ConfigError(problems)


def check_machine(config: Config, output: Path) -> None:
    """Device and port; room for the run is checked when its backbone is known. Raises ResourceError."""
    output.mkdir(parents=True, exist_ok=True)
    if config.backbone.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ResourceError("backbone.device = 'cuda'", "no CUDA device is usable here", "Use auto or cpu")
    if config.serving.port:
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", config.serving.port))
            except OSError as error:
                raise ResourceError(
                    f"serving.port = {config.serving.port}", f"is taken ({error.strerror})", "Use 0 for any free port"
                ) from error


def check_rewards(config: Config) -> None:
    """Ask each reward about its own known pictures: one that answers 0 to everything is found now, not after training.

    Raises RewardError by name.
    """
    for settings in config.rewards:
        try:
            reward = load_reward(settings.name)
            images, prompts, expected = reward.known()
            found = reward(images, prompts)
        except LatentacError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {settings.name}", f"failed: {error!r}", "Correct it or its installation"
            ) from error
        if not np.allclose(found, expected, rtol=0.05, atol=1e-3):
            raise RewardError(
                f"reward {settings.name}",
                f"gives {list(map(float, found))} to its known pictures instead of {list(map(float, expected))}",
                "Its installation is not sound: other versions of its packages, or damaged weights",
            )


def fetch_backbone(config: Config, folder: Path, output: Path, store: str, num_prompts: int) -> dict[str, Any]:
    """Copy what is used of the pipeline that `backbone.source` names to `folder`, if this machine has room for the run.

    Returns {source, revision, commit, requires}: the commit that a hub id was resolved to, and what the run needs.
    Raises ConfigError with all that is wrong with the pipeline, ResourceError with the sum of what is needed.
    """
    settings = config.backbone
    layout = layout_of(settings.name)
    found, commit = locate(settings.source, layout, settings.revision)
    needed = sizing.requirements(config, found, num_prompts)
    sizing.check_room(needed, output, store)
    copy(found, folder, layout)
    return {
        "source": settings.source,
        "revision": settings.revision,
        "commit": commit,
        "requires": needed.to_dict(),
    }


def check_prompts(config: Config, prompts: PromptSet) -> None:
    """Every reward must be able to score every kind of prompt; the first of each category is tried."""
    first = list({prompt.category: prompt.text for prompt in reversed(prompts.train + prompts.held_out)}.values())
    for settings in config.rewards:
        reward = load_reward(settings.name)
        picture, _, _ = reward.known()
        reward(np.repeat(picture[:1], len(first), 0), first)


def environment() -> dict[str, Any]:
    """{commit, machine, versions}: where the run's numbers come from."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "commit": commit(),
        "machine": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "gpu": _gpu(),
            "platform": platform.platform(),
            "python": platform.python_version(),
        },
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    """None where this image does not hold the package: the steps have images of their own."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None

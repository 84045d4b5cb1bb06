"""What `prepare` checks and fetches, so that a run that cannot end well never begins."""

import logging
import os
import platform
import socket
from collections.abc import Sequence
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentac.backbones import layout_of
from latentac.backbones.layout import copy
from latentac.backbones.source import locate
from latentac.config.schema import Config
from latentac.rewards.configured import ConfiguredReward
from latentac.runs.preparation import sizing
from latentac.store import commit
from latentac.system.errors import ConfigError, Problem, ResourceError, RewardError
from latentac.system.progress import progress
from latentac.worlds.prompts import Prompt, PromptSet, within

if TYPE_CHECKING:
    from latentac.backbones import Denoiser

_log = logging.getLogger(__name__)
_MOST_NAMED = 20  # prompts that are named; a longer list helps nobody
_COUNTED = 1000  # prompts whose tokens are counted together
_PACKAGES = ("torch", "diffusers", "transformers", "kfp", "torchx-nightly", "kserve", "minio")


def check_machine(device: str, port: int) -> None:
    """Device and port; room for the run is checked when its backbone is known. Raises ResourceError."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ResourceError("backbone.device = 'cuda'", "no CUDA device is usable here", "Use auto or cpu")
    if port:
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                problem = f"is taken ({error.strerror})"
                raise ResourceError(f"serving.port = {port}", problem, "Use 0 for any free port") from error


def fetch_rewards(rewards: Sequence[ConfiguredReward]) -> None:
    """Have here whatever they need from elsewhere. Raises ConfigError with all that is wrong, RewardError."""
    problems: list[Problem] = []
    for reward in rewards:
        try:
            reward.fetch()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def check_known(rewards: Sequence[ConfiguredReward]) -> None:
    """Call each reward on the images that it knows: one that answers 0 to everything is found out now, not after
    training. Raises RewardError by name."""
    for reward in rewards:
        known = reward.known()
        if known is None:
            continue
        images, texts, answers = known
        found = reward(images, [Prompt(text, "") for text in texts])
        if found.shape != answers.shape or not np.allclose(found, answers, rtol=0.05, atol=1e-3):
            raise RewardError(
                f"reward {reward.name}",
                f"gives {found.tolist()} for its known images instead of {answers.tolist()}",
                "Check its installation: the versions of its packages, and its weights",
            )


def check_scoring(
    rewards: Sequence[ConfiguredReward], prompts: PromptSet, image: np.ndarray, block_images: int
) -> None:
    """Call each reward on an image as the run will make them, uint8 [H, W, 3], for the first prompt of each category,
    as many together as the run will have.

    Raises RewardError by name.
    """
    first = list({prompt.category: prompt for prompt in reversed(prompts.train + prompts.held_out)}.values())
    for start in range(0, len(first), block_images):
        part = first[start : start + block_images]
        for reward in rewards:
            reward(np.repeat(image[None], len(part), 0), part)


def fetch_backbone(config: Config, folder: Path, output: Path, store: str, num_prompts: int) -> dict[str, Any]:
    """Copy what is used of the pipeline that `backbone.source` names to `folder`, if this machine has room for the run.

    Returns {source, revision, commit, requires}: the commit that a hub id was resolved to, and what the run needs.
    Raises ConfigError with all that is wrong with the pipeline, ResourceError with the sum of what is needed.
    """
    settings = config.backbone
    layout = layout_of(settings)
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


def check_lengths(config: Config, prompts: PromptSet, backbone: "Denoiser") -> dict[str, Any]:
    """Count every prompt's tokens. Returns lengths.json: {max_tokens, longest, truncated: {split: [index]}}.

    Raises ConfigError with the first of those that the text encoder would cut, or warns, as `on_truncation` says; and
    where the endpoint would refuse every held-out prompt, one of which is to prove that it serves.
    """
    most, splits = backbone.max_tokens, {"train": prompts.train, "held_out": prompts.held_out}
    counts: dict[str, list[int]] = {split: [] for split in splits}
    with progress(sum(map(len, splits.values())), "tokens", "prompts") as bar:
        for split, members in splits.items():
            for start in range(0, len(members), _COUNTED):
                part = [prompt.text for prompt in members[start : start + _COUNTED]]
                counts[split] += backbone.count_tokens(part)
                bar.update(len(part))
    cut = {split: [index for index, count in enumerate(found) if count > most] for split, found in counts.items()}
    problems = []
    for split, index in [(split, index) for split, found in cut.items() for index in found][:_MOST_NAMED]:
        text = splits[split][index].text
        fault = f"{prompts.places.get(text, f'{split}[{index}]')}: {text[:80]}{'...' if len(text) > 80 else ''}"
        problem = f"has {counts[split][index]} tokens, and the text encoder reads {most}"
        remedy = "Shorten it, or set prompts.on_truncation=warn to use only its first tokens."
        problems.append(Problem("prompts", fault, problem, remedy))
    total = sum(map(len, cut.values()))
    if total > len(problems):
        remedy = "Shorten these as well."
        problems.append(Problem("prompts", config.prompts.source, f"{total - _MOST_NAMED} more are too long", remedy))
    if problems and config.prompts.on_truncation == "refuse":
        raise ConfigError(problems)
    if not within(prompts.held_out, config.serving, cut["held_out"]):
        longest = f"is the limit, but every held-out prompt is longer, or has more than {most} tokens"
        remedy = (
            "The check of the endpoint needs one such prompt: raise the limit, or set serving.allow_truncation=true."
        )
        characters = config.serving.max_prompt_characters
        raise ConfigError([Problem("serving.max_prompt_characters", characters, longest, remedy)])
    for each in problems:
        _log.warning("%s = %r: %s; the rest is cut off", each.path, each.value, each.problem)
    return {"max_tokens": most, "longest": max(map(max, counts.values())), "truncated": cut}


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

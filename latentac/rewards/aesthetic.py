"""How beautiful people find an image: LAION's aesthetic predictor, a small head on the vectors of CLIP ViT-L/14."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from latentac.rewards.clip import ClipReward, ClipSettings
from latentac.rewards.conversion import command
from latentac.store import sources
from latentac.system.errors import ConfigError, Problem
from latentac.system.modelfiles import Damaged

if TYPE_CHECKING:
    from torch import Tensor

    from latentac.rewards.clip_folder import Clip
    from latentac.rewards.folders import Checkpoint

_LAYERS = {"layers.0": 1024, "layers.2": 128, "layers.4": 64, "layers.6": 16, "layers.7": 1}
"""Name -> outputs. Between them lie layers of dropout, which scoring leaves out, and no activations."""


class Aesthetic(ClipReward):
    """The mean rating that people would give the image, from its unit vector by CLIP ViT-L/14 and a head of five linear
    layers (768-1024-128-64-16-1, without activations). The prompt does not matter."""

    unit = "LAION aesthetic score: a mean rating from 1 to 10 by people"

    class Settings(ClipSettings):
        source: str = "openai/clip-vit-large-patch14"
        head: str
        """The head's file, as safetensors, or its address of `latentac mirror`. It is published as the pickle
        `sac+logos+ava1-l14-linearMSE.pth`, which `latentac convert-weights` converts."""

    def __init__(self, settings: "Aesthetic.Settings") -> None:
        super().__init__(settings)
        self._head = settings.head

    @property
    def elsewhere(self) -> bool:
        return super().elsewhere or (sources.is_address(self._head) and sources.cached(self._head) is None)

    def checkpoints(self) -> list["Checkpoint"]:
        from latentac.rewards.folders import Checkpoint

        return [*super().checkpoints(), Checkpoint("head", "", self._head_file())]

    def examine(self, folder: Path) -> None:
        from latentac.backbones.weights import header
        from latentac.rewards.clip_folder import width

        path, file = self._head, self._head_file()
        if file.suffix != ".safetensors":
            remedy = f"Convert what you trust: {command('aesthetic', path)}"
            raise _wrong(path, "is no safetensors file, and pickles can run code and are never loaded", remedy)
        try:
            found = header(file)
        except (Damaged, OSError) as error:
            reason = str(error) if isinstance(error, Damaged) else f"cannot be read ({error.strerror})"
            raise _wrong(path, reason, "Name the converted head of the aesthetic predictor") from error
        for name, shape in shapes(found.get("layers.0.weight", (0, 0))[-1]).items():
            if found.get(name) != shape:
                problem = (
                    f"{name} is {list(found.get(name, ())) or 'missing'}, and the published head has {list(shape)}"
                )
                raise _wrong(path, problem, "Name the converted head of the aesthetic predictor")
        taken, given = found["layers.0.weight"][1], width(folder)
        if taken != given:
            problem = f"takes vectors of {taken} numbers, and the CLIP of `source` gives {given}"
            raise _wrong(path, problem, "Use the CLIP that the head was trained on: openai/clip-vit-large-patch14")

    def score(self, clip: "Clip", images: np.ndarray, prompts: Sequence[str]) -> "Tensor":
        from torch.nn import functional

        found = clip.image_vectors(clip.prepare(images))
        for weight, bias in self._layers:
            found = functional.linear(found, weight.to(found.device), bias.to(found.device))
        return found[:, 0]

    def _head_file(self) -> Path:
        return Path(os.path.expanduser(sources.or_local(self._head, "head")))

    @cached_property
    def _layers(self) -> list[tuple["Tensor", "Tensor"]]:
        """Weight and bias of each layer, float32, on the CPU."""
        from safetensors.torch import load_file

        held = load_file(self._head_file())
        return [(held[f"{name}.weight"].float(), held[f"{name}.bias"].float()) for name in _LAYERS]


def shapes(inputs: int) -> dict[str, tuple[int, ...]]:
    """Of each tensor, by name, of a head for vectors of so many numbers."""
    found: dict[str, tuple[int, ...]] = {}
    for name, outputs in _LAYERS.items():
        found |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
        inputs = outputs
    return found


def _wrong(head: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("head", head, problem, remedy)])

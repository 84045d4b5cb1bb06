"""Sizes of a pipeline: weights from the headers of its files, and what it computes from its configurations."""

import math
from dataclasses import dataclass
from pathlib import Path

from latentac.backbones import layout_of
from latentac.backbones.inspection import weights_of
from latentac.backbones.layout import Layout, Sizes, listing, used
from latentac.backbones.precision import compute_dtype
from latentac.backbones.weights import header, shapes
from latentac.config.schema import Backbone, Config
from latentac.system.modelfiles import read_json


@dataclass(frozen=True)
class Model:
    """files: bytes of the files that are used; network, frozen: weights of the denoiser and of all other parts;
    adapters: weights of LoRA of the configured rank; sizes: of what it computes for one image."""

    files: int
    network: int
    frozen: int
    adapters: int
    sizes: Sizes


def read_model(folder: Path, config: Config) -> Model:
    """The sizes of the pipeline in `folder`. Nothing is loaded."""
    layout = layout_of(config.backbone)
    if layout is None:
        files = [folder / name for name in listing(folder) if name.endswith(".safetensors")]
        count = sum(_count(header(file)) for file in files)
        return Model(sum(file.stat().st_size for file in files), count, 0, count, Sizes())
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in layout.parts:
        weights = weights_of(folder, part)
        if weights is not None:
            found[part.name] = shapes(folder / part.name, weights)
    own = found[layout.network]
    suffixes = tuple(f".{name}.weight" for name in layout.adapted)
    adapted = [shape for name, shape in own.items() if name.endswith(suffixes) and len(shape) == 2]
    return Model(
        files=sum((folder / name).stat().st_size for name in used(folder, layout)),
        network=_count(own),
        frozen=sum(_count(tensors) for name, tensors in found.items() if name != layout.network),
        adapters=config.policy.lora_rank * sum(sum(shape) for shape in adapted),
        sizes=_sizes(folder, layout, config.backbone),
    )


def bytes_per_weight(settings: Backbone, device: str) -> int:
    """Of a weight that is not trained, and of an activation. device: cpu or cuda."""
    import torch

    precision = settings.own.get("precision", "auto")
    if precision == "auto" and device == "cuda" and not torch.cuda.is_available():
        return 2  # planned for a GPU of another machine
    if precision == "float16":
        return 2
    return compute_dtype(precision, torch.device(device)).itemsize


def _sizes(folder: Path, layout: Layout, backbone: Backbone) -> Sizes:
    settings = {part.name: read_json(folder / part.name / "config.json") for part in layout.parts if part.stem}
    image = backbone.own.get("image_size") or None
    if image is None:
        return layout.sizes(settings, None)
    factor = 2 ** (len(settings["vae"].get("block_out_channels", [64])) - 1)
    return layout.sizes(settings, (image[0] // factor, image[-1] // factor))


def _count(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())

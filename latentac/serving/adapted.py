"""The denoisers of an exported folder: of a merged export two networks, of an adapter one base that both share.

An adapter's folder says which base it belongs to, by the sha256 of every file. It names no place to look for it: the
base is what lies in the folder's `base/`, or what the operator names, and it is served only if every file is right.
"""

from pathlib import Path
from typing import Any

import torch

from latentac.backbones import Denoiser, layout_of, load_backbone
from latentac.backbones.layout import Layout, Part, used
from latentac.backbones.loading import load
from latentac.backbones.pipeline import PipelineBackbone
from latentac.serving import exported
from latentac.store.pool import hash_of
from latentac.system.errors import ConfigError, Problem, ServingError
from latentac.system.modelfiles import faults


def load_denoisers(
    model: exported.Exported, folder: Path, device: torch.device, base: Path | None = None
) -> dict[str, Denoiser]:
    """`trained`, and `base` where it is offered or needed. Raises ConfigError, ServingError.

    base: a folder with the base of an adapter, by default `base/` in `folder`.
    """
    if model.base is None:
        if base is not None:
            remedy = "Leave the base out"
            raise ServingError(str(folder), "is a whole pipeline and not an adapter, so it takes no base", remedy)
        backbone = load_backbone(model.backbone, folder, device)
        if "base" not in model.policies:
            return {"trained": backbone}
        return {"trained": backbone, "base": _with_weights(backbone, folder / exported.BASE, folder)}
    layout = layout_of(model.backbone)
    if layout is None:
        raise ServingError(str(folder), "is an adapter of a backbone without a layout", "Export it merged")
    place = base or folder / exported.BASE
    check_base(model.base, place, layout)
    untouched = load_backbone(model.backbone, place, device)
    if not isinstance(untouched, PipelineBackbone):
        raise ServingError(str(folder), f"{model.backbone.use} takes no adapter", "Export it merged")
    return {"trained": untouched.adapted(folder / exported.ADAPTER), "base": untouched}


def check_base(base: exported.Base, folder: Path, layout: Layout) -> None:
    """Raises ServingError unless `folder` has exactly the files of `base` that are used, each with its sha256."""
    remedy = f"Fetch the model again with latentac fetch-model, or name a folder with its base ({base.name}): --base"
    if not folder.is_dir():
        raise ServingError(str(folder), f"is not there, and the adapter needs its base {base.name}", remedy)
    for name, problem, cure in faults(folder, base.files):
        raise ServingError(str(folder / name), problem, cure)
    found = set(used(folder, layout))
    for name in sorted(base.files.keys() | found):
        if name not in found:
            raise ServingError(str(folder / name), f"is missing: it is a file of the base {base.name}", remedy)
        if name not in base.files:
            raise ServingError(str(folder / name), f"is not a file of the base {base.name}", remedy)
        digest = hash_of(folder / name)
        if digest != base.files[name]:
            problem = f"has sha256 {digest}, and the base {base.name} has {base.files[name]}"
            raise ServingError(str(folder / name), problem, remedy)


def _with_weights(backbone: Denoiser, base: Path, folder: Path) -> Denoiser:
    """A second denoiser that has the weights in `base`, and shares everything else with `backbone`."""
    other, name = backbone.clone(), exported.denoiser_folder(folder)
    kind: Any = type(other.module)
    part = Part(name, "network", (kind.__name__,))
    problems = [
        Problem("backbone.source", str(folder), f"{name} {report}", remedy)
        for name, report, remedy in faults(folder, [f"{exported.BASE}/{name}/config.json"])
    ]
    if problems:
        raise ConfigError(problems)
    other.module.load_state_dict(load(kind, base, part, backbone.device).state_dict())
    return other

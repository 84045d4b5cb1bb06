"""The denoisers of an exported folder: of a merged export two networks, of an adapter one base that both share.

An adapter's folder says which base it belongs to, by the sha256 of every file. It names no place to look for it: the
base is what is in the folder's `base/`, or what the operator names, and it is served only if every file is right.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from latentac.backbones import Denoiser, layout_of, load_backbone
from latentac.backbones.layout import INDEX, Layout, Part, copy, unreadable
from latentac.backbones.loading import load
from latentac.backbones.pipeline import PipelineBackbone
from latentac.serving import exported
from latentac.store.pool import hash_of
from latentac.system.errors import ConfigError, Problem, ServingError
from latentac.system.modelfiles import Damaged, faults


def load_denoisers(
    model: exported.Exported, folder: Path, device: torch.device, base: Path | None = None
) -> dict[str, Denoiser]:
    """`trained`, and `base` where it is offered. Raises ConfigError, ServingError.

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
    if base is None:  # a link would lead to any folder of this machine
        for name, problem, remedy in faults(folder, [f"{exported.BASE}/{INDEX}"]):
            raise ServingError(str(folder / name), problem, remedy)
    place = base or folder / exported.BASE
    check_base(model.base, place, layout)
    untouched = load_backbone(model.backbone, place, device)
    if not isinstance(untouched, PipelineBackbone):
        raise ServingError(str(folder), f"{model.backbone.use} takes no adapter", "Export it merged")
    if "base" in model.policies:
        return {"trained": untouched.adapted(folder / exported.ADAPTER), "base": untouched}
    untouched.merge(folder / exported.ADAPTER)  # faster, and nobody asks for the base
    return {"trained": untouched}


def check_base(base: exported.Base, folder: Path, layout: Layout) -> None:
    """Raises ServingError unless `folder` is the base: what `prepare` would copy of it has the names and the sha256
    that `base` says."""
    called = f"{base.name} at commit {base.commit}" if base.commit else base.name
    remedy = f"Fetch the model again with latentac fetch-model, or name a folder that has its base, {called}: --base"
    if not (folder / INDEX).is_file():
        problem = "is not there" if not folder.is_dir() else f"has no {INDEX}"
        raise ServingError(str(folder), f"{problem}, and the adapter needs its base here", remedy)
    for name, problem, cure in unreadable(folder, layout):
        raise ServingError(str(folder / name), problem, cure)
    try:
        found = digests(folder, layout)
    except Damaged as error:
        raise ServingError(str(folder), str(error), remedy) from None
    for name in sorted(base.files.keys() | found.keys()):
        if name not in found:
            raise ServingError(str(folder / name), f"is missing: it is a file of the base {called}", remedy)
        if name not in base.files:
            raise ServingError(str(folder / name), f"is not a file of the base {called}", remedy)
        if found[name] != base.files[name]:
            problem = f"has sha256 {found[name]}, and that of the base {called} is {base.files[name]}"
            raise ServingError(str(folder / name), problem, remedy)


def digests(folder: Path, layout: Layout) -> dict[str, str]:
    """Path -> sha256 of each file that `prepare` would copy of a pipeline: weights under their plain names, and
    descriptions without what is not used. Raises Damaged, OSError."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="latentac-base-") as temporary:
        view = Path(temporary)

        def note(file: Path, to: Path) -> None:
            found[to.relative_to(view).as_posix()] = hash_of(file)

        copy(folder, view, layout, note)
        written = (path for path in view.rglob("*") if path.is_file())
        return found | {path.relative_to(view).as_posix(): hash_of(path) for path in written}


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

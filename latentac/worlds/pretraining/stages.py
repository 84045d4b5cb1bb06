"""The two stages that make a pipeline: the autoencoder, then denoiser and text encoders together on its latents."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from tqdm import tqdm

from latentac.worlds.pretraining.autoencoder import (
    AutoencoderTraining,
    build_autoencoder,
    decode,
    encode,
    scale_and_shift,
    to_images,
    train_autoencoder,
)
from latentac.worlds.pretraining.provenance import Provenance
from latentac.worlds.pretraining.training import CaptionedDenoiser, DenoiserTraining, train_denoiser

SAMPLING_STEPS = 10
_BATCH = 256  # images sampled together


class World(Protocol):
    """What the stages ask of a world. A specification has a `caption`."""

    @property
    def image_size(self) -> int:
        """Longer side of the images, in pixels."""
        ...

    def specifications(self, count: int, generator: np.random.Generator) -> Sequence[Any]:
        """What the training images show."""
        ...

    def sample_images(self, specs: Sequence[Any], generator: np.random.Generator) -> np.ndarray:
        """One rendered image per specification: uint8 [B, H, W, 3]."""
        ...

    def captions(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Captions of "train" or "held_out", the categories in turn."""
        ...

    def score(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """`mean`, what is to be reached, and whatever else describes how well the images show their captions."""
        ...


@dataclass(frozen=True)
class Settings:
    """What decides the weights. `target`: the checked score at which the denoiser's training stops, every `check_every`
    steps and at the latest after `most_steps`. `other`: the pipeline's folder whose autoencoder is taken; `begin_with`:
    the one whose autoencoder is where the training of this one begins; `continued`: the one whose denoiser and text
    encoders are where the training of these begins.
    """

    seed: int
    images: int
    autoencoder: AutoencoderTraining
    denoiser: DenoiserTraining
    target: float
    check_every: int
    most_steps: int
    check_images: int = 256
    final_images: int = 1024
    pipeline: str = "unet"
    other: Path | None = None
    begin_with: Path | None = None
    continued: Path | None = None


def training_images(world: World, settings: Settings) -> tuple[Sequence[Any], np.ndarray]:
    """Specifications and images uint8 [N, H, W, 3] of the training set."""
    generator = np.random.default_rng(settings.seed)
    specs = world.specifications(settings.images, generator)
    return specs, np.stack([world.sample_images([spec], generator)[0] for spec in tqdm(specs, desc="images", unit="")])


def autoencoder_stage(
    output: Path, world: World, settings: Settings, images: np.ndarray, provenance: Provenance
) -> AutoencoderKL:
    """The trained autoencoder: from `output/vae` if the same settings made it, otherwise trained and saved there."""
    wanted: dict[str, Any] = {"seed": settings.seed, "images": settings.images, **asdict(settings.autoencoder)}
    if settings.begin_with is not None:
        wanted["begun_with"] = {"pipeline": settings.begin_with.name, **_weights(settings.begin_with)[1]}
    if provenance.value("autoencoder", "settings") == wanted and (output / "vae" / "config.json").exists():
        return _loaded(output).eval()
    torch.manual_seed(settings.seed)
    autoencoder, began = _begun_autoencoder(world, settings), time.perf_counter()
    curve: list[float] = []
    with tqdm(total=settings.autoencoder.steps, desc="autoencoder", unit="step") as bar:

        def report(step: int, loss: float) -> None:
            curve.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        train_autoencoder(autoencoder, images, settings.autoencoder, report)
    autoencoder.save_pretrained(output / "vae")
    fresh = np.random.default_rng(settings.seed + 2)
    specs = world.specifications(settings.check_images * 2, fresh)
    with torch.no_grad():
        latents = encode(autoencoder, world.sample_images(specs, fresh))[0]
        reconstructed = np.concatenate([to_images(autoencoder.decode(part).sample) for part in latents.split(_BATCH)])
    provenance.record(
        "autoencoder",
        {
            "settings": wanted,
            "parameters": sum(p.numel() for p in autoencoder.parameters()),
            "scaling_factor": autoencoder.config.scaling_factor,
            "seconds": time.perf_counter() - began,
            "loss_curve": _thinned(curve),
            "reconstruction_score": world.score(reconstructed, [spec.caption for spec in specs]),
        },
    )
    return autoencoder


def taken_autoencoder(other: Path, provenance: Provenance) -> AutoencoderKL:
    """The finished autoencoder of the pipeline in `other`, with what was recorded about its training."""
    recorded, weights = _weights(other)
    provenance.record("autoencoder", {**recorded, "taken_from": {"pipeline": other.name, **weights}})
    return _loaded(other).eval()


def denoiser_stage(
    autoencoder: AutoencoderKL,
    denoiser: CaptionedDenoiser,
    world: World,
    settings: Settings,
    captioned: tuple[Sequence[Any], np.ndarray],
    provenance: Provenance,
) -> None:
    """Trains `denoiser` in place on the latents of `captioned` until its checked score reaches the target. Images of
    the last check lie beside the pipeline's folder, as `<folder>-check.png`."""
    specs, images = captioned
    began = time.perf_counter()
    scale, shift = scale_and_shift(autoencoder)
    mean, deviation = encode(autoencoder, images)
    token_ids = denoiser.token_ids([spec.caption for spec in specs])
    sheet = provenance.path.parent.with_name(f"{provenance.path.parent.name}-check.png")
    curve: list[float] = []
    checks: list[dict[str, object]] = []
    begun = {} if settings.continued is None else {"begun_with": _load_parts(denoiser, settings.continued)}
    with tqdm(total=settings.most_steps, desc="denoiser", unit="step") as bar:

        def after_step(step: int, loss: float, averaged: nn.Module) -> bool:
            curve.append(loss)
            bar.update()
            if step % settings.check_every:
                return False
            candidate = denoiser.with_modules(averaged.eval())
            captions = world.captions("train", settings.check_images, settings.seed + 4)
            images = sample(autoencoder, candidate, captions, settings.seed + 4)
            sheet.parent.mkdir(parents=True, exist_ok=True)
            _contact_sheet(images[:64]).save(sheet)
            result = world.score(images, captions)
            checks.append({"step": step, **result})
            bar.set_postfix(loss=f"{np.mean(curve[-100:]):.4f}", score=f"{result['mean']:.3f}")
            return bool(result["mean"] >= settings.target or step >= settings.most_steps)

        train_denoiser(denoiser, ((mean - shift) * scale, deviation * scale), token_ids, settings.denoiser, after_step)
    denoiser.modules().eval()
    rule = (
        f"the first check, every {settings.check_every} steps, whose score on {settings.check_images} images of "
        f"training prompts, sampled by {denoiser.sampler}, is at least {settings.target}; "
        f"at most {settings.most_steps} steps"
    )
    record = {
        "settings": asdict(settings.denoiser),
        **begun,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in denoiser.parts().items()},
        "scaling_factor": scale,
        "shift_factor": shift,
        "steps": len(curve),
        "stopping_rule": rule,
        "seconds": time.perf_counter() - began,
        "loss_curve": _thinned(curve),
        "checks": checks,
    }
    provenance.record("denoiser", record)


def sample(autoencoder: AutoencoderKL, denoiser: CaptionedDenoiser, captions: Sequence[str], seed: int) -> np.ndarray:
    """uint8 [N, H, W, 3]: an image per caption, from the denoiser's own sampler in 10 steps without guidance."""
    generator = torch.Generator().manual_seed(seed)
    parts = [captions[start : start + _BATCH] for start in range(0, len(captions), _BATCH)]
    return decode(autoencoder, torch.cat([denoiser.sample(part, SAMPLING_STEPS, generator) for part in parts]))


def finish(
    output: Path,
    autoencoder: AutoencoderKL,
    denoiser: CaptionedDenoiser,
    world: World,
    settings: Settings,
    provenance: Provenance,
) -> None:
    """Write the pipeline's folder, all weights float32 safetensors, with the scores of both splits."""
    denoiser.save(output, autoencoder)
    for weights in output.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written for the owner only, and would be installed so
    for split in ("held_out", "train"):
        captions = world.captions(split, settings.final_images, settings.seed + 3)
        images = sample(autoencoder, denoiser, captions, settings.seed + 3)
        provenance.record(f"score_{split}", world.score(images, captions))
    provenance.finish(output)


def _contact_sheet(images: np.ndarray, columns: int = 8) -> Image.Image:
    """`images` uint8 [N, H, W, 3], N a multiple of `columns` or less, row by row."""
    rows = [np.concatenate(images[start : start + columns], 1) for start in range(0, len(images), columns)]
    whole = [row for row in rows if row.shape == rows[0].shape]
    return Image.fromarray(np.concatenate(whole))


def _loaded(folder: Path) -> AutoencoderKL:
    """The autoencoder of a pipeline's folder. Its configuration forgets the folder, or it would be saved with it."""
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae")
    autoencoder.register_to_config(_name_or_path="")
    return autoencoder


def _begun_autoencoder(world: World, settings: Settings) -> AutoencoderKL:
    autoencoder = build_autoencoder(world.image_size)
    if settings.begin_with is not None:
        autoencoder.load_state_dict(_loaded(settings.begin_with).state_dict())
    return autoencoder


def _load_parts(denoiser: CaptionedDenoiser, folder: Path) -> dict[str, Any]:
    """Gives the denoiser's modules the weights of a finished pipeline. What that pipeline's provenance says of them."""
    for name, part in denoiser.parts().items():
        kind: Any = type(part)
        part.load_state_dict(kind.from_pretrained(folder / name).state_dict())
    recorded = json.loads((folder / "provenance.json").read_text())
    files = {path: file for path, file in recorded["files"].items() if path.endswith(".safetensors")}
    stage = {key: recorded["denoiser"][key] for key in ("settings", "steps", "stopping_rule", "seconds", "checks")}
    return {**{key: recorded[key] for key in ("command", "commit", "sources")}, "denoiser": stage, "files": files}


def _weights(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a finished pipeline's provenance says of its autoencoder, and of the file of its weights."""
    recorded = json.loads((folder / "provenance.json").read_text())
    return recorded["autoencoder"], recorded["files"]["vae/diffusion_pytorch_model.safetensors"]


def _thinned(curve: list[float], every: int = 25) -> list[list[float]]:
    """[step, mean loss of the `every` steps up to it] rows."""
    return [
        [start + len(part), round(float(np.mean(part)), 5)]
        for start in range(0, len(curve), every)
        if (part := curve[start : start + every])
    ]

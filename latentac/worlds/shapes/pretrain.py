"""Makes the weights in `weights`: python -m latentac.worlds.shapes.pretrain --pipeline unet --output FOLDER

First the autoencoder, then denoiser and text encoders together on its latents. The images are drawn for every caption
of the language, held-out ones included: the base knows all sentences about equally well, and what is held out is held
out from reinforcement learning. Training stops on purpose when the base is mediocre (see `--target`). A second run in
the same folder with the same settings keeps the finished autoencoder; `--autoencoder` takes that of another pipeline.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from latentac.worlds.shapes import denoiser as unet
from latentac.worlds.shapes import transformer as dit
from latentac.worlds.shapes.autoencoder import (
    AutoencoderTraining,
    build_autoencoder,
    centre_latents,
    decode,
    encode,
    scale_and_shift,
    to_images,
    train_autoencoder,
)
from latentac.worlds.shapes.captions import CATEGORIES, Specification, balanced_prompts, parse_caption, specifications
from latentac.worlds.shapes.provenance import Provenance
from latentac.worlds.shapes.scenes import sample_images
from latentac.worlds.shapes.training import CaptionedDenoiser, DenoiserTraining, train_denoiser
from latentac.worlds.shapes.verifier import verify

BUILDERS: dict[str, Callable[[Path], CaptionedDenoiser]] = {
    "unet": unet.build_denoiser,
    "dit": dit.build_flow_denoiser,
}
TRAININGS = {"unet": unet.TRAINING, "dit": dit.TRAINING}
SAMPLING_STEPS = 10
_BATCH = 256  # images sampled together


@dataclass(frozen=True)
class Settings:
    """What decides the weights. `target`: the checked score at which the denoiser's training stops, every `check_every`
    steps and at the latest after `most_steps`. `other`: the pipeline's folder whose autoencoder is taken.
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


def pretrain(output: Path, settings: Settings, command: str) -> None:
    """Trains both stages and writes the pipeline's folder, `provenance.json` included, to `output`."""
    provenance = Provenance.begin(output / "provenance.json", settings.seed, command)
    generator = np.random.default_rng(settings.seed)
    specs = training_specifications(settings.images, generator)
    images = np.stack([sample_images([spec], generator)[0] for spec in tqdm(specs, desc="images", unit="")])

    if settings.other is None:
        autoencoder = autoencoder_stage(output, settings, images, provenance)
    else:
        autoencoder = taken_autoencoder(settings.other, provenance)
    if settings.pipeline == "dit":
        centre_latents(autoencoder, images[:2048])
    torch.manual_seed(settings.seed + 1)
    denoiser = BUILDERS[settings.pipeline](output)
    denoiser_stage(autoencoder, denoiser, settings, (specs, images), provenance)

    save_pipeline(output, autoencoder, denoiser)
    for split in ("held_out", "train"):
        provenance.record(
            f"score_{split}", score(autoencoder, denoiser, split, settings.final_images, seed=settings.seed + 3)
        )
    provenance.finish(output)


def training_specifications(count: int, generator: np.random.Generator) -> list[Specification]:
    """The four categories in turn, each time any sentence of it."""
    by_category = [[spec for spec in specifications() if spec.category == category] for category in CATEGORIES]
    columns = [by_category[index % len(CATEGORIES)] for index in range(count)]
    return [choices[generator.integers(len(choices))] for choices in columns]


def autoencoder_stage(output: Path, settings: Settings, images: np.ndarray, provenance: Provenance) -> AutoencoderKL:
    """The trained autoencoder: from `output/vae` if the same settings made it, otherwise trained and saved there."""
    wanted = {"seed": settings.seed, "images": settings.images, **asdict(settings.autoencoder)}
    if provenance.value("autoencoder", "settings") == wanted and (output / "vae" / "config.json").exists():
        return AutoencoderKL.from_pretrained(output / "vae").eval()
    torch.manual_seed(settings.seed)
    autoencoder, began = build_autoencoder(), time.perf_counter()
    curve: list[float] = []
    with tqdm(total=settings.autoencoder.steps, desc="autoencoder", unit="step") as bar:

        def report(step: int, loss: float) -> None:
            curve.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        train_autoencoder(autoencoder, images, settings.autoencoder, report)
    autoencoder.save_pretrained(output / "vae")
    specs, held_images = _fresh_images(settings.check_images * 2, settings.seed + 2)
    with torch.no_grad():
        reconstructed = to_images(autoencoder.decode(encode(autoencoder, held_images)[0]).sample)
    provenance.record(
        "autoencoder",
        {
            "settings": wanted,
            "parameters": sum(p.numel() for p in autoencoder.parameters()),
            "scaling_factor": autoencoder.config.scaling_factor,
            "seconds": time.perf_counter() - began,
            "loss_curve": _thinned(curve),
            "reconstruction_score": by_category(specs, verify(reconstructed, specs)),
        },
    )
    return autoencoder


def taken_autoencoder(other: Path, provenance: Provenance) -> AutoencoderKL:
    """The finished autoencoder of the pipeline in `other`, with what was recorded about its training."""
    recorded = json.loads((other / "provenance.json").read_text())
    weights = recorded["files"]["vae/diffusion_pytorch_model.safetensors"]
    provenance.record("autoencoder", {**recorded["autoencoder"], "taken_from": {"pipeline": other.name, **weights}})
    return AutoencoderKL.from_pretrained(other / "vae").eval()


def denoiser_stage(
    autoencoder: AutoencoderKL,
    denoiser: CaptionedDenoiser,
    settings: Settings,
    captioned: tuple[list[Specification], np.ndarray],
    provenance: Provenance,
) -> None:
    """Trains `denoiser` in place on the latents of `captioned` until its checked score reaches the target."""
    specs, images = captioned
    began = time.perf_counter()
    scale, shift = scale_and_shift(autoencoder)
    mean, deviation = encode(autoencoder, images)
    token_ids = denoiser.token_ids([spec.caption for spec in specs])
    curve: list[float] = []
    checks: list[dict[str, object]] = []
    with tqdm(total=settings.most_steps, desc="denoiser", unit="step") as bar:

        def after_step(step: int, loss: float, averaged: nn.Module) -> bool:
            curve.append(loss)
            bar.update()
            if step % settings.check_every:
                return False
            candidate = denoiser.with_modules(averaged.eval())
            result = score(autoencoder, candidate, "train", settings.check_images, seed=settings.seed + 4)
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


def score(
    autoencoder: AutoencoderKL, denoiser: CaptionedDenoiser, split: str, count: int, seed: int
) -> dict[str, float]:
    """Share of images that the verifier accepts, for each category and their mean, on `count` balanced prompts of
    `split`: the denoiser's own sampler, 10 steps, no guidance.
    """
    texts = [prompt.text for prompt in balanced_prompts(split, count, seed)]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.cat(
        [denoiser.sample(texts[start : start + _BATCH], SAMPLING_STEPS, generator) for start in range(0, count, _BATCH)]
    )
    specs = [parse_caption(text) for text in texts]
    return by_category(specs, verify(decode(autoencoder, latents), specs))


def by_category(specs: list[Specification], accepted: np.ndarray) -> dict[str, float]:
    """The share accepted in each category, `mean` over all images, and `n`, the number of images."""
    categories = np.array([spec.category for spec in specs])
    shares = {category: float(accepted[categories == category].mean()) for category in CATEGORIES}
    return {"mean": float(accepted.mean()), "n": len(specs), **shares}


def save_pipeline(output: Path, autoencoder: AutoencoderKL, denoiser: CaptionedDenoiser) -> None:
    """The pipeline's folder, all weights float32 safetensors."""
    denoiser.save(output, autoencoder)
    for weights in output.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written for the owner only, and would be installed so


def _fresh_images(count: int, seed: int) -> tuple[list[Specification], np.ndarray]:
    generator = np.random.default_rng(seed)
    specs = training_specifications(count, generator)
    return specs, sample_images(specs, generator)


def _thinned(curve: list[float], every: int = 25) -> list[list[float]]:
    """[step, mean loss of the `every` steps up to it] rows."""
    return [
        [start + len(part), round(float(np.mean(part)), 5)]
        for start in range(0, len(curve), every)
        if (part := curve[start : start + every])
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentac.worlds.shapes.pretrain",
        description="Pretrain the tiny text-to-image pipeline of the embedded world.",
        epilog="example: python -m latentac.worlds.shapes.pretrain --output build/unet --threads 2; with "
        "--pipeline dit --autoencoder build/unet --output build/dit the second one",
    )
    add = parser.add_argument
    add("--pipeline", choices=sorted(BUILDERS), default="unet", help="the kind of denoiser (default %(default)s)")
    add("--autoencoder", type=Path, help="take the finished autoencoder of the pipeline in this folder")
    add("--output", type=Path, required=True, help="folder of the pipeline; a finished autoencoder there is kept")
    add("--seed", type=int, default=0, help="decides images, weights and noise (default %(default)s)")
    add("--images", type=int, default=16384, help="training images (default %(default)s)")
    add("--vae-steps", type=int, default=AutoencoderTraining.steps, help="autoencoder steps (default %(default)s)")
    add("--denoiser-steps", type=int, default=4000, help="denoiser steps at most (default %(default)s)")
    add("--check-every", type=int, default=100, help="denoiser steps between two checks (default %(default)s)")
    add("--target", type=float, default=0.43, help="checked score that ends the training (default %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    return parser


def main(arguments_given: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(arguments_given)
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        seed=arguments.seed,
        images=arguments.images,
        autoencoder=AutoencoderTraining(steps=arguments.vae_steps),
        denoiser=TRAININGS[arguments.pipeline],
        target=arguments.target,
        check_every=arguments.check_every,
        most_steps=arguments.denoiser_steps,
        pipeline=arguments.pipeline,
        other=arguments.autoencoder,
    )
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    options = {name: value for name, value in given.items() if name not in ("output", "threads")}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    pretrain(arguments.output, settings, f"python -m latentac.worlds.shapes.pretrain --output FOLDER {flags}")


if __name__ == "__main__":
    main()

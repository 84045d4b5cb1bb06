"""Makes the weights in `latentac/shapes/weights/unet`: python -m latentac.shapes.pretrain --output FOLDER

First the autoencoder, then UNet and text encoder together on its latents. The pictures are drawn for every caption of
the language, held-out ones included: the base knows all sentences about equally well, and what is held out is held out
from reinforcement learning. Training stops on purpose when the base is mediocre (see `--target`). A second run in the
same folder with the same settings keeps the finished autoencoder.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from tqdm import tqdm

from latentac.shapes.autoencoder import (
    AutoencoderTraining,
    build_autoencoder,
    decode,
    encode,
    to_images,
    train_autoencoder,
)
from latentac.shapes.captions import CATEGORIES, Specification, balanced_prompts, parse_caption, specifications
from latentac.shapes.denoiser import (
    Denoiser,
    DenoiserTraining,
    build_denoiser,
    build_tokenizer,
    sample_latents,
    tokenize,
    train_denoiser,
)
from latentac.shapes.provenance import Provenance
from latentac.shapes.scenes import sample_pictures
from latentac.shapes.verifier import verify

SAMPLING_STEPS = 10
_BATCH = 256  # pictures sampled together


@dataclass(frozen=True)
class Settings:
    """What decides the weights. `target`: the checked score at which the UNet's training stops, every `check_every`
    steps and at the latest after `most_steps`.
    """

    seed: int
    pictures: int
    autoencoder: AutoencoderTraining
    denoiser: DenoiserTraining
    target: float
    check_every: int
    most_steps: int
    check_pictures: int = 256
    final_pictures: int = 1024


def pretrain(output: Path, settings: Settings, command: str) -> None:
    """Trains both stages and writes the pipeline's folder, `provenance.json` included, to `output`."""
    provenance = Provenance.begin(output / "provenance.json", settings.seed, command)
    generator = np.random.default_rng(settings.seed)
    specs = training_specifications(settings.pictures, generator)
    images = np.stack([sample_pictures([spec], generator)[0] for spec in tqdm(specs, desc="pictures", unit="")])

    autoencoder = autoencoder_stage(output, settings, images, provenance)
    torch.manual_seed(settings.seed + 1)
    denoiser = build_denoiser(build_tokenizer(output / "tokenizer"))
    denoiser_stage(autoencoder, denoiser, settings, (specs, images), provenance)

    save_pipeline(output, autoencoder, denoiser)
    for split in ("held_out", "train"):
        provenance.record(
            f"score_{split}", score(autoencoder, denoiser, split, settings.final_pictures, seed=settings.seed + 3)
        )
    provenance.finish(output)


def training_specifications(count: int, generator: np.random.Generator) -> list[Specification]:
    """The four categories in turn, each time any sentence of it."""
    by_category = [[spec for spec in specifications() if spec.category == category] for category in CATEGORIES]
    columns = [by_category[index % len(CATEGORIES)] for index in range(count)]
    return [choices[generator.integers(len(choices))] for choices in columns]


def autoencoder_stage(output: Path, settings: Settings, images: np.ndarray, provenance: Provenance) -> AutoencoderKL:
    """The trained autoencoder: from `output/vae` if the same settings made it, otherwise trained and saved there."""
    wanted = {"seed": settings.seed, "pictures": settings.pictures, **asdict(settings.autoencoder)}
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
    specs, held_images = _fresh_pictures(settings.check_pictures * 2, settings.seed + 2)
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


def denoiser_stage(
    autoencoder: AutoencoderKL,
    denoiser: Denoiser,
    settings: Settings,
    pictures: tuple[list[Specification], np.ndarray],
    provenance: Provenance,
) -> None:
    """Trains `denoiser` in place on the latents of `pictures` until its checked score reaches the target."""
    specs, images = pictures
    began = time.perf_counter()
    scale = autoencoder.config.scaling_factor
    mean, deviation = encode(autoencoder, images)
    token_ids = tokenize(denoiser.tokenizer, [spec.caption for spec in specs])
    curve: list[float] = []
    checks: list[dict[str, object]] = []
    with tqdm(total=settings.most_steps, desc="UNet and text encoder", unit="step") as bar:

        def after_step(step: int, loss: float, averaged: nn.Module) -> bool:
            curve.append(loss)
            bar.update()
            if step % settings.check_every:
                return False
            text_encoder, unet = averaged.eval().children()
            candidate = Denoiser(denoiser.tokenizer, text_encoder, unet, denoiser.scheduler)
            result = score(autoencoder, candidate, "train", settings.check_pictures, seed=settings.seed + 4)
            checks.append({"step": step, **result})
            bar.set_postfix(loss=f"{np.mean(curve[-100:]):.4f}", score=f"{result['mean']:.3f}")
            return bool(result["mean"] >= settings.target or step >= settings.most_steps)

        train_denoiser(denoiser, (mean * scale, deviation * scale), token_ids, settings.denoiser, after_step)
    denoiser.modules().eval()
    rule = (
        f"the first check, every {settings.check_every} steps, whose score on {settings.check_pictures} pictures of "
        f"training prompts is at least {settings.target}; at most {settings.most_steps} steps"
    )
    record = {
        "settings": asdict(settings.denoiser),
        "parameters": {
            "unet": sum(p.numel() for p in denoiser.unet.parameters()),
            "text_encoder": sum(p.numel() for p in denoiser.text_encoder.parameters()),
        },
        "steps": len(curve),
        "stopping_rule": rule,
        "seconds": time.perf_counter() - began,
        "loss_curve": _thinned(curve),
        "checks": checks,
    }
    provenance.record("denoiser", record)


def score(autoencoder: AutoencoderKL, denoiser: Denoiser, split: str, count: int, seed: int) -> dict[str, float]:
    """Share of pictures that the verifier accepts, for each category and their mean, on `count` balanced prompts of
    `split`: DDIM with 10 trailing steps, eta 1, no guidance.
    """
    texts = [prompt.text for prompt in balanced_prompts(split, count, seed)]
    generator = torch.Generator().manual_seed(seed)
    latents = torch.cat(
        [
            sample_latents(denoiser, texts[start : start + _BATCH], SAMPLING_STEPS, generator)
            for start in range(0, count, _BATCH)
        ]
    )
    specs = [parse_caption(text) for text in texts]
    return by_category(specs, verify(decode(autoencoder, latents), specs))


def by_category(specs: list[Specification], accepted: np.ndarray) -> dict[str, float]:
    """The share accepted in each category, `mean` over all pictures, and `n`, the number of pictures."""
    categories = np.array([spec.category for spec in specs])
    shares = {category: float(accepted[categories == category].mean()) for category in CATEGORIES}
    return {"mean": float(accepted.mean()), "n": len(specs), **shares}


def save_pipeline(output: Path, autoencoder: AutoencoderKL, denoiser: Denoiser) -> None:
    """The folder of a StableDiffusionPipeline, all weights float32 safetensors."""
    StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=denoiser.text_encoder,
        tokenizer=denoiser.tokenizer,
        unet=denoiser.unet,
        scheduler=denoiser.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(output, safe_serialization=True)
    for weights in output.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written for the owner only, and would be installed so


def _fresh_pictures(count: int, seed: int) -> tuple[list[Specification], np.ndarray]:
    generator = np.random.default_rng(seed)
    specs = training_specifications(count, generator)
    return specs, sample_pictures(specs, generator)


def _thinned(curve: list[float], every: int = 25) -> list[list[float]]:
    """[step, mean loss of the `every` steps up to it] rows."""
    return [
        [start + len(part), round(float(np.mean(part)), 5)]
        for start in range(0, len(curve), every)
        if (part := curve[start : start + every])
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentac.shapes.pretrain",
        description="Pretrain the tiny text-to-image pipeline of the embedded world.",
        epilog="example: python -m latentac.shapes.pretrain --output latentac/shapes/weights/unet --threads 2",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the pipeline; a finished autoencoder there is kept")
    add("--seed", type=int, default=0, help="decides pictures, weights and noise (default %(default)s)")
    add("--pictures", type=int, default=16384, help="training pictures (default %(default)s)")
    add("--vae-steps", type=int, default=AutoencoderTraining.steps, help="autoencoder steps (default %(default)s)")
    add("--unet-steps", type=int, default=4000, help="UNet steps at most (default %(default)s)")
    add("--check-every", type=int, default=100, help="UNet steps between two checks (default %(default)s)")
    add("--target", type=float, default=0.43, help="checked score that ends the training (default %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    return parser


def main(arguments_given: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(arguments_given)
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        seed=arguments.seed,
        pictures=arguments.pictures,
        autoencoder=AutoencoderTraining(steps=arguments.vae_steps),
        denoiser=DenoiserTraining(),
        target=arguments.target,
        check_every=arguments.check_every,
        most_steps=arguments.unet_steps,
    )
    options = {name: value for name, value in vars(arguments).items() if name not in ("output", "threads")}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    pretrain(arguments.output, settings, f"python -m latentac.shapes.pretrain --output FOLDER {flags}")


if __name__ == "__main__":
    main()

"""Makes the weights in `weights`: python -m latentac.worlds.shapes.pretrain --pipeline unet --output FOLDER

First the autoencoder, then denoiser and text encoders together on its latents. The images are drawn for every caption
of the language, held-out ones included: the base knows all sentences about equally well, and what is held out is held
out from reinforcement learning. Training stops on purpose when the base is mediocre (see `--target`). A second run in
the same folder with the same settings keeps the finished autoencoder; `--autoencoder` takes that of another pipeline.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from latentac.worlds import pretraining, shapes
from latentac.worlds.pretraining.autoencoder import AutoencoderTraining, centre_latents
from latentac.worlds.pretraining.flow import FlowDenoiser, FlowSizes, build_flow_denoiser
from latentac.worlds.pretraining.provenance import Provenance
from latentac.worlds.pretraining.stages import (
    Settings,
    autoencoder_stage,
    denoiser_stage,
    finish,
    taken_autoencoder,
    training_images,
)
from latentac.worlds.pretraining.training import CaptionedDenoiser, DenoiserTraining
from latentac.worlds.shapes import denoiser as unet
from latentac.worlds.shapes.captions import CATEGORIES, Specification, balanced_prompts, parse_caption, specifications
from latentac.worlds.shapes.scenes import IMAGE_SIZE, sample_images
from latentac.worlds.shapes.tokens import build_tokenizer
from latentac.worlds.shapes.verifier import verify

SIZES = FlowSizes(latents=(4, 8, 8), width=96, num_heads=3, num_blocks=3)
_FLOW_TEXT_LENGTH = 12


def _build_flow(folder: Path) -> FlowDenoiser:
    names = ("tokenizer", "tokenizer_2")
    first, second = (build_tokenizer(folder / name, _FLOW_TEXT_LENGTH) for name in names)
    return build_flow_denoiser((first, second), SIZES)


DENOISERS: dict[str, tuple[Callable[[Path], CaptionedDenoiser], DenoiserTraining]] = {
    "unet": (unet.build_denoiser, unet.TRAINING),
    "dit": (
        _build_flow,
        DenoiserTraining(batch=64, learning_rate=2e-3, betas=(0.9, 0.95), decay_steps=16_000, last_rate=0.2),
    ),
}


class Shapes:
    """The world of shapes, for the stages. The score is the share of images that the verifier accepts."""

    image_size = IMAGE_SIZE

    def specifications(self, count: int, generator: np.random.Generator) -> list[Specification]:
        """The four categories in turn, each time any sentence of it."""
        by_category = [[spec for spec in specifications() if spec.category == category] for category in CATEGORIES]
        columns = [by_category[index % len(CATEGORIES)] for index in range(count)]
        return [choices[generator.integers(len(choices))] for choices in columns]

    def sample_images(self, specs: Sequence[Specification], generator: np.random.Generator) -> np.ndarray:
        return sample_images(specs, generator)

    def captions(self, split: str, count: int, seed: int) -> list[str]:
        return [prompt.text for prompt in balanced_prompts(split, count, seed)]

    def score(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """The share accepted in each category, `mean` over all images, and `n`, the number of images."""
        specs = [parse_caption(text) for text in captions]
        accepted = verify(images, specs)
        categories = np.array([spec.category for spec in specs])
        shares = {category: float(accepted[categories == category].mean()) for category in CATEGORIES}
        return {"mean": float(accepted.mean()), "n": len(specs), **shares}


def pretrain(output: Path, settings: Settings, command: str) -> None:
    """Trains both stages and writes the pipeline's folder, `provenance.json` included, to `output`."""
    world, packages = Shapes(), (shapes, pretraining)
    provenance = Provenance.begin(output / "provenance.json", settings.seed, command, packages)
    specs, images = training_images(world, settings)
    if settings.other is None:
        autoencoder = autoencoder_stage(output, world, settings, images, provenance)
    else:
        autoencoder = taken_autoencoder(settings.other, provenance)
    if settings.pipeline == "dit":
        centre_latents(autoencoder, images[:2048])
    torch.manual_seed(settings.seed + 1)
    denoiser = DENOISERS[settings.pipeline][0](output)
    denoiser_stage(autoencoder, denoiser, world, settings, (specs, images), provenance)
    finish(output, autoencoder, denoiser, world, settings, provenance)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentac.worlds.shapes.pretrain",
        description="Pretrain the tiny text-to-image pipeline of the embedded world.",
        epilog="example: python -m latentac.worlds.shapes.pretrain --output build/unet --threads 2; with "
        "--pipeline dit --autoencoder build/unet --output build/dit the second one",
    )
    add = parser.add_argument
    add("--pipeline", choices=sorted(DENOISERS), default="unet", help="the kind of denoiser (default %(default)s)")
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
        denoiser=DENOISERS[arguments.pipeline][1],
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

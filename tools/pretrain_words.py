"""Makes the pipeline `words-dit`: python -m tools.pretrain_words --output FOLDER

First the autoencoder, which begins with that of the shapes (from random weights, colours are learned long after
letters), then denoiser and text encoders together on its latents. With `--continue-from` the autoencoder of a finished
pipeline is taken, and its denoiser and text encoders are trained further. The images are drawn for all words,
held-out ones included: the base knows all of them about equally well, and what is held out is held out from
reinforcement learning. Training stops on purpose when the base is mediocre (see `--target`). A second run in the same
folder with the same settings keeps the finished autoencoder. The weights in latentac/worlds/words come from two runs:
the second continues from the first with another seed, which draws other images.

It is no module of latentac because it needs the reward `ocr`, and no world knows a reward.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from latentac.rewards.ocr import Ocr
from latentac.worlds import pretraining, words
from latentac.worlds.builtin import builtin_pipeline
from latentac.worlds.pretraining.autoencoder import AutoencoderTraining, centre_latents
from latentac.worlds.pretraining.flow import FlowSizes, build_flow_denoiser
from latentac.worlds.pretraining.provenance import Provenance
from latentac.worlds.pretraining.stages import (
    Settings,
    autoencoder_stage,
    denoiser_stage,
    finish,
    taken_autoencoder,
    training_images,
)
from latentac.worlds.pretraining.training import DenoiserTraining
from latentac.worlds.prompts import balanced, load_prompts
from latentac.worlds.words.captions import CATEGORIES, Specification, specifications
from latentac.worlds.words.signs import HEIGHT, WIDTH, sample_images
from latentac.worlds.words.tokens import build_tokenizer
from latentac.worlds.words.vocabulary import SPLITS

SIZES = FlowSizes(latents=(4, HEIGHT // 4, WIDTH // 4), width=96, num_heads=3, num_blocks=4)
TRAINING = DenoiserTraining(batch=32, learning_rate=1.5e-3, betas=(0.9, 0.95), decay_steps=20_000, last_rate=0.2)


class Words:
    """The world of words, for the stages. `mean` is the share of images that tesseract reads exactly."""

    image_size = WIDTH

    def __init__(self) -> None:
        self._readers = {
            "tesseract": Ocr(Ocr.Settings(engine="tesseract", layout="line", enlarge=0)),
            "rapidocr": Ocr(Ocr.Settings(engine="rapidocr", layout="line", enlarge=0)),
        }

    def specifications(self, count: int, generator: np.random.Generator) -> list[Specification]:
        """The four categories in turn, each time any sentence of it."""
        everything = [spec for split in SPLITS for spec in specifications(split)]
        by_category = [[spec for spec in everything if spec.category == category] for category in CATEGORIES]
        columns = [by_category[index % len(CATEGORIES)] for index in range(count)]
        return [choices[generator.integers(len(choices))] for choices in columns]

    def sample_images(self, specs: Sequence[Specification], generator: np.random.Generator) -> np.ndarray:
        return sample_images(specs, generator)

    def captions(self, split: str, count: int, seed: int) -> list[str]:
        prompts = getattr(load_prompts("builtin:words"), split)
        return [prompts[index].text for index in balanced(prompts, count, seed, "pretraining")]

    def score(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        """For both engines, the share that is read exactly and the mean reward; `n`, the number of images."""
        found: dict[str, float] = {}
        for name, reader in self._readers.items():
            scores = reader(images, captions)
            found |= {f"{name}_exact": float((scores == 1).mean()), f"{name}_reward": float(scores.mean())}
        return {"mean": found["tesseract_exact"], "n": len(captions), **found}


def pretrain(output: Path, settings: Settings, command: str) -> None:
    """Trains both stages and writes the pipeline's folder, `provenance.json` included, to `output`."""
    world = Words()
    provenance = Provenance.begin(output / "provenance.json", settings.seed, command, (words, pretraining))
    specs, images = training_images(world, settings)
    if settings.continued is None:
        autoencoder = autoencoder_stage(output, world, settings, images, provenance)
        centre_latents(autoencoder, images[:2048])
    else:
        autoencoder = taken_autoencoder(settings.continued, provenance)
    torch.manual_seed(settings.seed + 1)
    first, second = (build_tokenizer(output / name) for name in ("tokenizer", "tokenizer_2"))
    denoiser = build_flow_denoiser((first, second), SIZES)
    denoiser_stage(autoencoder, denoiser, world, settings, (specs, images), provenance)
    finish(output, autoencoder, denoiser, world, settings, provenance)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pretrain_words",
        description="Pretrain the tiny text-to-image pipeline of the world of words.",
        epilog="example: python -m tools.pretrain_words --output build/words",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the pipeline; a finished autoencoder there is kept")
    add("--seed", type=int, default=0, help="decides images, weights and noise (default %(default)s)")
    add("--images", type=int, default=24576, help="training images (default %(default)s)")
    add("--vae-steps", type=int, default=1800, help="autoencoder steps (default %(default)s)")
    add("--denoiser-steps", type=int, default=20_000, help="denoiser steps at most (default %(default)s)")
    add("--check-every", type=int, default=1000, help="denoiser steps between two checks (default %(default)s)")
    add("--target", type=float, default=0.35, help="checked score that ends the training (default %(default)s)")
    add("--continue-from", type=Path, help="folder of a finished pipeline, which is trained further")
    add("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return parser


def main(arguments_given: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(arguments_given)
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        seed=arguments.seed,
        images=arguments.images,
        autoencoder=AutoencoderTraining(steps=arguments.vae_steps, batch=16, colour_weight=1.0),
        denoiser=TRAINING,
        target=arguments.target,
        check_every=arguments.check_every,
        most_steps=arguments.denoiser_steps,
        pipeline="dit",
        begin_with=builtin_pipeline("shapes-unet"),
        continued=arguments.continue_from,
    )
    unrecorded = ("output", "threads", "continue_from")
    options = {name: value for name, value in vars(arguments).items() if name not in unrecorded}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    former = "" if arguments.continue_from is None else " --continue-from FORMER"
    pretrain(arguments.output, settings, f"python -m tools.pretrain_words --output FOLDER {flags}{former}")


if __name__ == "__main__":
    main()

"""Makes the CLIP `words-clip`: python -m latentac.worlds.words.contrastive --output FOLDER

A tiny CLIP that learns from rendered signs of all words which caption belongs to which image. A batch is made of groups
of sentences that differ in one respect: in the word, by few letters, in the colour, or in the style. It is saved as
`CLIPModel` and `CLIPProcessor` of transformers save one, so the reward `clip_score` loads it. It sees neither images of
a diffusion model nor what an OCR engine reads: it is a learned reward with the blind spots of one.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentac.worlds import pretraining, words
from latentac.worlds.pretraining.clip import (
    Batch,
    ContrastiveTraining,
    build_clip,
    caption_features,
    clip_stage,
    image_vectors,
)
from latentac.worlds.pretraining.provenance import Provenance
from latentac.worlds.pretraining.tokens import tokenize
from latentac.worlds.words.captions import COLOURS, STYLES, Specification
from latentac.worlds.words.signs import FONTS, WIDTH, Sign, render, sample_sign
from latentac.worlds.words.tokens import TEXT_LENGTH, build_tokenizer
from latentac.worlds.words.vocabulary import WORDS

SIDE = WIDTH  # CLIP sees squares: the images are stretched to three times their height
PATCH = 16
_NEIGHBOURS = 12
_STYLE_OF = {font: style for style, fonts in FONTS.items() for font in fonts}


@cache
def neighbours(word: str) -> tuple[str, ...]:
    """The other words that differ least from `word`: most letters at the same place, from the left or the right."""

    def shared(other: str) -> int:
        forward = sum(a == b for a, b in zip(word, other, strict=False))
        backward = sum(a == b for a, b in zip(reversed(word), reversed(other), strict=False))
        return max(forward, backward) - abs(len(word) - len(other))

    return tuple(sorted((other for other in WORDS if other != word), key=shared, reverse=True)[:_NEIGHBOURS])


def is_true(spec: Specification, sign: Sign) -> bool:
    """Whether a sign shows what `spec` says."""
    style = _STYLE_OF[sign.font]
    return spec.word == sign.word and spec.colour in (None, sign.colour) and spec.style in (None, style)


def draw_sentences(training: ContrastiveTraining, generator: np.random.Generator) -> list[Specification]:
    """Those of a batch: each is followed by the others of its group, which differ from it in one respect."""
    drawn: list[Specification] = []
    while len(drawn) < training.batch:
        colour, style = (_perhaps(values, generator) for values in (COLOURS, STYLES))
        spec = Specification(_one(WORDS, generator), colour, style)
        drawn.append(spec)
        respects = ["word", *(["colour"] if colour else []), *(["style"] if style else [])]
        for _ in range(training.group - 1):
            drawn.append(changed(spec, _one(respects, generator), generator))
    return drawn[: training.batch]


def changed(spec: Specification, respect: str, generator: np.random.Generator) -> Specification:
    """Another sentence, which differs from `spec` in its "word", "colour", or "style"."""
    if respect == "word":
        return replace(spec, word=_one(neighbours(spec.word), generator))
    if respect == "colour":
        return replace(spec, colour=_one([each for each in COLOURS if each != spec.colour], generator))
    return replace(spec, style=_one([each for each in STYLES if each != spec.style], generator))


def _one(values: Sequence[str], generator: np.random.Generator) -> str:
    return values[int(generator.integers(len(values)))]


def _perhaps(values: Sequence[str], generator: np.random.Generator) -> str | None:
    return _one(values, generator) if generator.integers(2) else None


def draw_batch(
    training: ContrastiveTraining,
    tokenizer: CLIPTokenizer,
    processor: CLIPImageProcessorPil,
    generator: np.random.Generator,
) -> Batch:
    """Fresh signs and their captions. A caption that is true of another image of the batch counts neither way."""
    specs = draw_sentences(training, generator)
    signs = [sample_sign(spec, generator) for spec in specs]
    images = [render(sign) for sign in signs]
    true = torch.tensor([[is_true(spec, sign) for spec in specs] for sign in signs])
    captions = [spec.caption for spec in specs]
    same = torch.tensor([[one == other for other in captions] for one in captions])
    return Batch(_pixels(processor, images), tokenize(tokenizer, captions), same, true & ~same)


def _pixels(processor: CLIPImageProcessorPil, images: Sequence[np.ndarray]) -> torch.Tensor:
    found: torch.Tensor = processor(list(images), return_tensors="pt", input_data_format="channels_last")[
        "pixel_values"
    ]
    return found


@torch.no_grad()
def retrieval(
    clip: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil, count: int, seed: int
) -> dict[str, float]:
    """How often a fresh image is nearer to its own caption than to one that differs in one respect: respect -> share of
    `count` images that show a word in a colour and a style."""
    generator = np.random.default_rng(seed)
    specs = [
        Specification(_one(WORDS, generator), _one(COLOURS, generator), _one(STYLES, generator)) for _ in range(count)
    ]
    images = image_vectors(clip, _pixels(processor, [render(sample_sign(spec, generator)) for spec in specs]))

    def cosines(captions: Sequence[str]) -> torch.Tensor:
        return (images * caption_features(clip, tokenize(tokenizer, captions))).sum(1)

    own = cosines([spec.caption for spec in specs])
    return {
        respect: float((own > cosines([changed(spec, respect, generator).caption for spec in specs])).float().mean())
        for respect in ("word", "colour", "style")
    }


def pretrain(output: Path, seed: int, training: ContrastiveTraining, command: str) -> None:
    """Trains a CLIP and writes its folder, `provenance.json` included, to `output`."""
    provenance = Provenance.begin(output / "provenance.json", seed, command, (words, pretraining))
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(output)
    processor = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    clip = build_clip(tokenizer, TEXT_LENGTH, SIDE, PATCH)
    clip_stage(output, clip, lambda: draw_batch(training, tokenizer, processor, generator), training, provenance)
    processor.save_pretrained(output)
    provenance.record("retrieval", retrieval(clip, tokenizer, processor, 1024, seed + 1))
    provenance.finish(output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentac.worlds.words.contrastive",
        description="Train the tiny CLIP of the world of words on rendered images and captions.",
        epilog="example: python -m latentac.worlds.words.contrastive --output build/clip",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the CLIP")
    add("--seed", type=int, default=0, help="decides images, weights and batches (default %(default)s)")
    add("--steps", type=int, default=ContrastiveTraining.steps, help="training steps (default %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return parser


def main(arguments_given: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(arguments_given)
    torch.set_num_threads(arguments.threads)
    flags = f"--seed {arguments.seed} --steps {arguments.steps}"
    training = ContrastiveTraining(steps=arguments.steps)
    command = f"python -m latentac.worlds.words.contrastive --output FOLDER {flags}"
    pretrain(arguments.output, arguments.seed, training, command)


if __name__ == "__main__":
    main()

"""Makes the weights in `weights/clip`: python -m latentac.worlds.shapes.contrastive --output FOLDER

A tiny CLIP that learns which caption belongs to which image from rendered
images of every sentence of the language, held-out ones included, as the base does. A batch is made of groups of
sentences that differ in one respect, so that it has to distinguish `left of` from `above`. It sees neither images of a
diffusion model nor the verifier's answers: it is a learned reward with the blind spots of one.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from latentac.worlds import pretraining, shapes
from latentac.worlds.pretraining.clip import (
    Batch,
    ContrastiveTraining,
    build_clip,
    caption_features,
    clip_stage,
    equal,
    image_vectors,
)
from latentac.worlds.pretraining.provenance import Provenance
from latentac.worlds.pretraining.tokens import tokenize
from latentac.worlds.shapes.captions import (
    CATEGORIES,
    COLOURS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Kind,
    Specification,
    balanced_prompts,
    parse_caption,
    specifications,
)
from latentac.worlds.shapes.scenes import BACKGROUND, IMAGE_SIZE, sample_images
from latentac.worlds.shapes.tokens import TEXT_LENGTH, build_tokenizer
from latentac.worlds.shapes.verifier import verify

PATCH = 8
PIXEL_SCALE = 64.0  # about the standard deviation of the pixels of objects
_MIRRORED = {"left of": "right of", "right of": "left of"}


def image_features(clip: CLIPModel, images: np.ndarray) -> Tensor:
    """Unit vectors float32 [B, 64] of `images` uint8 [B, 32, 32, 3]."""
    return image_vectors(clip, _pixels(images))


@cache
def hard_negatives(spec: Specification) -> dict[str, list[Specification]]:
    """The sentences whose images differ from those of `spec` in one respect: respect -> sentences, none empty.

    The respects are colour and shape of one kind, count, relation, and the exchange of the two kinds' shapes.
    """
    changed = {
        "colour": [each for colour in COLOURS for each in _with_each_kind(spec, colour=colour)],
        "shape": [each for shape in SHAPES for each in _with_each_kind(spec, shape=shape)],
    }
    if len(spec.kinds) == 1:
        changed["count"] = [_counted(spec.kinds[0], count) for count in (1, *NUMBERS.values())]
    else:
        first, last = spec.kinds
        changed["relation"] = [replace(spec, relation=relation) for relation in RELATIONS if spec.relation]
        changed["exchange"] = [replace(spec, kinds=(Kind(first.colour, last.shape), Kind(last.colour, first.shape)))]
    other = {
        respect: [each for each in specs if each in _INDEX and each.combination != spec.combination]
        for respect, specs in changed.items()
    }
    return {respect: specs for respect, specs in other.items() if specs}


def _with_each_kind(spec: Specification, **change: str) -> Iterator[Specification]:
    for index, kind in enumerate(spec.kinds):
        yield replace(spec, kinds=(*spec.kinds[:index], replace(kind, **change), *spec.kinds[index + 1 :]))


def _counted(kind: Kind, count: int) -> Specification:
    return Specification("one_object" if count == 1 else "counting", (kind,), count)


_LANGUAGE = specifications()
_INDEX = {spec: index for index, spec in enumerate(_LANGUAGE)}


class ImagePool:
    """Rendered images of every sentence, equally many for each sentence of a category and for each category."""

    def __init__(self, count: int, generator: np.random.Generator):
        """About `count` images, at least one per sentence."""
        sizes = Counter(spec.category for spec in _LANGUAGE)
        share = {category: max(1, count // len(CATEGORIES) // size) for category, size in sizes.items()}
        self._images = [
            sample_images([spec] * share[spec.category], generator)
            for spec in tqdm(_LANGUAGE, desc="images", unit="sentence")
        ]

    def draw(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """uint8 [32, 32, 3]: an image of sentence `index`, every other time the mirror image of its mirrored one."""
        spec, mirrored = _LANGUAGE[index], bool(generator.integers(2))
        if mirrored:
            index = _INDEX[replace(spec, relation=_MIRRORED.get(spec.relation or "", spec.relation))]
        choices = self._images[index]
        image = choices[generator.integers(len(choices))]
        return image[:, ::-1] if mirrored else image


def draw_sentences(training: ContrastiveTraining, generator: np.random.Generator) -> list[int]:
    """Indices of a batch: the categories in turn, each sentence followed by the others of its group.

    Other groups have other colours, so within a group they do not change.
    """
    by_category = [[spec for spec in _LANGUAGE if spec.category == category] for category in CATEGORIES]
    drawn: list[Specification] = []
    while len(drawn) < training.batch:
        choices = by_category[len(drawn) // training.group % len(CATEGORIES)]
        spec = choices[generator.integers(len(choices))]
        others = [specs for respect, specs in hard_negatives(spec).items() if respect != "colour"]
        drawn.append(spec)
        for _ in range(training.group - 1):
            respect = others[generator.integers(len(others))]
            drawn.append(respect[generator.integers(len(respect))])
    return [_INDEX[spec] for spec in drawn[: training.batch]]


def false_negatives(specs: Sequence[Specification]) -> tuple[Tensor, Tensor]:
    """`same` and `ignored` of a batch, bool [B, B] each.

    Captions of one combination are equally right. `A and B` is true of an image of `A left of B`, though it is not its
    caption: such a pair counts neither way.
    """
    same = equal([spec.combination for spec in specs])
    alike = equal([(spec.count, *sorted(spec.kinds)) for spec in specs])
    return same, alike & ~equal([spec.category for spec in specs])


def _pixels(images: np.ndarray) -> Tensor:
    offset = torch.from_numpy(images).float() - torch.tensor(BACKGROUND)  # an empty patch is all zeros
    return offset.permute(0, 3, 1, 2) / PIXEL_SCALE


@torch.no_grad()
def retrieval(clip: CLIPModel, tokenizer: CLIPTokenizer, count: int, seed: int) -> dict[str, dict[str, float]]:
    """How often a fresh image is nearer to its own caption than to its hard negatives: category -> `all` of them,
    and respect -> share of pairs. `count` balanced prompts, the two splits in equal parts.
    """
    specs = _balanced(count, seed)
    captions = caption_features(clip, tokenize(tokenizer, [spec.caption for spec in _LANGUAGE]))
    images = image_features(clip, sample_images(specs, np.random.default_rng(seed)))
    won: dict[str, dict[str, list[bool]]] = {category: {"all": []} for category in CATEGORIES}
    for spec, row in zip(specs, images @ captions.T, strict=True):
        rows = won[spec.category]
        respects = {
            respect: [bool(row[_INDEX[spec]] > row[_INDEX[other]]) for other in others]
            for respect, others in hard_negatives(spec).items()
        }
        rows["all"].append(all(map(all, respects.values())))
        for respect, answers in respects.items():
            rows.setdefault(respect, []).extend(answers)
    return {
        category: {respect: float(np.mean(answers)) for respect, answers in rows.items()}
        for category, rows in won.items()
    }


@torch.no_grad()
def verifier_correlation(
    clip: CLIPModel, tokenizer: CLIPTokenizer, count: int, seed: int, shown_each: int = 8
) -> dict[str, float]:
    """Correlation of the cosine with the verifier's answer within a caption, its mean for each category and over all.

    `count` captions, each with `shown_each` images of its own and as many of its hard negatives.
    """
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {category: [] for category in CATEGORIES}
    for spec in _balanced(count, seed):
        others = list(hard_negatives(spec).values())
        respects = [others[index % len(others)] for index in range(shown_each)]
        shown = [spec] * shown_each + [specs[generator.integers(len(specs))] for specs in respects]
        images = sample_images(shown, generator)
        cosines = image_features(clip, images) @ caption_features(clip, tokenize(tokenizer, [spec.caption]))[0]
        answers = verify(images, [spec] * len(images))
        found[spec.category].append(float(np.corrcoef(cosines.numpy(), answers)[0, 1]))
    everything = [each for rows in found.values() for each in rows]
    return {"mean": float(np.mean(everything)), **{category: float(np.mean(rows)) for category, rows in found.items()}}


def _balanced(count: int, seed: int) -> list[Specification]:
    drawn = [balanced_prompts(split, count // 2, seed) for split in ("train", "held_out")]
    return [parse_caption(prompt.text) for prompts in drawn for prompt in prompts]


def pretrain(output: Path, seed: int, images: int, training: ContrastiveTraining, command: str) -> None:
    """Trains a CLIP and writes its folder, `provenance.json` included, to `output`."""
    provenance = Provenance.begin(output / "provenance.json", seed, command, (shapes, pretraining))
    generator = np.random.default_rng(seed)
    pool = ImagePool(images, generator)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(output)
    clip = build_clip(tokenizer, TEXT_LENGTH, IMAGE_SIZE, PATCH)
    token_ids = tokenize(tokenizer, [spec.caption for spec in _LANGUAGE])
    longest = int((token_ids != tokenizer.pad_token_id).sum(1).max()) + 1

    def draw() -> Batch:
        indices = draw_sentences(training, generator)
        drawn = np.stack([pool.draw(index, generator) for index in indices])
        specs = [_LANGUAGE[index] for index in indices]
        return Batch(_pixels(drawn), token_ids[indices, :longest], *false_negatives(specs))

    clip_stage(output, clip, draw, training, provenance, images=images)
    provenance.record("hard_negative_retrieval", retrieval(clip, tokenizer, 1024, seed + 1))
    provenance.record("verifier_correlation_within_caption", verifier_correlation(clip, tokenizer, 128, seed + 2))
    provenance.finish(output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latentac.worlds.shapes.contrastive",
        description="Train the tiny CLIP of the embedded world on rendered images and captions.",
        epilog="example: python -m latentac.worlds.shapes.contrastive --output build/clip --threads 1",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the CLIP")
    add("--seed", type=int, default=0, help="decides images, weights and batches (default %(default)s)")
    add("--images", type=int, default=16384, help="training images (default %(default)s)")
    add("--steps", type=int, default=ContrastiveTraining.steps, help="training steps (default %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return parser


def main(arguments_given: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(arguments_given)
    torch.set_num_threads(arguments.threads)
    options = {name: getattr(arguments, name) for name in ("seed", "images", "steps")}
    flags = " ".join(f"--{name} {value}" for name, value in options.items())
    pretrain(
        arguments.output,
        arguments.seed,
        arguments.images,
        ContrastiveTraining(steps=arguments.steps),
        f"python -m latentac.worlds.shapes.contrastive --output FOLDER {flags}",
    )


if __name__ == "__main__":
    main()

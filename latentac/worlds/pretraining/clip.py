"""A tiny CLIP (Radford et al. 2021, arXiv 2103.00020) of a world's images and captions, and its training."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from latentac.worlds.pretraining.provenance import Provenance

WIDTH = 64
_MOST_SCALE = 100.0  # of the logits; CLIP's own bound
_EXCLUDED = -1e4  # a logit of no weight; minus infinity times a target of 0 would be no number


@dataclass(frozen=True)
class ContrastiveTraining:
    """A batch has `batch` images in groups of `group`: a sentence and others that differ from it in one respect."""

    steps: int = 4500
    batch: int = 64
    group: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.02


@dataclass(frozen=True)
class Batch:
    """pixels: float32 [B, 3, S, S]; token_ids: int64 [B, L]; same: bool [B, B], whether the caption of the column is
    as right for the image of the row as its own one is; ignored: bool [B, B], pairs that count neither way."""

    pixels: Tensor
    token_ids: Tensor
    same: Tensor
    ignored: Tensor


def build_clip(tokenizer: CLIPTokenizer, text_length: int, image_size: int, patch: int) -> CLIPModel:
    """3 layers for images and 3 for captions, no dropout. Weights from torch's global generator."""
    layers = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        **layers,
        "max_position_embeddings": text_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**layers, "image_size": image_size, "patch_size": patch}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    # CLIP's 0.02 is for large models and long trainings: places would be learned long after colours.
    torch.nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=0.5)
    return clip


def image_vectors(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit vectors float32 [B, 64] of `pixels` float32 [B, 3, S, S]."""
    return functional.normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def caption_features(clip: CLIPModel, token_ids: Tensor) -> Tensor:
    """Unit vectors float32 [B, 64] of `token_ids` int64 [B, L]."""
    pooled = clip.text_model(input_ids=token_ids).pooler_output
    return functional.normalize(clip.text_projection(pooled), dim=-1)


def contrastive_loss(logits: Tensor, same: Tensor, ignored: Tensor) -> Tensor:
    """CLIP's loss for `logits` [B, B] of images (rows) and captions (columns), without its false negatives."""
    logits = logits.masked_fill(ignored, _EXCLUDED)
    target = same.float() / same.sum(1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def clip_stage(
    output: Path,
    clip: CLIPModel,
    draw: Callable[[], Batch],
    training: ContrastiveTraining,
    provenance: Provenance,
    **settings: int,
) -> None:
    """Trains `clip` in place, saves it to `output`, and records how. settings: what decides the weights besides."""
    began = time.perf_counter()
    curve: list[float] = []
    with tqdm(total=training.steps, desc="clip", unit="step") as bar:

        def report(step: int, loss: float) -> None:
            curve.append(loss)
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

        train_clip(clip, draw, training, report)
    seconds = time.perf_counter() - began
    clip.save_pretrained(output)
    for weights in output.glob("*.safetensors"):
        weights.chmod(0o644)  # they are written for the owner only, and would be installed so
    record = {
        "settings": {**settings, **asdict(training)},
        "parameters": sum(p.numel() for p in clip.parameters()),
        "seconds": seconds,
        "logit_scale": clip.logit_scale.exp().item(),
        "loss_curve": [[end, round(float(np.mean(curve[end - 25 : end])), 5)] for end in range(25, len(curve) + 1, 25)],
    }
    provenance.record("clip", record)


def train_clip(
    clip: CLIPModel, draw: Callable[[], Batch], training: ContrastiveTraining, report: Callable[[int, float], None]
) -> None:
    """Fits `clip` in place to the batches of `draw`; `report(step, loss)` is called after every step."""
    clip.train()
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=training.learning_rate, total_steps=training.steps, pct_start=0.1
    )
    for step in range(training.steps):
        batch = draw()
        cosines = image_vectors(clip, batch.pixels) @ caption_features(clip, batch.token_ids).T
        logits = clip.logit_scale.exp().clamp(max=_MOST_SCALE) * cosines
        loss = contrastive_loss(logits, batch.same, batch.ignored)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, loss.item())
    clip.eval()


def equal(values: list[object]) -> Tensor:
    """bool [B, B]: whether two of `values` are equal."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    row = torch.tensor([numbers[value] for value in values])
    return row[:, None] == row

"""The shipped weights: the layout of a StableDiffusionPipeline, small, explained, and good for something."""

import hashlib
import json
import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from latentac.errors import ConfigError
from latentac.shapes import PIPELINES, builtin_pipeline
from latentac.shapes.autoencoder import encode, to_images
from latentac.shapes.captions import CATEGORIES, balanced_prompts, parse_caption, specifications
from latentac.shapes.denoiser import build_tokenizer
from latentac.shapes.scenes import sample_pictures
from latentac.shapes.verifier import verify

FOLDER = builtin_pipeline("shapes-unet")
PROVENANCE = json.loads((FOLDER / "provenance.json").read_text())


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_diffusers_loads_it_and_makes_pictures(pipeline, caplog):
    """Nothing of latentac is needed to use the folder; same seed, same picture, without a warning."""
    settings = {"num_inference_steps": 10, "eta": 1.0, "guidance_scale": 1.0, "output_type": "np"}
    with caplog.at_level(logging.WARNING):
        first, again = (
            pipeline("a red circle", generator=torch.Generator().manual_seed(5), **settings).images for _ in range(2)
        )
    assert first.shape == (1, 32, 32, 3)
    assert (first == again).all()
    assert not caplog.records


def test_it_does_what_it_is_asked_sometimes(pipeline):
    """Good enough to learn from, bad enough to learn: the exact share is in the provenance, this is a small sample."""
    texts = [prompt.text for prompt in balanced_prompts("held_out", 128, seed=1)]
    generator = torch.Generator().manual_seed(1)
    pictures = pipeline(
        texts, num_inference_steps=10, eta=1.0, guidance_scale=1.0, generator=generator, output_type="np"
    ).images
    accepted = verify((pictures * 255).round().astype(np.uint8), [parse_caption(text) for text in texts])
    assert 0.25 <= accepted.mean() <= 0.65


def test_the_autoencoder_keeps_what_the_verifier_looks_at():
    """At least 90 % of reconstructed pictures still pass."""
    generator = np.random.default_rng(21)
    everything = specifications()
    specs = [everything[index] for index in generator.integers(len(everything), size=64)]
    autoencoder = AutoencoderKL.from_pretrained(FOLDER / "vae").eval()
    with torch.no_grad():
        decoded = autoencoder.decode(encode(autoencoder, sample_pictures(specs, generator))[0]).sample
    assert verify(to_images(decoded), specs).mean() >= 0.9


def test_latents_have_unit_variance():
    """`scaling_factor` is one over their standard deviation, so the noise schedule fits."""
    generator = np.random.default_rng(22)
    specs = [parse_caption(prompt.text) for prompt in balanced_prompts("train", 64, seed=2)]
    autoencoder = AutoencoderKL.from_pretrained(FOLDER / "vae").eval()
    mean, deviation = encode(autoencoder, sample_pictures(specs, generator))
    variance = (mean.var() + deviation.square().mean()).item() * autoencoder.config.scaling_factor**2
    assert variance == pytest.approx(1.0, abs=0.1)


def test_no_layer_drops_out(pipeline):
    """Dropout would make the ratio before the first update another number than 1."""
    modules = [*pipeline.unet.modules(), *pipeline.text_encoder.modules()]
    assert all(module.p == 0.0 for module in modules if isinstance(module, torch.nn.Dropout))
    assert pipeline.text_encoder.config.attention_dropout == 0.0


def test_the_tokenizer_is_the_one_that_the_script_builds(tmp_path):
    """Byte for byte, so that a rerun trains on the same token ids."""
    build_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / "tokenizer" / name).read_bytes(), name


def test_every_word_is_one_token(pipeline):
    """And text outside the language still has tokens, as in any CLIP tokenizer."""
    words = {word for spec in specifications() for word in spec.caption.split()}
    assert all(len(pipeline.tokenizer.tokenize(word)) == 1 for word in words)
    assert pipeline.tokenizer("a naïve dog!").input_ids


def test_weights_are_small_and_safe():
    """Under 12 MB together, safetensors only."""
    binaries = [file for file in FOLDER.rglob("*") if file.suffix not in (".json", ".txt") and file.is_file()]
    assert {file.suffix for file in binaries} == {".safetensors"}
    assert sum(file.stat().st_size for file in binaries) < 12_000_000


def test_provenance_tells_everything():
    """Seed, code, machine, versions, both curves, the stopping rule, the scores, and the sha256 of every file."""
    assert {"seed", "command", "commit", "sources", "machine", "versions"} <= set(PROVENANCE)
    assert len(PROVENANCE["autoencoder"]["loss_curve"]) > 10
    assert len(PROVENANCE["denoiser"]["loss_curve"]) > 10
    assert PROVENANCE["denoiser"]["stopping_rule"]
    assert PROVENANCE["autoencoder"]["reconstruction_score"]["mean"] >= 0.9
    for split in ("held_out", "train"):
        assert {"mean", "n", *CATEGORIES} == set(PROVENANCE[f"score_{split}"])
    assert 0.35 <= PROVENANCE["score_held_out"]["mean"] <= 0.55
    present = {file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*") if file.is_file()}
    assert set(PROVENANCE["files"]) == present - {"provenance.json"}
    for path, described in PROVENANCE["files"].items():
        assert hashlib.sha256((FOLDER / path).read_bytes()).hexdigest() == described["sha256"], path


def test_an_unknown_pipeline_is_refused():
    """With the names there are."""
    with pytest.raises(ConfigError, match=next(iter(PIPELINES))):
        builtin_pipeline("shapes-gan")

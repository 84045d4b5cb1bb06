"""The shipped weights: folders that diffusers loads, small, explained, and good for something."""

import hashlib
import json
import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from latentac.backbones import load_backbone
from latentac.config.sections import Extension
from latentac.method.diffusion import Kernel
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout
from latentac.system.errors import ConfigError
from latentac.worlds.builtin import PIPELINES, builtin_pipeline
from latentac.worlds.pretraining.autoencoder import encode, to_images
from latentac.worlds.pretraining.flow import KERNEL
from latentac.worlds.shapes.captions import CATEGORIES, balanced_prompts, parse_caption, specifications
from latentac.worlds.shapes.scenes import sample_images
from latentac.worlds.shapes.tokens import build_tokenizer
from latentac.worlds.shapes.verifier import verify

# What the library wants to be told: which parts are missing on purpose, and how the pipeline samples.
LOADING = {"shapes-unet": {}, "shapes-dit": {"text_encoder_3": None, "tokenizer_3": None}}
SAMPLING: dict[str, dict[str, float]] = {"shapes-unet": {"eta": 1.0}, "shapes-dit": {"max_sequence_length": 0}}
SAMPLED: dict[str, Kernel] = {"shapes-unet": KERNELS.build("ddim", noise=1.0), "shapes-dit": KERNEL}


@pytest.fixture(scope="module", params=["shapes-dit", "shapes-unet"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name):
    return builtin_pipeline(name)


@pytest.fixture(scope="module")
def provenance(folder):
    return json.loads((folder / "provenance.json").read_text())


@pytest.fixture(scope="module")
def pipeline(name, folder):
    loaded = DiffusionPipeline.from_pretrained(folder, **LOADING[name])
    loaded.set_progress_bar_config(disable=True)
    return loaded


def sample(name, pipeline, texts, seed):
    """float [B, 32, 32, 3] in [0, 1]: ten steps, no guidance."""
    settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "output_type": "np", **SAMPLING[name]}
    return pipeline(texts, generator=torch.Generator().manual_seed(seed), **settings).images


def text_encoders(pipeline):
    return [part for key, part in pipeline.components.items() if key.startswith("text_encoder") and part is not None]


def tokenizers(pipeline):
    return [part for key, part in pipeline.components.items() if key.startswith("tokenizer") and part is not None]


def test_diffusers_loads_it_and_makes_images(name, pipeline, caplog):
    """Nothing of latentac is needed to use the folder; same seed, same image, without a warning."""
    with caplog.at_level(logging.WARNING):
        first, again = (sample(name, pipeline, "a red circle", 5) for _ in range(2))
    assert first.shape == (1, 32, 32, 3)
    assert (first == again).all()
    assert not caplog.records


def test_it_does_what_it_is_asked_sometimes(name, folder):
    """Good enough to learn from, bad enough to learn: the exact share is in the provenance, this is a small sample of
    the library's own rollouts."""
    backbone = load_backbone(Extension(use=name.removeprefix("shapes-")), folder, torch.device("cpu"))
    texts = [prompt.text for prompt in balanced_prompts("held_out", 128, seed=1)]
    noise = torch.randn(128, 11, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    clean = rollout(Policy(backbone, SAMPLED[name]), None, backbone.encode(texts), noise).clean
    accepted = verify(backbone.decode(clean), [parse_caption(text) for text in texts])
    assert 0.25 <= accepted.mean() <= 0.65


def test_the_autoencoder_keeps_what_the_verifier_looks_at(folder):
    """At least 90 % of reconstructed images still pass."""
    generator = np.random.default_rng(21)
    everything = specifications()
    specs = [everything[index] for index in generator.integers(len(everything), size=64)]
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").eval()
    with torch.no_grad():
        decoded = autoencoder.decode(encode(autoencoder, sample_images(specs, generator))[0]).sample
    assert verify(to_images(decoded), specs).mean() >= 0.9


def test_latents_have_unit_variance(folder):
    """`scaling_factor` is one over their standard deviation, so the noise schedule fits; `shift_factor`, where there is
    one, their mean."""
    generator = np.random.default_rng(22)
    specs = [parse_caption(prompt.text) for prompt in balanced_prompts("train", 64, seed=2)]
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae").eval()
    mean, deviation = encode(autoencoder, sample_images(specs, generator))
    variance = (mean.var() + deviation.square().mean()).item() * autoencoder.config.scaling_factor**2
    assert variance == pytest.approx(1.0, abs=0.1)
    if autoencoder.config.shift_factor is not None:
        assert autoencoder.config.shift_factor == pytest.approx(mean.mean().item(), abs=0.05)


def test_no_layer_drops_out(pipeline):
    """Dropout would make the ratio before the first update another number than 1."""
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    assert all(module.p == 0.0 for module in modules if isinstance(module, torch.nn.Dropout))
    assert all(encoder.config.attention_dropout == 0.0 for encoder in text_encoders(pipeline))


def test_the_tokenizer_is_the_one_that_the_script_builds(folder, pipeline, tmp_path):
    """Byte for byte, so that a rerun trains on the same token ids."""
    build_tokenizer(tmp_path, pipeline.tokenizer.model_max_length)
    for tokenizer in folder.glob("tokenizer*"):
        for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            assert (tmp_path / file).read_bytes() == (tokenizer / file).read_bytes(), f"{tokenizer.name}/{file}"


def test_every_word_is_one_token(pipeline):
    """And text outside the language still has tokens, as in any CLIP tokenizer; no caption is cut."""
    words = {word for spec in specifications() for word in spec.caption.split()}
    longest = max(len(spec.caption.split()) for spec in specifications()) + 2
    for tokenizer in tokenizers(pipeline):
        assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
        assert tokenizer("a naïve dog!").input_ids
        assert tokenizer.model_max_length >= longest


def test_weights_are_small_and_safe(folder):
    """Under 12 MB together, safetensors only."""
    binaries = [file for file in folder.rglob("*") if file.suffix not in (".json", ".txt") and file.is_file()]
    assert {file.suffix for file in binaries} == {".safetensors"}
    assert sum(file.stat().st_size for file in binaries) < 12_000_000


def test_provenance_says_everything(folder, provenance):
    """Seed, code, machine, versions, both curves, the stopping rule, the scores, and the sha256 of every file."""
    assert {"seed", "command", "commit", "sources", "machine", "versions"} <= set(provenance)
    assert len(provenance["autoencoder"]["loss_curve"]) > 10
    assert len(provenance["denoiser"]["loss_curve"]) > 10
    assert provenance["denoiser"]["stopping_rule"]
    assert provenance["autoencoder"]["reconstruction_score"]["mean"] >= 0.9
    for split in ("held_out", "train"):
        assert {"mean", "n", *CATEGORIES} == set(provenance[f"score_{split}"])
    assert 0.35 <= provenance["score_held_out"]["mean"] <= 0.55
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert set(provenance["files"]) == present - {"provenance.json"}
    for path, described in provenance["files"].items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == described["sha256"], path


def test_an_unknown_pipeline_is_refused():
    """With the names there are."""
    with pytest.raises(ConfigError, match=next(iter(PIPELINES))):
        builtin_pipeline("shapes-gan")

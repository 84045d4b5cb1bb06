"""The scripts that made the weights of the world of words: they run from start to end, reproducibly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from latentac.worlds.pretraining.autoencoder import AutoencoderTraining
from latentac.worlds.pretraining.clip import ContrastiveTraining
from latentac.worlds.pretraining.stages import Settings
from latentac.worlds.pretraining.training import DenoiserTraining
from latentac.worlds.words import contrastive
from tools import pretrain_words

SETTINGS = Settings(
    seed=1,
    images=16,
    autoencoder=AutoencoderTraining(steps=2, batch=4),
    denoiser=DenoiserTraining(batch=4),
    target=0.5,
    check_every=2,
    most_steps=2,
    check_images=4,
    final_images=4,
    pipeline="dit",
)


@pytest.mark.slow
def test_two_steps_make_a_loadable_pipeline_and_a_second_run_the_same_weights(tmp_path: Path):
    """The same settings give the same bytes; the finished autoencoder is kept, not trained again."""
    pretrain_words.pretrain(tmp_path, SETTINGS, "a test")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    first = json.loads((tmp_path / "provenance.json").read_text())
    assert pipeline.vae.config.shift_factor == first["denoiser"]["shift_factor"] != 0
    weights = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")

    pretrain_words.pretrain(tmp_path, SETTINGS, "a test")
    again = json.loads((tmp_path / "provenance.json").read_text())
    assert again["autoencoder"]["seconds"] == first["autoencoder"]["seconds"]
    repeated = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all((weights[name] == repeated[name]).all() for name in weights)


@pytest.mark.slow
def test_training_that_continues_begins_with_the_former_weights(tmp_path: Path):
    """At learning rate 0 the second run's denoiser is the first's, and so is its autoencoder; the provenance says whose
    weights they were."""
    former, later = tmp_path / "former", tmp_path / "later"
    pretrain_words.pretrain(former, SETTINGS, "a test")
    still = replace(SETTINGS.denoiser, learning_rate=0.0)
    pretrain_words.pretrain(later, replace(SETTINGS, seed=2, denoiser=still, continued=former), "a test")
    for name in ("vae", "transformer"):
        path = f"{name}/diffusion_pytorch_model.safetensors"
        before, after = (load_file(folder / path) for folder in (former, later))
        assert all((before[key] == after[key]).all() for key in before)
    begun = json.loads((later / "provenance.json").read_text())["denoiser"]["begun_with"]
    recorded = json.loads((former / "provenance.json").read_text())
    assert begun["denoiser"]["steps"] == recorded["denoiser"]["steps"]
    assert begun["files"][path] == recorded["files"][path]


@pytest.mark.slow
def test_two_steps_make_a_loadable_clip_and_a_second_run_the_same_weights(tmp_path: Path):
    """The same settings give the same bytes."""
    weights = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        contrastive.pretrain(folder, 1, ContrastiveTraining(steps=2, batch=8), "a test")
        CLIPModel.from_pretrained(folder)
        CLIPTokenizer.from_pretrained(folder)
        weights.append(load_file(folder / "model.safetensors"))
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.parametrize("script", [pretrain_words, contrastive])
def test_help_has_an_example(script, capsys: pytest.CaptureFixture[str]):
    """`--help` of both scripts."""
    with pytest.raises(SystemExit) as left:
        script.main(["--help"])
    assert left.value.code == 0
    assert f"example: python -m {script.__name__} --output" in capsys.readouterr().out

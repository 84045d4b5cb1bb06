"""The script that made the weights: it runs from start to end, reproducibly, and can be continued."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from latentac.worlds.pretraining.autoencoder import AutoencoderTraining
from latentac.worlds.pretraining.stages import Settings
from latentac.worlds.pretraining.training import DenoiserTraining
from latentac.worlds.shapes.pretrain import main, pretrain

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
)


def test_two_steps_make_a_loadable_pipeline_and_a_second_run_the_same_weights(tmp_path: Path):
    """The same settings give the same bytes; the finished autoencoder is kept, not trained again."""
    pretrain(tmp_path, SETTINGS, "a test")
    StableDiffusionPipeline.from_pretrained(tmp_path)
    first = json.loads((tmp_path / "provenance.json").read_text())
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")

    pretrain(tmp_path, SETTINGS, "a test")
    again = json.loads((tmp_path / "provenance.json").read_text())
    assert again["autoencoder"]["seconds"] == first["autoencoder"]["seconds"]
    repeated = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all((weights[name] == repeated[name]).all() for name in weights)
    assert again["denoiser"]["steps"] == 2


def test_the_dit_takes_the_autoencoder_of_another_pipeline(tmp_path: Path):
    """Its weights are the other's, its latents are centred anew, and its provenance says whose it was."""
    pretrain(tmp_path / "unet", SETTINGS, "a test")
    pretrain(tmp_path / "dit", replace(SETTINGS, pipeline="dit", other=tmp_path / "unet"), "a test")
    first, second = (
        json.loads((tmp_path / name / "provenance.json").read_text())["files"][
            "vae/diffusion_pytorch_model.safetensors"
        ]
        for name in ("unet", "dit")
    )
    assert first == second
    recorded = json.loads((tmp_path / "dit" / "provenance.json").read_text())
    assert recorded["autoencoder"]["taken_from"]["sha256"] == first["sha256"]
    assert set(recorded["denoiser"]["parameters"]) == {"text_encoder", "text_encoder_2", "transformer"}
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "dit", text_encoder_3=None, tokenizer_3=None)
    assert pipeline.vae.config.shift_factor == recorded["denoiser"]["shift_factor"] != 0


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]):
    """`python -m latentac.worlds.shapes.pretrain --help`."""
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "example: python -m latentac.worlds.shapes.pretrain --output" in capsys.readouterr().out

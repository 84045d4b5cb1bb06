"""The script that made the weights: it runs from start to end, reproducibly, and can be continued."""

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from latentac.shapes.autoencoder import AutoencoderTraining
from latentac.shapes.denoiser import DenoiserTraining
from latentac.shapes.pretrain import Settings, main, pretrain

SETTINGS = Settings(
    seed=1,
    pictures=16,
    autoencoder=AutoencoderTraining(steps=2, batch=4),
    denoiser=DenoiserTraining(batch=4),
    target=0.5,
    check_every=2,
    most_steps=2,
    check_pictures=4,
    final_pictures=4,
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


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]):
    """`python -m latentac.shapes.pretrain --help`."""
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "example: python -m latentac.shapes.pretrain --output" in capsys.readouterr().out

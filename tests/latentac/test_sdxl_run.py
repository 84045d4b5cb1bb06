"""A whole run on a miniature of Stable Diffusion XL, from `prepare` to an endpoint that answers."""

import json
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline

from latentac.runs.steps import deploy, evaluate, finish, gate, steer
from latentac.system import folders
from tests.latentac import miniatures
from tests.latentac.workers import RUN, prepared, train_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_a_run_goes_from_prepare_to_the_endpoint(
    adaptation: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy learns, every steering method is measured, the endpoint serves a steered image, and the exported
    folder loads in plain diffusers."""
    model = miniatures.sdxl(tmp_path / "model", size=32)
    space = prepared(
        tmp_path,
        "backbone.use=sdxl",
        f"backbone.source={model}",
        f"backbone.precision={precision}",
        f"policy.adaptation={adaptation}",
        *("evaluation.num_images=8", "evaluation.num_diversity_prompts=2", "evaluation.images_per_prompt=2"),
        *("evaluation.num_gallery_prompts=2", "steering.num_images=8", "steering.methods.twisted.sweep_particles=[2]"),
    )
    assert train_here(tmp_path, monkeypatch) == (0, "")
    manifest = space.finished("train")
    assert manifest is not None
    assert manifest.metrics["last"]["gradient_norm"] > 0
    place = (RUN, "", str(tmp_path))
    for step in (evaluate, steer, gate):
        step(*place)
    rows = json.loads((space.artifact("steer") / "steering.json").read_text())
    assert {"value_gradient", "best_of_n", "resampling", "twisted", "svdd"} <= {row["method"] for row in rows}
    version = deploy(*place, force=True).metrics["version"]
    assert finish(*place) is not None
    space.store.fetch(f"models/{version}", tmp_path / "exported")
    assert (tmp_path / "exported" / folders.ADAPTER).is_file() == (adaptation == "lora")
    assert "stable-diffusion-xl" in (tmp_path / "exported" / "README.md").read_text()
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)

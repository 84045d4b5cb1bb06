"""A whole run on a miniature of each family, from `prepare` to an endpoint that answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import DiffusionPipeline

from latentac.backbones import BACKBONES
from latentac.runs.release.deploy import fetch_version
from latentac.runs.steps import deploy, evaluate, finish, gate, steer
from latentac.serving.exported import BASE
from latentac.system import folders
from tests.latentac import miniatures
from tests.latentac.flux_miniature import flux
from tests.latentac.workers import RUN, prepared, train_here
from tests.latentac.zimage_miniature import zimage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::FutureWarning")]

MINIATURES: dict[str, Callable[..., Path]] = {
    "unet": miniatures.sd15,
    "sdxl": miniatures.sdxl,
    "dit": miniatures.sd3,
    "flux": flux,
    "zimage": zimage,
}
OWN: dict[str, list[str]] = {
    "dit": ["kernel.use=cps"],
    "flux": ["kernel.use=cps", "backbone.image_size=[32, 32]"],
    "zimage": ["kernel.use=cps", "backbone.image_size=[32, 32]", "backbone.text_tokens=32"],
}
SIZELESS = ("flux", "zimage")
"""Those whose network knows no size of its own."""
WITHOUT: dict[str, Any] = {"dit": {"text_encoder_3": None, "tokenizer_3": None}}
"""What diffusers' pipeline of the family must be told is missing."""


def test_every_backbone_has_a_miniature() -> None:
    assert MINIATURES.keys() == set(BACKBONES)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("adaptation", ["full", "lora"])
@pytest.mark.parametrize("name", MINIATURES)
def test_a_run_goes_from_prepare_to_the_endpoint(
    name: str, adaptation: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy learns, every steering method is measured, the endpoint serves a steered image, and the exported
    folder loads in plain diffusers. The runs with LoRA in float32 export the adapter alone."""
    alone = adaptation == "lora" and precision == "float32"
    model = MINIATURES[name](tmp_path / "model", **({} if name in SIZELESS else {"size": 32}))
    space = prepared(
        tmp_path,
        f"backbone.use={name}",
        f"backbone.source={model}",
        f"backbone.precision={precision}",
        f"policy.adaptation={adaptation}",
        f"export.weights={'adapter' if alone else 'merged'}",
        *("evaluation.num_images=8", "evaluation.num_diversity_prompts=2", "evaluation.images_per_prompt=2"),
        *("evaluation.num_gallery_prompts=2", "steering.num_images=8", "steering.methods.twisted.sweep_particles=[2]"),
        *OWN.get(name, []),
    )
    assert train_here(tmp_path, monkeypatch) == (0, "")
    manifest = space.finished("train")
    assert manifest is not None
    last = manifest.metrics["last"]
    assert last["gradient_norm"] > 0
    place = (RUN, "", str(tmp_path))
    for step in (evaluate, steer, gate):
        step(*place)
    rows = json.loads((space.artifact("steer") / "steering.json").read_text())
    assert {"value_gradient", "best_of_n", "resampling", "twisted", "svdd"} <= {row["method"] for row in rows}
    version = deploy(*place, force=True).metrics["version"]
    assert finish(*place) is not None
    exported = tmp_path / "exported"
    fetch_version(version, space.store.url, exported)
    assert (exported / folders.ADAPTER).is_file() == (adaptation == "lora" and not alone)
    pipeline = DiffusionPipeline.from_pretrained(exported / BASE if alone else exported, **WITHOUT.get(name, {}))
    if alone:
        assert not [file.path for file in space.store.manifest(f"models/{version}").files if BASE in file.path]
        pipeline.load_lora_weights(exported)
        scheduler = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
        pipeline.scheduler = getattr(diffusers, scheduler).from_pretrained(exported, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32} if name in SIZELESS else {}
    images = pipeline("a red circle", num_inference_steps=2, output_type="np", **call).images
    assert images.shape == (1, 32, 32, 3)

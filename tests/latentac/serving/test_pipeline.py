"""The exported model in the manner of a diffusers pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latentac.serving.generator import Generator
from latentac.serving.pipeline import LatentacPipeline
from latentac.system.errors import ConfigError, ServingError

PROMPTS = ["two red squares", "a blue circle"]


@pytest.fixture(scope="module")
def pipe(exported_folder: Path) -> LatentacPipeline:
    return LatentacPipeline.from_pretrained(exported_folder, device="cpu")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_generator_decides_the_images(pipe: LatentacPipeline) -> None:
    """The same one gives the same images, one that has drawn already gives others, and so does none at all."""
    settings: dict[str, Any] = {"num_inference_steps": 3, "method": "none"}
    drawn = seeded(1)
    first, second = (pipe(PROMPTS[0], generator=drawn, **settings) for _ in range(2))
    again = pipe(PROMPTS[0], generator=seeded(1), **settings)
    assert first.images[0].tobytes() == again.images[0].tobytes()
    assert first.images[0].tobytes() != second.images[0].tobytes()
    assert len({pipe(PROMPTS[0], **settings).images[0].tobytes() for _ in range(2)}) == 2


def test_images_are_those_of_the_endpoint(pipe: LatentacPipeline, generator: Generator) -> None:
    """Each prompt has its images beside each other, bitwise those that a request with its seed gets."""
    weights = {"shapes_verifier": 1.5, "jpeg_compressibility": -0.5}
    settings: dict[str, Any] = {"steering": weights, "method": "resampling"}
    found = pipe(PROMPTS, particles=3, num_inference_steps=4, num_images_per_prompt=2, generator=seeded(2), **settings)
    assert (len(found.images), found.values.shape, found.nfe) == (4, (4, 4, 2), 12)
    assert found.reward_names == ("shapes_verifier", "jpeg_compressibility")
    for place, (prompt, seed) in enumerate(zip(PROMPTS, found.seeds, strict=True)):
        asked = generator.generate(prompt, seed, count=2, num_steps=4, particles=3, **settings)
        for image, expected in zip(found.images[2 * place :], asked.images, strict=False):
            assert image.tobytes() == expected.tobytes()
    assert found.images[0].mode == "RGB"


def test_what_cannot_be_drawn_is_refused(pipe: LatentacPipeline, tmp_path: Path) -> None:
    """An unknown reward by name; a folder that is not an exported model."""
    with pytest.raises(ConfigError, match="shapes_verifyer"):
        pipe(PROMPTS[0], steering={"shapes_verifyer": 1.0})
    with pytest.raises(ServingError, match=tmp_path.name):
        LatentacPipeline.from_pretrained(tmp_path)

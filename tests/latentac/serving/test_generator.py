"""Images from an exported folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from latentac.backbones import BACKBONES
from latentac.config.extensions import ALLOWED, Table
from latentac.critic import BODIES
from latentac.runs.release.deploy import generate_image
from latentac.sampling.kernels import KERNELS
from latentac.sampling.steering import STEERING
from latentac.serving.exported import FILE, image_size
from latentac.serving.generator import Generator
from latentac.serving.model import SteeredDiffusion
from latentac.serving.pipeline import LatentacPipeline
from latentac.serving.request import validated
from latentac.system.errors import ConfigError, ServingError
from tests.latentac.serving.conftest import changed

PROMPT = "two red squares"


def test_the_same_request_gives_the_same_bytes(generator: Generator) -> None:
    """Steered or not; another seed gives another image."""
    first, again = generator.generate(PROMPT, seed=5), generator.generate(PROMPT, seed=5)
    assert first.images.tobytes() == again.images.tobytes()
    assert first.values.tobytes() == again.values.tobytes()
    assert generator.generate(PROMPT, seed=6).images.tobytes() != first.images.tobytes()


def test_an_image_does_not_depend_on_its_neighbours(generator: Generator) -> None:
    """Image i is the same however many are asked for, and each differs from the others."""
    three, one = (generator.generate(PROMPT, seed=5, num_steps=4, count=count) for count in (3, 1))
    assert three.images[:1].tobytes() == one.images.tobytes()
    assert len({image.tobytes() for image in three.images}) == 3


def test_shapes_units_and_cost(generator: Generator) -> None:
    """Sizes as documented; a backward counts as two forwards, and particles count each."""
    images = generator.generate(PROMPT, count=2)
    assert images.images.shape == (2, 32, 32, 3)
    assert images.images.dtype == np.uint8
    assert images.values.shape == (2, 10, 2)
    assert images.reward_names == ("shapes_verifier", "jpeg_compressibility")
    assert images.weights == {"shapes_verifier": 20.0}
    assert images.nfe == 30
    assert generator.generate(PROMPT, method="none").nfe == 10
    assert generator.generate(PROMPT, method="best_of_n", particles=3, num_steps=4).nfe == 12


def test_strength_zero_is_bitwise_the_plain_image(generator: Generator) -> None:
    """All weights at 0 is no steering; so is one particle alone, whose values are asked step by step."""
    plain = generator.generate(PROMPT, seed=5, method="none")
    for images in (
        generator.generate(PROMPT, seed=5, steering={"shapes_verifier": 0.0}),
        generator.generate(PROMPT, seed=5, steering={}),
        *(generator.generate(PROMPT, seed=5, method=name, particles=1) for name in ("best_of_n", "resampling")),
    ):
        assert images.images.tobytes() == plain.images.tobytes()
        np.testing.assert_allclose(images.values, plain.values, atol=1e-5)


def test_a_vanishing_weight_hardly_changes_the_image(generator: Generator) -> None:
    """The steered path itself, not only the short cut at weight 0, ends at the plain image."""
    plain = generator.generate(PROMPT, seed=5, method="none")
    faint = generator.generate(PROMPT, seed=5, steering={"shapes_verifier": 1e-12})
    assert faint.nfe == 30
    assert np.abs(faint.images.astype(int) - plain.images).max() <= 1
    np.testing.assert_allclose(faint.values, plain.values, atol=1e-4)


def test_steering_moves_the_values_in_its_direction(generator: Generator) -> None:
    """Up with a positive weight, down with a negative one, for the head that is named."""
    last = {
        weight: generator.generate(PROMPT, seed=5, num_steps=6, steering={"jpeg_compressibility": weight}).values
        for weight in (-8.0, 0.0, 8.0)
    }
    assert last[-8.0][0, -1, 1] < last[0.0][0, -1, 1] < last[8.0][0, -1, 1]


def test_best_of_n_keeps_the_particle_that_the_critic_prefers(generator: Generator) -> None:
    """Its last value is at least that of the first particle, the plain image."""
    plain = generator.generate(PROMPT, seed=5, count=2, num_steps=4, method="none").values[:, -1, 0]
    best = generator.generate(PROMPT, seed=5, count=2, num_steps=4, method="best_of_n").values[:, -1, 0]
    assert (best >= plain - 1e-5).all()
    assert best.mean() > plain.mean()


@pytest.mark.parametrize("method", list(STEERING))
def test_each_method_gives_the_same_bytes_again_and_a_higher_value(generator: Generator, method: str) -> None:
    """With four particles, those that are resampled included, on any number of cores; the critic's last value is above
    that of plain images in the mean."""
    plain = generator.generate(PROMPT, seed=7, count=4, num_steps=4, method="none")
    first, again = (
        generator.generate(PROMPT, seed=7, count=4, num_steps=4, method=method, steering={"shapes_verifier": 3.0})
        for _ in range(2)
    )
    assert first.images.tobytes() == again.images.tobytes()
    assert first.values[:, -1, 0].mean() > plain.values[:, -1, 0].mean()


def test_the_untouched_weights_are_the_base_policy(exported_folder: Path, generator: Generator, tmp_path: Path) -> None:
    """Where the trained ones differ, `base` still gives the images of the pipeline that training began with; a folder
    without them refuses to."""
    folder = tmp_path / "trained"
    shutil.copytree(exported_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 0.98 for name, tensor in tensors.items()}, weights)
    other = Generator(folder, torch.device("cpu"))
    base, trained = (other.generate(PROMPT, seed=5, method="none", policy=name).images for name in ("base", "trained"))
    assert base.tobytes() == generator.generate(PROMPT, seed=5, method="none").images.tobytes()
    assert trained.tobytes() != base.tobytes()
    described = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(described | {"policies": ["trained"]}))
    with pytest.raises(ConfigError, match="this model has no such policy"):
        Generator(folder, torch.device("cpu")).generate(PROMPT, policy="base")


def test_guidance_changes_the_image_and_doubles_its_cost(generator: Generator) -> None:
    """A scale of 1 is none."""
    plain, guided = (generator.generate(PROMPT, seed=5, method="none", guidance_scale=s) for s in (1.0, 4.0))
    assert (plain.nfe, guided.nfe) == (10, 20)
    assert plain.images.tobytes() != guided.images.tobytes()


@pytest.mark.parametrize("method", [*STEERING, "none"])
def test_an_image_is_the_same_in_any_batch(generator: Generator, method: str) -> None:
    """Bit for bit: alone, or beside images of other prompts, seeds and weights, at any place."""
    weights = {} if method == "none" else {"shapes_verifier": 3.0}
    particles = None if method == "none" else 2
    fields: dict[str, Any] = {"method": method, "num_steps": 3, "particles": particles, "steering": weights or None}
    mine = validated(generator.forms.request, {"prompt": PROMPT, "seed": 5, **fields})
    if weights:
        fields["steering"] = {"jpeg_compressibility": -7.0}
    theirs = validated(generator.forms.request, {"prompt": "three blue circles", "seed": 8, **fields})
    own, other = generator.slots(mine), generator.slots(theirs)
    [alone] = generator.draw(own)
    room = generator.room(own[0].kind)
    assert room > 1
    for place in range(room):
        batch = [other[0]] * room
        batch[place] = own[0]
        together = generator.draw(batch)[place]
        assert (together.image.tobytes(), together.values.tobytes()) == (alone.image.tobytes(), alone.values.tobytes())


@pytest.mark.parametrize("method", ["value_gradient", "none"])
@pytest.mark.parametrize("rows", [2, 3, 5, 6, 7, 11])
def test_equal_rows_of_a_batch_are_equal(exported_folder: Path, tmp_path: Path, rows: int, method: str) -> None:
    """Bit for bit, for batches of any size: a matrix product of MKL depends on the place of a row in some."""
    folder = changed(exported_folder, tmp_path, batching={"batch_rows": rows})
    generator = Generator(folder, torch.device("cpu"))
    fields = {"prompt": PROMPT, "seed": 11, "num_steps": 2, "method": method}
    [slot] = generator.slots(validated(generator.forms.request, fields))
    first, *others = generator.draw([slot] * rows)
    assert all(one.image.tobytes() == first.image.tobytes() for one in others)
    assert all(one.values.tobytes() == first.values.tobytes() for one in others)


def test_a_bad_request_is_reported_before_anything_is_drawn(generator: Generator) -> None:
    """The same rules as over HTTP, with the argument's name."""
    with pytest.raises(ConfigError) as caught:
        generator.generate(PROMPT, count=99, steering={"shapes": 1.0})
    assert [problem.path for problem in caught.value.problems] == ["count", "steering.shapes"]


LONG = "a red circle left of a blue square above a green triangle and four yellow squares"
"""Two tokens more than the tokenizer's 16."""


def test_a_prompt_that_would_be_cut_is_refused(generator: Generator) -> None:
    """With its number of tokens and the model's; the tokens of one that fits are told."""
    with pytest.raises(ConfigError, match=r"prompt = 'a red .*: has 18 tokens, and the model reads 16\. Shorten it"):
        generator.generate(LONG, num_steps=2)
    fits = generator.generate(" ".join(LONG.split()[:14]), num_steps=2, method="none")
    assert (fits.tokens, fits.truncated) == (16, False)


def test_where_truncation_is_allowed_the_answer_says_so(
    exported_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generator's, the pipeline's and that of `latentac generate`; the image is that of what is read."""
    folder = changed(exported_folder, tmp_path, limits={"allow_truncation": True})
    found = Generator(folder, torch.device("cpu")).generate(LONG, num_steps=2, method="none")
    read = Generator(folder, torch.device("cpu")).generate(" ".join(LONG.split()[:14]), num_steps=2, method="none")
    assert (found.tokens, found.truncated) == (18, True)
    assert (found.images == read.images).all()
    pipe = LatentacPipeline.from_pretrained(folder, "cpu")
    several = pipe([LONG, PROMPT], num_inference_steps=2, method="none")
    assert (several.tokens[0], several.truncated) == (18, [True, False])
    used = generate_image(folder, LONG, 0, 1, [], tmp_path / "image.png")
    assert (used["tokens"], used["truncated"]) == (18, True)


def test_diffusers_loads_the_exported_folder(exported_folder: Path) -> None:
    """Without latentac: the critic and latentac.json do not disturb it."""
    pipeline = StableDiffusionPipeline.from_pretrained(exported_folder)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(PROMPT, num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    width, height = result.images[0].size
    assert (height, width) == image_size(exported_folder)


@pytest.mark.parametrize(
    ("table", "row", "file", "place"),
    [
        (BACKBONES, "unet", FILE, ("backbone",)),
        (KERNELS, "ddim", FILE, ("kernel",)),
        (STEERING, "best_of_n", FILE, ("methods", "best_of_n", "extension")),
        (BODIES, "frozen_taps", "critic/config.json", ("settings", "body")),
    ],
    ids=["backbone", "kernel", "method", "body"],
)
def test_a_folder_names_rows_only_unless_the_operator_allows_more(
    exported_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: Table,
    row: str,
    file: str,
    place: tuple[str, ...],
) -> None:
    """A class of somebody's own would be imported, and a folder may come from anywhere."""
    folder, use = tmp_path / "model", table.rows[row]
    shutil.copytree(exported_folder, folder)
    content = json.loads((folder / file).read_text())
    part = content
    for name in place:
        part = part[name]
    part["use"] = use
    (folder / file).write_text(json.dumps(content))
    for others in ("", f"another:Class,{use[:-1]},{use}s,{use.partition(':')[0]}"):
        monkeypatch.setenv(ALLOWED, others)
        with pytest.raises(ServingError, match=f"names a {table.kind} that is not built in.*{ALLOWED}={use}"):
            Generator(folder, torch.device("cpu"))
    monkeypatch.setenv(ALLOWED, f"another:Class, {use}")
    assert Generator(folder, torch.device("cpu")).exported.run == "some-run"


def test_a_folder_that_is_not_whole_is_reported(exported_folder: Path, tmp_path: Path) -> None:
    """Each damage names the folder or the file, and is not a traceback."""
    cpu = torch.device("cpu")
    with pytest.raises(ServingError, match=r"is not an exported model: it has no latentac\.json"):
        Generator(tmp_path, cpu)
    damaged = tmp_path / "damaged"
    shutil.copytree(exported_folder, damaged)

    def write(change: dict[str, object]) -> None:
        content = json.loads((exported_folder / FILE).read_text())
        (damaged / FILE).write_text(json.dumps(content | change))

    write({"schema": 1})
    with pytest.raises(ServingError, match=r"latentac\.json: is not valid \(schema: Input should be 4, not 1\)"):
        Generator(damaged, cpu)
    write({"rewards": [{"name": "shapes_verifier", "weight": 1.0, "unit": ""}]})
    with pytest.raises(ServingError, match="the critic's heads"):
        Generator(damaged, cpu)
    write({})
    weights = damaged / "critic" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ServingError, match="cannot be loaded"):
        Generator(damaged, cpu)


def test_a_model_that_cannot_generate_is_never_ready(exported_folder: Path, tmp_path: Path) -> None:
    """Its files are of the right form, and its weights are NaN."""
    folder = Path(shutil.copytree(exported_folder, tmp_path / "damaged"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full_like(each, torch.nan) for name, each in load_file(weights).items()}, weights)
    model = SteeredDiffusion("m", folder, "cpu")
    with pytest.raises(ServingError, match="loads, but cannot generate an image: ConfigError: steering"):
        model.load()
    assert not model.ready

"""`prepare` takes the backbone through all that a run asks of it, once, from the copy that the run loads."""

import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentac.backbones.unet import UNetBackbone
from latentac.runs import steps
from latentac.runs.configuration import recipe_fields
from latentac.runs.preparation.guidance import compare_guidance
from latentac.runs.preparation.rehearsal import rehearse
from latentac.runs.resolution import resolve_all
from latentac.store import open_store
from latentac.system.errors import ConfigError, ResourceError, RewardError
from latentac.worlds.builtin import builtin_pipeline
from latentac.worlds.prompts import load_prompts
from tests.latentac import miniatures
from tests.latentac.trainers import shipped

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
RECIPES = {"unet": "shapes-unet-smoke", "dit": "shapes-dit-smoke"}


def config(name="unet", **settings):
    torch.set_num_threads(1)
    overrides = [f"{path.replace('__', '.')}={value}" for path, value in settings.items()]
    return resolve_all(recipe_fields(RECIPES[name], "", overrides)).config


def problems(settings, folder):
    with pytest.raises(ConfigError) as caught:
        rehearse(settings, folder, "a red circle", CPU)
    found = caught.value.problems
    return {path: "; ".join(p.problem for p in found if p.path == path) for path in {p.path for p in found}}


def changed(folder, file, change):
    """A copy of a tensor file with `change` done to each tensor."""
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / file).items()}
    save_file(tensors, folder / file)
    return folder


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_what_was_found_is_reported(name):
    """Shapes, sizes and counts, and one image to try rewards on."""
    found = rehearse(config(name), builtin_pipeline(f"shapes-{name}"), "a red circle", CPU)
    assert found.latent_shape == (4, 8, 8)
    assert found.image_size == (32, 32)
    assert found.images.shape == (1, 32, 32, 3)
    assert found.images.dtype == np.uint8
    assert found.parameters == found.trainable
    assert found.parameter_bytes == 4 * found.parameters
    assert found.text_shape == {"unet": (16, 64), "dit": (12, 128)}[name]
    assert json.loads(json.dumps(found.to_dict())).keys() == found.to_dict().keys()


@pytest.mark.parametrize("body", ["frozen_taps", "lora", "latent_cnn", "pixel"])
def test_adapters_are_attached_as_the_run_attaches_them(tmp_path, body):
    """A model of the user's own, by LoRA, with every kind of critic."""
    folder = miniatures.sd15(tmp_path / "model", sharded=True)
    settings = config(policy__adaptation="lora", policy__lora_rank=2, critic__body__use=body)
    found = rehearse(settings, folder, "a red circle", CPU)
    assert 0 < found.trainable < found.parameters / 10
    assert found.image_size == (64, 64)


def test_images_need_not_be_square(tmp_path):
    """Of 96 x 64 pixels."""
    found = rehearse(config(), miniatures.sd15(tmp_path / "m", unet={"sample_size": [12, 8]}), "a red circle", CPU)
    assert found.image_size == (96, 64)


BROKEN = {
    "denoiser": ("unet/diffusion_pytorch_model.safetensors", "conv_out.bias", "the denoiser's output"),
    "encoder": ("text_encoder/model.safetensors", "final_layer_norm.bias", "the text encoder's output"),
    "decoder": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias", "the decoded image"),
}


@pytest.mark.parametrize("part", sorted(BROKEN))
def test_weights_that_are_not_finite_are_found(tmp_path, part):
    """By what comes out of them, in the part where it shows first."""
    file, which, message = BROKEN[part]
    folder = shutil.copytree(builtin_pipeline("shapes-unet"), tmp_path / "model")
    changed(folder, file, lambda name, tensor: tensor * torch.nan if name.endswith(which) else tensor)
    assert message in problems(config(), folder)["backbone.source"]


class Unadaptable(UNetBackbone):
    """Its adapters are to go where there is nothing."""

    def adapt(self, settings):
        from latentac.backbones import adapters

        adapters.adapt(self.module, settings, ["attn.qkv"])


class Untrainable(UNetBackbone):
    """Nothing of it learns."""

    def adapt(self, settings):
        pass


@pytest.mark.parametrize(
    ("kind", "message"), [("Unadaptable", "making the denoiser trainable fails"), ("Untrainable", "no parameter")]
)
def test_adapters_that_match_no_module_are_refused(kind, message):
    """Training them would change nothing and say nothing."""
    settings = config(policy__adaptation="lora", backbone__use=f"{__name__}:{kind}")
    assert message in problems(settings, builtin_pipeline("shapes-unet"))["policy.adaptation"]


class Broken(UNetBackbone):
    """Two things of it are wrong."""

    def images(self, latents):
        raise RuntimeError("no decoder here")

    def schedule(self, num_steps):
        return super().schedule(num_steps).flip(0)


def test_problems_are_reported_together():
    """Those that do not hide one another."""
    settings = config(policy__adaptation="lora", backbone__use=f"{__name__}:Broken")
    assert "kernel.num_steps" in problems(settings, builtin_pipeline("shapes-unet"))


def test_more_steps_than_the_model_has_levels_are_refused(tmp_path):
    """Two steps at one noise level are not a step."""
    folder = miniatures.sd15(tmp_path / "model", num_train_timesteps=8)
    assert "schedule" in problems(config(kernel__num_steps=10), folder)["kernel.num_steps"]


# Through the step

JPEG = ("rewards=[{use: jpeg_compressibility}]", "gate.reward=jpeg_compressibility")


def prepare(tmp_path, *overrides, recipe="shapes-unet-smoke"):
    steps.prepare("run", "", str(tmp_path / "runs"), recipe, overrides=overrides)
    store = open_store(f"file://{tmp_path}/runs/store")
    store.fetch("run/prepare", tmp_path / "prepared")
    return tmp_path / "prepared"


def test_prepare_records_what_it_loaded(tmp_path):
    """Source, commit, what the run needs, and what the rehearsal found, in the artifact."""
    model = miniatures.sd15(tmp_path / "model", sharded=True, variant="fp16")
    prepared = prepare(tmp_path, f"backbone.source={model}", "policy.adaptation=lora", *JPEG)
    found = json.loads((prepared / "backbone.json").read_text())
    assert (found["source"], found["commit"], found["latent_shape"]) == (str(model), None, [4, 8, 8])
    assert found["requires"]["disk"]["base"] > 0
    assert not list((prepared / "backbone").rglob("*fp16*"))


def test_rewards_are_called_on_an_image_of_the_run(tmp_path):
    """One that reads only images of 32 x 32 is found out, not after training on another model."""
    model = miniatures.sd15(tmp_path / "model")
    with pytest.raises(RewardError, match=r"shapes_verifier.*\(64, 64, 3\)"):
        prepare(tmp_path, f"backbone.source={model}")


class Counting:
    """A reward that notes how many images it gets together."""

    sizes: ClassVar[list[int]] = []

    def __call__(self, images, prompts):
        self.sizes.append(len(images))
        return np.zeros(len(images))


def test_rewards_are_called_on_as_many_images_as_the_run_has_together(tmp_path):
    """One that has room for a block of the training has room for what `prepare` asks."""
    lines = "".join(f'{{"prompt": "a red circle {n}", "tag": "kind {n}"}}\n' for n in range(12))
    (tmp_path / "p.jsonl").write_text(lines)
    Counting.sizes.clear()
    own = [f'rewards=[{{use: "{__name__}:Counting", name: own}}]', "gate.reward=own", "train.num_workers=1"]
    prepare(tmp_path, f"prompts.source={tmp_path}/p.jsonl", "train.block_images=4", *own)
    assert Counting.sizes == [4, 4, 4, *[4, 4] * 2]  # of each category, and eight with guidance and without


def test_prepare_refuses_before_anything_is_published(tmp_path):
    """A folder with several faults, in one message, and no artifact."""
    model = miniatures.sd15(tmp_path / "model")
    (model / "tokenizer" / "merges.txt").unlink()
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError) as caught:
        prepare(tmp_path, f"backbone.source={model}")
    assert len(caught.value.problems) == 2
    assert not open_store(f"file://{tmp_path}/runs/store").keys("run")


def test_prepare_counts_the_room_before_it_copies(tmp_path, monkeypatch):
    """The sum by item, of the disk that the run would fill."""
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(ResourceError, match=r"has 1 MiB free, and this run needs \d+ MiB \(base \d+ MiB, trained"):
        prepare(tmp_path)
    assert not (tmp_path / "runs" / "run" / "prepare").exists()


class Later:
    """A reward that rises with each image that it is asked about, or falls."""

    step = 1.0

    def __init__(self):
        self.asked = 0

    def __call__(self, images, prompts):
        self.asked += len(images)
        return np.full(len(images), self.step * self.asked, np.float32)


class Sooner(Later):
    step = -1.0


@pytest.mark.parametrize(("sign", "warned"), [(1, True), (-1, False)])
def test_a_base_that_needs_guidance_is_noticed(caplog, sign, warned):
    """Where guidance raises the reward, the warning has both means; with guidance in training nothing is compared."""
    use = f"{__name__}:{'Later' if sign > 0 else 'Sooner'}"
    overrides = [f'rewards=[{{use: "{use}", name: own}}]', "gate.reward=own"]
    run = resolve_all(recipe_fields("shapes-unet-smoke", "", overrides))
    found = compare_guidance(run.config, shipped("unet"), run.rewards, load_prompts("builtin:shapes"))
    assert found is not None
    assert (found["with"] > found["without"]) == warned
    assert ("Consider policy.guidance_scale" in caplog.text) == warned
    guided = run.config.model_copy(update={"policy": run.config.policy.model_copy(update={"guidance_scale": 2.0})})
    assert compare_guidance(guided, shipped("unet"), run.rewards, load_prompts("builtin:shapes")) is None

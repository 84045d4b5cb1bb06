"""What a pipeline's folder must be is found out before anything is loaded, all of it together, with the remedy."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from latentac.backbones import BACKBONES
from latentac.backbones.inspection import inspect
from latentac.backbones.layout import copy, listing
from latentac.backbones.source import locate
from latentac.backbones.stable_diffusion import DIT, UNET
from latentac.system.errors import ConfigError, Problem
from latentac.worlds.builtin import builtin_pipeline
from tests.latentac import miniatures

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)
WITHOUT_T5: dict[str, dict[str, None]] = {"unet": {}, "dit": {"text_encoder_3": None, "tokenizer_3": None}}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "unet": miniatures.sd15(root / "unet"),
        "dit": miniatures.sd3(root / "dit"),
        "sharded": miniatures.sd15(root / "sharded", sharded=True),
    }


def problems(folder, layout=UNET):
    found: Sequence[Problem] = ()
    try:
        locate(str(folder), layout)
    except ConfigError as error:
        found = error.problems
    assert all(problem.path == "backbone.source" and problem.remedy for problem in found)
    return [problem.problem for problem in found]


def edit(folder, file, **settings):
    """Settings over those of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# What is loaded


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_the_embedded_models_pass(name):
    """And so does everything that the tests build."""
    assert problems(builtin_pipeline(name), UNET if name == "shapes-unet" else DIT) == []


ACCEPTED: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "SD1.5": (miniatures.sd15, {}),
    "SD1.5 sharded": (miniatures.sd15, {"sharded": True}),
    "SD1.5 as fp16 alone": (miniatures.sd15, {"variant": "fp16"}),
    "SD1.5 as bf16 alone, sharded": (miniatures.sd15, {"variant": "bf16", "sharded": True}),
    "SD1.5 as ema alone": (miniatures.sd15, {"variant": "ema"}),
    "SD2 with v-prediction": (miniatures.sd15, {"prediction_type": "v_prediction", "scheduler": "DDIMScheduler"}),
    "SD1.5 with Euler": (miniatures.sd15, {"scheduler": "EulerDiscreteScheduler"}),
    "SD1.5 of 96 x 64 pixels": (miniatures.sd15, {"unet": {"sample_size": [12, 8]}}),
    "SD3": (miniatures.sd3, {}),
    "SD3 sharded": (miniatures.sd3, {"sharded": True}),
    "SD3 as fp16 alone": (miniatures.sd3, {"variant": "fp16"}),
    "SD3.5 Medium": (miniatures.sd3, {"medium": True}),
}


@pytest.mark.parametrize("case", sorted(ACCEPTED))
def test_each_form_of_a_model_is_copied_whole_and_loads(tmp_path, case):
    """Part by part, in float32, with the weights of the folder; the copy is also a whole pipeline for diffusers."""
    build, settings = ACCEPTED[case]
    name, layout = ("unet", UNET) if build is miniatures.sd15 else ("dit", DIT)
    source = build(tmp_path / "source", **settings)
    assert problems(source, layout) == []
    copy(source, tmp_path / "copy", layout)
    assert problems(tmp_path / "copy", layout) == []
    assert not [file for file in listing(tmp_path / "copy") if "fp16" in file or "bf16" in file or ".ema" in file]
    for folder in (source, tmp_path / "copy"):
        backbone = BACKBONES.build(name, folder, CPU)
        assert all(p.dtype == torch.float32 for p in backbone.module.parameters())
        assert backbone.encode(["a red circle"]).tokens.dtype == torch.float32
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "copy", **WITHOUT_T5[name])
    theirs = getattr(pipeline, layout.network).state_dict()
    for key, tensor in backbone.module.state_dict().items():
        assert torch.equal(theirs[key].float(), tensor), key
    height, width = backbone.latent_shape[1:]
    with torch.no_grad():
        images = backbone.decode(torch.zeros(1, *backbone.latent_shape))
    assert images.shape == (1, 8 * height, 8 * width, 3)


def test_a_variant_stands_in_part_by_part(models, tmp_path):
    """Where a part has no other weights; a part that has both is loaded from the plain ones."""
    both = shutil.copytree(models["unet"], tmp_path / "both")
    miniatures.sd15(both, variant="fp16", seed=0)
    (both / WEIGHTS).unlink()
    assert problems(both) == []
    copy(both, tmp_path / "copy", UNET)
    full, half = (torch.finfo(kind).bits // 8 for kind in (torch.float32, torch.float16))
    sizes = {part: (tmp_path / "copy" / part) for part in ("unet", "vae")}
    unet, vae = (next(folder.glob("*.safetensors")).stat().st_size for folder in sizes.values())
    assert unet == pytest.approx((models["unet"] / WEIGHTS).stat().st_size * half / full, rel=0.1)
    assert vae == (models["unet"] / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size


@pytest.mark.parametrize("stale", ["whole", "sharded"])
@pytest.mark.parametrize(("name", "layout", "build"), [("unet", UNET, miniatures.sd15), ("dit", DIT, miniatures.sd3)])
def test_of_two_forms_of_a_part_the_one_is_taken_that_the_libraries_load(tmp_path, name, layout, build, stale):
    """What an earlier save has left beside the weights does not take their place: neither a whole file beside shards,
    which diffusers leaves there, nor an index beside a whole file."""
    source = build(tmp_path / "source", sharded=stale == "sharded", seed=1)
    build(source, sharded=stale == "whole", seed=2)
    copy(source, tmp_path / "copy", layout)
    theirs, ours = (
        DiffusionPipeline.from_pretrained(tmp_path / each, **WITHOUT_T5[name]) for each in ("source", "copy")
    )
    for part in (layout.network, "vae", "text_encoder"):
        for key, tensor in getattr(theirs, part).state_dict().items():
            assert torch.equal(getattr(ours, part).state_dict()[key], tensor), (part, key)


def test_only_what_is_used_is_copied(models, tmp_path):
    """No single files, no safety checker, no T5, no other formats, no hidden files, nothing through a link."""
    source = shutil.copytree(models["dit"], tmp_path / "source")
    (source / "text_encoder_3").mkdir()
    (source / "tokenizer_3").mkdir()
    edit(source, "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"], feature_extractor=None)
    extra = ["sd3_medium.safetensors", "README.md", "text_encoder_3/model.safetensors", "tokenizer_3/spiece.model"]
    extra += ["transformer/diffusion_pytorch_model.bin", "vae/model.onnx", ".cache/token", "vae/.hidden.json"]
    extra += ["transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/flax_model.msgpack"]
    for name in extra:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    os.symlink("/etc/hostname", source / "vae" / "notes.txt")
    assert problems(source, DIT) == []
    copy(source, tmp_path / "copy", DIT)
    assert listing(tmp_path / "copy") == listing(models["dit"])
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["feature_extractor"] == [None, None]
    DiffusionPipeline.from_pretrained(tmp_path / "copy", **WITHOUT_T5["dit"])


def test_a_part_may_be_a_link_within_the_folder(models, tmp_path):
    """As where two encoders are one; what is copied is files."""
    folder = shutil.copytree(models["dit"], tmp_path / "model")
    shutil.rmtree(folder / "tokenizer_2")
    os.symlink("tokenizer", folder / "tokenizer_2")
    assert problems(folder, DIT) == []
    copy(folder, tmp_path / "copy", DIT)
    assert listing(tmp_path / "copy") == listing(models["dit"])
    assert not (tmp_path / "copy" / "tokenizer_2").is_symlink()


def test_a_safety_checker_beside_it_does_not_matter(models, tmp_path):
    """Stable Diffusion 1.5's own index names one; its folder need not even be there."""
    folder = shutil.copytree(models["unet"], tmp_path / "model")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(folder, "model_index.json", safety_checker=checker, requires_safety_checker=True, image_encoder=None)
    assert problems(folder) == []
    copy(folder, tmp_path / "copy", UNET)
    assert DiffusionPipeline.from_pretrained(tmp_path / "copy").safety_checker is None


# What is refused: (what is done to the folder, what the message says)

INDEX, UNET_FILE, VAE_FILE = "model_index.json", "unet/config.json", "vae/config.json"
TEXT_FILE, TOKENIZER_FILE = "text_encoder/config.json", "tokenizer/tokenizer_config.json"


def setting(file, **settings):
    return lambda folder: edit(folder, file, **settings)


def text(file, content):
    return lambda folder: (folder / file).write_text(content)


def without(*files):
    def remove(folder):
        for file in files:
            shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()

    return remove


def renamed(file, name):
    return lambda folder: (folder / file).rename(folder / name)


def cut(file, keep):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def patched(file, old, new):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes().replace(old, new, 1))


def linked(folder):
    shutil.copyfile(folder / WEIGHTS, folder.parent / "elsewhere")
    (folder / WEIGHTS).unlink()
    os.symlink(folder.parent / "elsewhere", folder / WEIGHTS)


def linked_part(folder):
    shutil.move(folder / "vae", folder.parent / "vae")
    os.symlink(folder.parent / "vae", folder / "vae")


PIPELINES = {
    "StableDiffusionXLImg2ImgPipeline": "refiner",
    "FluxFillPipeline": "inpainting with FLUX.1",
    "Flux2Pipeline": "FLUX.2",
    "StableDiffusionInpaintPipeline": "inpainting",
    "StableDiffusionImg2ImgPipeline": "image-to-image",
    "StableDiffusionInstructPix2PixPipeline": "instruct-pix2pix",
    "StableDiffusionUpscalePipeline": "upscaler",
    "StableDiffusionDepth2ImgPipeline": "depth",
    "StableDiffusionControlNetPipeline": "ControlNet",
    "LatentConsistencyModelPipeline": "guidance-distilled",
    "AltDiffusionPipeline": "Roberta",
    "PixArtSigmaPipeline": "PixArt",
    "MyOwnPipeline": "MyOwnPipeline",
}

REFUSED = {
    **{f"pipeline {name}": (setting(INDEX, _class_name=name), what) for name, what in PIPELINES.items()},
    "another backbone": (setting(INDEX, _class_name="StableDiffusion3Pipeline"), "another backbone's"),
    "FLUX.1": (setting(INDEX, _class_name="FluxPipeline"), "another backbone's"),
    "Stable Diffusion XL": (setting(INDEX, _class_name="StableDiffusionXLPipeline"), "another backbone's"),
    "no index": (without(INDEX), "model_index.json: is missing"),
    "an index that is not JSON": (text(INDEX, "{"), "model_index.json is not JSON"),
    "no tokenizer": (without("tokenizer"), "tokenizer: is missing"),
    "a tokenizer of nulls": (setting(INDEX, tokenizer=[None, None]), "tokenizer: is null or missing"),
    "an empty tokenizer": (without("tokenizer/vocab.json", "tokenizer/merges.txt"), "neither tokenizer.json nor"),
    "half a tokenizer": (without("tokenizer/merges.txt"), "neither tokenizer.json nor vocab.json with merges.txt"),
    "a tokenizer of pointers": (text("tokenizer/vocab.json", POINTER), "vocab.json is a git-lfs pointer"),
    "merges as a pointer": (text("tokenizer/merges.txt", POINTER), "merges.txt is a git-lfs pointer"),
    "a broken vocabulary": (text("tokenizer/vocab.json", '{"a": 1'), "vocab.json is not JSON"),
    "an empty vocabulary": (text("tokenizer/vocab.json", "{}"), "empty vocabulary"),
    "empty merges": (text("tokenizer/merges.txt", ""), "merges.txt is empty"),
    "a broken tokenizer.json": (text("tokenizer/tokenizer.json", "[]"), "tokenizer.json is not a JSON object"),
    "no tokenizer_config": (without(TOKENIZER_FILE), "no tokenizer_config.json"),
    "a tokenizer without a length": (setting(TOKENIZER_FILE, model_max_length=1e30), r"model_max_length is 1e\+30"),
    "a tokenizer that is too long": (setting(TOKENIZER_FILE, model_max_length=77), "reads at most 16 tokens"),
    "added tokens of no encoder": (text("tokenizer/added_tokens.json", '{"<cat>": 5000}'), "has the token 5000"),
    "added tokens in the settings": (
        setting(TOKENIZER_FILE, added_tokens_decoder={"5000": {"content": "<cat>"}}),
        "has the token 5000",
    ),
    "a tokenizer of another encoder": (setting(TEXT_FILE, vocab_size=100), "knows 100 tokens"),
    "a tokenizer without its end": (setting(TOKENIZER_FILE, eos_token="</s>"), "no token '</s>'"),
    "another tokenizer": (setting(INDEX, tokenizer=["transformers", "T5Tokenizer"]), "tokenizer: is a T5Tokenizer"),
    "a pickled VAE": (
        renamed("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
        "vae: has no safetensors weights, but diffusion_pytorch_model.bin",
    ),
    "a pickled UNet": (renamed(WEIGHTS, "unet/diffusion_pytorch_model.bin"), "unet: has no safetensors weights"),
    "a pickled encoder": (
        renamed("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
        "text_encoder: has no safetensors weights, but pytorch_model.bin",
    ),
    "weights under another name": (renamed(WEIGHTS, "unet/model.safetensors"), "but model.safetensors"),
    "no weights": (without(WEIGHTS), "unet: has no weights"),
    "no part": (without("vae"), "vae: is missing"),
    "a part of null": (setting(INDEX, unet=None), "unet: is null or missing in model_index.json"),
    "no configuration": (without(UNET_FILE), "unet: has no config.json"),
    "a configuration of a pointer": (text(VAE_FILE, POINTER), "config.json is a git-lfs pointer"),
    "weights of a pointer": (text(WEIGHTS, POINTER), "is a git-lfs pointer"),
    "truncated weights": (cut(WEIGHTS, 5000), "cut off"),
    "weights cut at the end": (cut(WEIGHTS, -100), "it was cut off"),
    "empty weights": (cut(WEIGHTS, 0), "not a safetensors file, or was cut off"),
    "a page instead of weights": (text(WEIGHTS, "<!doctype html>" * 100), "not a safetensors file"),
    "a damaged header": (patched(WEIGHTS, b'"dtype"', b'"dtypo"'), "damaged header"),
    "quantised weights": (setting(UNET_FILE, quantization_config={"bits": 4}), "quantised weights"),
    "a link out of the folder": (linked, "is a link that leads out of the folder"),
    "class embeddings": (setting(UNET_FILE, class_embed_type="timestep"), "class_embed_type is 'timestep'"),
    "numbered classes": (setting(UNET_FILE, num_class_embeds=1000), "num_class_embeds is 1000"),
    "SDXL's embeddings": (setting(UNET_FILE, addition_embed_type="text_time"), "addition_embed_type is 'text_time'"),
    "a distilled UNet": (setting(UNET_FILE, time_cond_proj_dim=256), "time_cond_proj_dim is 256.*distilled"),
    "another encoder's states": (setting(UNET_FILE, encoder_hid_dim=1024), "encoder_hid_dim is 1024"),
    "GLIGEN": (setting(UNET_FILE, attention_type="gated"), "attention_type is 'gated'"),
    "an inpainting UNet": (setting(UNET_FILE, in_channels=9), r"in_channels is 9 \(inpainting"),
    "an editing UNet": (setting(UNET_FILE, in_channels=8), r"in_channels is 8 \(instruct-pix2pix"),
    "a UNet with variances": (setting(UNET_FILE, out_channels=8), "out_channels is 8.*variance"),
    "no middle block": (setting(UNET_FILE, mid_block_type=None), "mid_block_type is null"),
    "a size of no number": (setting(UNET_FILE, sample_size=True), "sample_size is True"),
    "no size": (setting(UNET_FILE, sample_size=None), "sample_size is None"),
    "another encoder's width": (setting(UNET_FILE, cross_attention_dim=1024), "cross_attention_dim is 1024"),
    "another UNet": (setting(INDEX, unet=["diffusers", "UNet3DConditionModel"]), "unet: is a UNet3DConditionModel"),
    "another UNet within": (setting(UNET_FILE, _class_name="UNetMotionModel"), "config.json says UNetMotionModel"),
    "AltDiffusion's encoder": (
        setting(INDEX, text_encoder=["alt_diffusion", "RobertaSeriesModelWithTransformation"]),
        "text_encoder: is a RobertaSeriesModelWithTransformation",
    ),
    "T5 in CLIP's place": (setting(TEXT_FILE, architectures=["T5EncoderModel"]), "config.json says T5EncoderModel"),
    "XLM-Roberta within": (
        setting(TEXT_FILE, architectures=None, model_type="xlm-roberta"),
        "model_type 'xlm-roberta'",
    ),
    "a masked encoder": (setting(TEXT_FILE, use_attention_mask=True), "use_attention_mask is true"),
    "a part that is a link out of the folder": (linked_part, "vae/config.json: is a link that leads out"),
    "numbers as texts": (setting(TEXT_FILE, vocab_size="many"), "vocab_size is .many., and must be a whole number"),
    "tokens of no form": (text("tokenizer/tokenizer.json", '{"model": {}, "added_tokens": [{}]}'), "empty vocabulary"),
    "a VQ model": (setting(INDEX, vae=["diffusers", "VQModel"]), "vae: is a VQModel"),
    "a tiny autoencoder": (setting(INDEX, vae=["diffusers", "AutoencoderTiny"]), "vae: is a AutoencoderTiny"),
    "an asymmetric autoencoder": (
        setting(VAE_FILE, _class_name="AsymmetricAutoencoderKL"),
        "config.json says AsymmetricAutoencoderKL",
    ),
    "latent means": (setting(VAE_FILE, latents_mean=[0.1, 0, 0, 0]), "latents_mean is set"),
    "a shift": (setting(VAE_FILE, shift_factor=0.1), "shift_factor is 0.1"),
    "a scale that leaves nothing": (setting(VAE_FILE, scaling_factor=float("inf")), "scaling_factor is inf"),
    "a scale of another unit": (setting(VAE_FILE, scaling_factor=1e-40), "scaling_factor is 1e-40"),
    "no scale": (setting(VAE_FILE, scaling_factor=0), "scaling_factor is 0"),
    "16 channels": (setting(VAE_FILE, latent_channels=16), "in_channels is 4, and vae has latent_channels 16"),
    "a scheduler of null": (setting(INDEX, scheduler=[None, None]), "scheduler: is null or missing"),
    "no scheduler": (without("scheduler"), "scheduler: is missing"),
    "a sample prediction": (
        setting("scheduler/scheduler_config.json", prediction_type="sample"),
        "prediction_type is 'sample'",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_a_run_could_not_use_is_refused_by_name(models, tmp_path, case):
    """Before a weight is read, with what was found and what to do."""
    change, message = REFUSED[case]
    folder = shutil.copytree(models["unet"], tmp_path / "model")
    change(folder)
    found = problems(folder)
    assert found, "nothing was found"
    assert any(re.search(message, problem) for problem in found), found


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_what_is_supported_instead_is_reported(models, tmp_path, name):
    """Each pipeline and the backbone that loads it, beside the name of the one that is refused."""
    folder = shutil.copytree(models["unet"], tmp_path / "model")
    edit(folder, INDEX, _class_name=name)
    with pytest.raises(ConfigError, match=r"Supported: .*\(StableDiffusionPipeline, backbone\.use=unet\).*use=dit"):
        locate(str(folder), UNET)


DIT_FILE = "transformer/config.json"
DIT_REFUSED = {
    "a UNet's pipeline": (setting(INDEX, _class_name="StableDiffusionPipeline"), "another backbone's"),
    "another transformer": (
        setting(INDEX, transformer=["diffusers", "FluxTransformer2DModel"]),
        "FluxTransformer2DMod",
    ),
    "channels": (setting(DIT_FILE, in_channels=33), "in_channels is 33, and vae has latent_channels 16"),
    "outputs": (setting(DIT_FILE, out_channels=32), "out_channels is 32"),
    "positions": (setting(DIT_FILE, pos_embed_max_size=2), "more patches a side than pos_embed_max_size"),
    "patches": (setting(DIT_FILE, sample_size=9), "multiple of patch_size"),
    "text": (setting(DIT_FILE, joint_attention_dim=32), "joint_attention_dim is 32"),
    "pooled text": (setting(DIT_FILE, pooled_projection_dim=2048), "pooled_projection_dim is 2048"),
    "no second encoder": (setting(INDEX, text_encoder_2=[None, None]), "text_encoder_2: is null or missing"),
    "no second tokenizer": (without("tokenizer_2"), "tokenizer_2: is missing"),
    "lengths": (setting("tokenizer_2/tokenizer_config.json", model_max_length=12), "model_max_length differs"),
    "a shift that is text": (setting(VAE_FILE, shift_factor="0.1"), "shift_factor is '0.1'"),
    "a shift that is not a number": (setting(VAE_FILE, shift_factor=float("nan")), "shift_factor is nan"),
    "no shift": (setting(VAE_FILE, shift_factor=None), "shift_factor is null"),
    "an encoder without projection": (
        setting(INDEX, text_encoder=["transformers", "CLIPTextModel"]),
        "text_encoder: is a CLIPTextModel",
    ),
    "DDPM": (setting("scheduler/scheduler_config.json", _class_name="DDPMScheduler"), "DDPMScheduler is not known"),
}


@pytest.mark.parametrize("case", sorted(DIT_REFUSED))
def test_what_a_transformers_run_could_not_use_is_refused_by_name(models, tmp_path, case):
    """The same for Stable Diffusion 3."""
    change, message = DIT_REFUSED[case]
    folder = shutil.copytree(models["dit"], tmp_path / "model")
    change(folder)
    assert any(message in problem for problem in problems(folder, DIT)), problems(folder, DIT)


SHARDED = {
    "a shard is missing": (
        without("unet/diffusion_pytorch_model-00002-of-00020.safetensors"),
        "names diffusion_pytorch_model-00002-of-00020.safetensors, which is not there",
    ),
    "a shard is a pointer": (text("unet/diffusion_pytorch_model-00003-of-00020.safetensors", POINTER), "git-lfs"),
    "a shard was cut": (cut("unet/diffusion_pytorch_model-00003-of-00020.safetensors", 900), "cut off"),
    "the index is missing": (
        without("unet/diffusion_pytorch_model.safetensors.index.json"),
        "index.json is missing beside its shards",
    ),
    "the index is empty": (text("unet/diffusion_pytorch_model.safetensors.index.json", "{}"), "names no weights"),
    "the index names more": (
        patched("unet/diffusion_pytorch_model.safetensors.index.json", b'"conv_in.bias"', b'"conv_in.b"'),
        "names the tensor conv_in.b, which",
    ),
}


@pytest.mark.parametrize("case", sorted(SHARDED))
def test_shards_are_complete(models, tmp_path, case):
    """An index and its files belong together."""
    change, message = SHARDED[case]
    folder = shutil.copytree(models["sharded"], tmp_path / "model")
    change(folder)
    assert any(message in problem for problem in problems(folder)), problems(folder)


def test_all_problems_are_reported_together(models, tmp_path):
    """A user corrects a folder once."""
    folder = shutil.copytree(models["unet"], tmp_path / "model")
    for case in (
        "a pickled VAE",
        "class embeddings",
        "merges as a pointer",
        "a sample prediction",
        "truncated weights",
    ):
        REFUSED[case][0](folder)
    assert len(problems(folder)) >= 5, problems(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_single_file_is_refused_with_what_converts_it(tmp_path, name):
    """As the source, and as what lies in the folder that is the source."""
    (tmp_path / name).write_bytes(b"x")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(ConfigError, match=r"from_single_file\(.*\)\.save_pretrained\('converted'\)") as caught:
            locate(str(source), UNET)
        assert "single" in caught.value.problems[0].problem


def test_the_command_for_pickles_converts_them(models, tmp_path):
    """It is run here exactly as the message gives it."""
    folder = shutil.copytree(models["unet"], tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    AutoencoderKL.from_pretrained(models["unet"], subfolder="vae").save_pretrained(
        folder / "vae", safe_serialization=False
    )
    with pytest.raises(ConfigError, match="pickles can run code") as caught:
        locate(str(folder), UNET)
    remedy = caught.value.problems[0].remedy
    command = remedy[remedy.index("python -c ") :].replace("python -c ", "").strip('"')
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    assert problems(folder) == []


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c", "https://hub/a/b"])
def test_a_source_that_is_no_folder_is_not_asked_of_the_hub(source):
    """A path is a path: a misspelt one is not looked up elsewhere."""
    with pytest.raises(ConfigError, match=r"is not a folder here|is an address"):
        locate(source, UNET)


def test_a_folder_has_no_revision(models):
    """It would be ignored in silence."""
    with pytest.raises(ConfigError, match="is not a hub id and has no revision"):
        locate(str(models["unet"]), UNET, "main")


def test_weights_of_another_configuration_are_not_filled_up_at_random(models, tmp_path):
    """diffusers draws what is missing, with a warning; here it is an error, by name. Another shape is one, too."""
    for name, change, message in (
        (
            "missing",
            patched(WEIGHTS, b'"conv_in.bias"', b'"conv_in.bia5"'),
            r"unet: its weights file lacks conv_in\.bias",
        ),
        ("beside", patched(WEIGHTS, b'"conv_in.bias"', b'"conv_in.bia5"'), r"beside .* conv_in\.bia5"),
        ("shape", setting(UNET_FILE, block_out_channels=[8, 16]), r"unet: cannot be loaded \(.*expected shape"),
        ("more", setting(UNET_FILE, layers_per_block=2), r"unet: its config\.json asks for 366,884 numbers, and its"),
    ):
        folder = shutil.copytree(models["unet"], tmp_path / name)
        change(folder)
        assert problems(folder) == []  # the headers are those of sound files
        with pytest.raises(ConfigError, match=message):
            BACKBONES.build("unet", folder, CPU)


def test_nothing_is_changed_by_an_inspection(models):
    """It reads."""
    before = {path: path.stat().st_mtime_ns for path in Path(models["unet"]).rglob("*")}
    assert inspect("x", models["unet"], UNET) == []
    assert {path: path.stat().st_mtime_ns for path in Path(models["unet"]).rglob("*")} == before

"""FLUX.1: it is diffusers' FluxPipeline, in every form of its folder, trained, saved and steered."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from latentac.backbones import Denoiser, load_backbone
from latentac.backbones.flux import FluxBackbone, FluxSettings
from latentac.backbones.flux_layout import FLUX
from latentac.backbones.guided import guided
from latentac.backbones.layout import copy, listing
from latentac.backbones.source import locate
from latentac.backbones.t5_layout import LONGEST
from latentac.config.learning import Critic as CriticSettings
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.critic import Critic
from latentac.method.diffusion import CPS, FlowSDE
from latentac.method.randomness import noise_for
from latentac.method.records import Conditioning
from latentac.runs import testing
from latentac.runs.configuration import recipe_fields
from latentac.runs.preparation.model_sizes import read_model
from latentac.runs.resolution import resolve_all
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout, steered_rollout
from latentac.sampling.snippet import base_of, usage
from latentac.sampling.steering import STEERING
from latentac.sampling.steering.run import SteeringRun
from latentac.system import folders
from latentac.system.errors import ConfigError
from tests.latentac.flux_miniature import DYNAMIC, flux, table
from tests.latentac.test_export import PROMPT, drawn, served

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a Red square"]
SIZE = [48, 64]
STEPS = 4


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return flux(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return flux(tmp_path_factory.mktemp("flux") / "schnell", schnell=True)


def load(folder: Path, **own: Any) -> Any:
    return load_backbone(Extension.model_validate({"use": "flux", "image_size": SIZE} | own), folder, CPU)


def noise_of(backbone: Denoiser, images: int = len(PROMPTS), steps: int = STEPS) -> torch.Tensor:
    return noise_for([(index,) for index in range(images)], 0, steps, backbone.latent_shape)


def state(backbone: Denoiser) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    return noise_of(backbone)[:, 0], backbone.schedule(STEPS)[1].expand(len(PROMPTS)), backbone.encode(PROMPTS)


def packed(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def pipeline_of(folder: Path) -> Any:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made(pipeline: Any, latents: torch.Tensor, **settings: Any) -> np.ndarray:
    """Images of plain diffusers as integers, [B, H, W, 3]."""
    call = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": STEPS, "max_sequence_length": 16}
    images = pipeline(PROMPTS, latents=packed(latents), output_type="np", **(call | settings)).images
    return (images * 255).round().astype(int)


# What it computes


@pytest.mark.parametrize("size", [[48, 64], [32, 32]], ids=str)
@pytest.mark.parametrize(
    "own",
    [{}, {"precision": "bfloat16"}, {"gradient_checkpointing": True}, {"distilled_guidance": 1.0, "text_tokens": 8}],
    ids=str,
)
def test_the_contract_of_a_backbone_holds(dev: Path, own: dict[str, Any], size: list[int]) -> None:
    """Also in half precision, with recomputed activations, and for images that are not square."""
    backbone: Any = testing.check_backbone("flux", dev, image_size=size, **own)
    assert backbone.image_size == tuple(size)
    assert backbone.latent_shape == (4, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize("size", [SIZE, [96, 80]], ids=str)
@pytest.mark.parametrize(("name", "guidance"), [("dev", 3.5), ("dev", 1.0), ("schnell", 3.5)])
def test_a_rollout_without_noise_is_what_plain_diffusers_makes(
    name: str, guidance: float, size: list[int], request: pytest.FixtureRequest
) -> None:
    """The same latents, number of steps and guidance, in one grey level; both take the shift from the scheduler's file
    and the image's size."""
    folder = request.getfixturevalue(name)
    backbone = load(folder, distilled_guidance=guidance, image_size=size)
    noise = noise_of(backbone)
    policy = Policy(backbone, KERNELS.build("cps", noise=0.0))
    ours = backbone.decode(rollout(policy, None, backbone.encode(PROMPTS), noise).clean)
    theirs = made(pipeline_of(folder), noise[:, 0], guidance_scale=guidance, height=size[0], width=size[1])
    assert ours.std() > 5
    assert np.abs(theirs - ours).max() <= 1


def test_guidance_is_an_input_where_the_transformer_has_one(dev: Path, schnell: Path) -> None:
    """Another number, another prediction; schnell does not read it."""
    for folder, reads in ((dev, True), (schnell, False)):
        with torch.no_grad():
            one, other = (load(folder, distilled_guidance=scale) for scale in (1.0, 7.0))
            found = [backbone.predict(*state(backbone))[0].noise for backbone in (one, other)]
        assert torch.equal(*found) != reads


def test_text_is_encoded_as_the_pipeline_does_it(dev: Path) -> None:
    """T5's tokens and CLIP's pooled vector, each from its own tokenizer."""
    backbone, pipeline = load(dev), pipeline_of(dev)
    tokens, pooled, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=16)
    found = backbone.encode(PROMPTS)
    torch.testing.assert_close(found.tokens, tokens)
    torch.testing.assert_close(found.pooled, pooled)
    assert (found.tokens.shape, found.pooled.shape) == ((3, 16, backbone.text_width), (3, 32))


def test_tokens_are_counted_and_cut_as_t5_reads_them(dev: Path) -> None:
    """The end's mark included; words beyond `text_tokens` change only CLIP's vector."""
    backbone = load(dev, text_tokens=8)
    text = "a red circle above a blue square"
    assert backbone.max_tokens == 8
    assert backbone.count_tokens(["", text, f"{text} and"]) == [1, 8, 9]
    one, other = backbone.encode([text]), backbone.encode([f"{text} and"])
    assert torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize("cells", [(4, 4), (6, 8), (64, 64), (128, 128), (256, 256)], ids=str)
def test_levels_are_those_of_diffusers_at_every_size(cells: tuple[int, int]) -> None:
    """Dynamic shifting goes by the image tokens, of which there is one per four cells of the latents."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    tokens = cells[0] * cells[1] // 4
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(DYNAMIC[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=mu)
    backbone = on_meta(cells)
    torch.testing.assert_close(backbone.schedule(STEPS), scheduler.sigmas)


def test_taps_lie_on_the_grid_of_image_tokens(dev: Path) -> None:
    """After two double blocks, two single ones and the last; changing a patch changes its cell most, no text among
    them."""
    backbone = load(dev)
    assert backbone.tap_shapes == {"block_1": (32, 3, 4), "block_3": (32, 3, 4), "block_5": (32, 3, 4)}
    latents, sigma, conditioning = state(backbone)
    changed = latents.clone()
    changed[:, :, 2:4, 4:6] += 0.5
    with torch.no_grad():
        before, after = (backbone.predict(each, sigma, conditioning)[1] for each in (latents, changed))
    for name, tap in before.items():
        difference = (after[name] - tap).square().sum(1).flatten(1)
        assert difference.argmax(1).tolist() == [1 * 4 + 2] * len(PROMPTS), name


def test_a_size_that_does_not_fit_is_refused(dev: Path) -> None:
    """Tokens are 16 pixels per side."""
    with pytest.raises(ConfigError, match="multiples of 16"):
        load(dev, image_size=[40, 64])


# What is saved


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_what_is_saved_loads_in_plain_diffusers(dev: Path, adaptation: str, tmp_path: Path) -> None:
    """The folder's transformer predicts as the trained one, and the folder makes its image; so do the adapters alone on
    the base."""
    copy(dev, tmp_path / "base", FLUX)  # as `prepare` does it
    backbone = load(tmp_path / "base")
    backbone.adapt(PolicySettings.model_validate({"adaptation": adaptation, "lora_rank": 2}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    backbone.save(tmp_path / "saved")
    noise = noise_of(backbone)
    policy = Policy(backbone, KERNELS.build("cps", noise=0.0))
    ours = backbone.decode(rollout(policy, None, backbone.encode(PROMPTS), noise).clean)
    saved, base = pipeline_of(tmp_path / "saved"), pipeline_of(dev)
    assert np.abs(made(base, noise[:, 0]) - ours).max() > 5
    assert np.abs(made(saved, noise[:, 0]) - ours).max() <= 1
    assert (tmp_path / "saved" / folders.ADAPTER).exists() == (adaptation == "lora")
    if adaptation == "lora":
        base.load_lora_weights(tmp_path / "saved" / folders.ADAPTER)
        assert np.abs(made(base, noise[:, 0]) - ours).max() <= 1
    text = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert text["tokenizer_2"] == ["transformers", "T5TokenizerFast"]
    assert not [file for file in listing(tmp_path / "saved") if file.endswith((".model", ".bin"))]


# What it is loaded from

ACCEPTED: dict[str, dict[str, Any]] = {
    "dev": {},
    "schnell": {"schnell": True},
    "sharded": {"sharded": True},
    "fp16 alone": {"variant": "fp16"},
    "bf16 alone, sharded": {"variant": "bf16", "sharded": True},
    "linear time shift": {"time_shift_type": "linear"},
    "no quant_conv, as published": {"vae": {"use_quant_conv": False, "use_post_quant_conv": False}},
}


@pytest.mark.parametrize("case", sorted(ACCEPTED))
def test_each_form_of_the_folder_is_copied_whole_and_loads(case: str, tmp_path: Path) -> None:
    """T5's shards among them; the copy is also a whole pipeline for diffusers, with the same weights and tokens."""
    source = flux(tmp_path / "source", **ACCEPTED[case])
    index = json.loads((source / "model_index.json").read_text())
    index |= {"image_encoder": [None, None], "feature_extractor": [None, None], "_name_or_path": "/elsewhere"}
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "flux1-dev.safetensors").write_bytes(b"24 gigabytes")
    locate(str(source), FLUX)
    copy(source, tmp_path / "copy", FLUX)
    assert not [
        file for file in listing(tmp_path / "copy") if "16" in file or file.endswith(".model") or "/" not in file
    ][1:]
    backbone, pipeline = load(tmp_path / "copy"), pipeline_of(tmp_path / "copy")
    for module, theirs in ((backbone.module, pipeline.transformer), (backbone._t5, pipeline.text_encoder_2)):
        expected = theirs.state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(expected[key].float(), tensor), key
    text = ["a Red circle <extra_id_2> x"]
    ids = backbone._t5_tokenizer(text).input_ids
    assert ids == pipeline.tokenizer_2(text).input_ids
    assert ids[0][1] == backbone._t5_tokenizer(["red"]).input_ids[0][0]


def test_a_heun_scheduler_has_the_same_levels(dev: Path, tmp_path: Path) -> None:
    """The other class of the family; with a static shift."""
    folder = shutil.copytree(dev, tmp_path / "heun")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchHeunDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    even = torch.linspace(1, 1 / STEPS, STEPS)
    torch.testing.assert_close(load(folder).schedule(STEPS)[:-1], 3 * even / (1 + 2 * even))


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def unigram(file: Path, **settings: Any) -> None:
    described = json.loads(file.read_text())
    described["model"] |= settings
    file.write_text(json.dumps(described))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no T5": (lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2: is missing", "Fetch the whole pipeline"),
    "T5 is null": (
        lambda f: edit(f / "model_index.json", text_encoder_2=[None, None]),
        "text_encoder_2: is null or missing",
        "T5EncoderModel",
    ),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2: is missing", "Fetch"),
    "SentencePiece alone": (
        lambda f: (f / "tokenizer_2" / "tokenizer.json").unlink(),
        "tokenizer_2: has no tokenizer.json, but spiece.model",
        "save_pretrained",
    ),
    "CLIP in T5's place": (
        lambda f: edit(f / "text_encoder_2" / "config.json", architectures=["CLIPTextModel"], model_type="clip"),
        "text_encoder_2: config.json says CLIPTextModel",
        "Supported",
    ),
    "UMT5": (
        lambda f: edit(f / "text_encoder_2" / "config.json", model_type="umt5"),
        "text_encoder_2: config.json says model_type 'umt5'",
        "Supported",
    ),
    "pickled T5": (
        lambda f: (f / "text_encoder_2" / "model.safetensors").rename(f / "text_encoder_2" / "pytorch_model.bin"),
        "text_encoder_2: has no safetensors weights, but pytorch_model.bin",
        "use_safetensors=False",
    ),
    "another T5": (
        lambda f: edit(f / "transformer" / "config.json", joint_attention_dim=16),
        "transformer: joint_attention_dim is 16, and text_encoder_2 has a d_model of 24",
        "trained with",
    ),
    "another CLIP": (
        lambda f: edit(f / "transformer" / "config.json", pooled_projection_dim=16),
        "transformer: pooled_projection_dim is 16, and text_encoder has a hidden_size of 32",
        "trained with",
    ),
    "a smaller vocabulary": (
        lambda f: edit(f / "text_encoder_2" / "config.json", vocab_size=40),
        "tokenizer_2: has the token 48, and text_encoder_2 knows 40 tokens",
        "tokenizer that the text encoder was trained with",
    ),
    "more extra tokens": (
        lambda f: edit(f / "tokenizer_2" / "tokenizer_config.json", extra_ids=100),
        "tokenizer_2: has the token 144, and text_encoder_2 knows 69 tokens",
        "tokenizer that the text encoder was trained with",
    ),
    "a million extra tokens": (
        lambda f: edit(f / "tokenizer_2" / "tokenizer_config.json", extra_ids=10**6),
        "tokenizer_2: tokenizer_config.json: extra_ids is 1000000",
        "Fetch",
    ),
    "byte pairs": (
        lambda f: unigram(f / "tokenizer_2" / "tokenizer.json", type="BPE"),
        "tokenizer_2: tokenizer.json holds no Unigram model",
        "Fetch",
    ),
    "tokens without a score": (
        lambda f: unigram(f / "tokenizer_2" / "tokenizer.json", vocab=["a", "b"]),
        "tokenizer_2: tokenizer.json holds no Unigram model",
        "Fetch",
    ),
    "an empty token": (
        lambda f: unigram(f / "tokenizer_2" / "tokenizer.json", vocab=[["", 0.0]] * 3),
        "tokenizer_2: tokenizer.json holds no Unigram model",
        "Fetch",
    ),
    "a damaged table of characters": (
        lambda f: edit(f / "tokenizer_2" / "tokenizer.json", normalizer=table(b"\4\0\0\0\0\0\0\0")),
        "tokenizer_2: tokenizer.json: the normaliser's table of characters is damaged",
        "Fetch",
    ),
    "FLUX.1 Fill": (
        lambda f: flux(f, transformer={"in_channels": 384, "out_channels": 16}),
        "transformer: in_channels is 384 (FLUX.1 Fill has 384), and 2 x 2 cells of vae have 16",
        "FLUX.1 dev, schnell",
    ),
    "odd rotary axes": (
        lambda f: edit(f / "transformer" / "config.json", axes_dims_rope=[4, 4, 4]),
        "transformer: axes_dims_rope is [4, 4, 4]",
        "trained with",
    ),
    "a wide T5": (
        lambda f: edit(f / "text_encoder_2" / "config.json", d_ff=4096),
        "text_encoder_2: config.json: d_ff is 4,096, and no tensor of its weights is longer than 69",
        "belong to",
    ),
    "no shift": (
        lambda f: edit(f / "vae" / "config.json", shift_factor=None),
        "vae: shift_factor is null, and FluxPipeline adds it",
        "0.0 for none",
    ),
    "a scheduler of a UNet": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
        "DDIMScheduler is not known to be of the flow noise process",
        "FlowMatchEuler",
    ),
    "Kontext": (
        lambda f: edit(f / "model_index.json", _class_name="FluxKontextPipeline"),
        "says FluxKontextPipeline: FLUX.1 Kontext, which edits an image, which is not supported",
        "FluxPipeline",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_folder_that_does_not_fit_is_refused(dev: Path, case: str, tmp_path: Path) -> None:
    """One problem, which names the part and the remedy."""
    change, problem, remedy = REFUSED[case]
    folder = shutil.copytree(dev, tmp_path / "model")
    change(folder)
    with pytest.raises(ConfigError) as caught:
        locate(str(folder), FLUX)
    (found,) = caught.value.problems
    assert problem in found.problem
    assert remedy in found.remedy


def test_no_pattern_of_the_folder_reaches_the_library(dev: Path, tmp_path: Path) -> None:
    """Of T5's tokenizer.json only tokens, scores and the table of characters are used."""
    folder = shutil.copytree(dev, tmp_path / "model")
    file = folder / "tokenizer_2" / "tokenizer.json"
    described = json.loads(file.read_text())
    described["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"})
    described["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a|a)*$"},
        "behavior": "Removed",
        "invert": True,
    }
    described["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(described))
    assert load(folder)._t5_tokenizer(PROMPTS).input_ids == load(dev)._t5_tokenizer(PROMPTS).input_ids


# The real model, without its weights

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""Of FLUX.1 dev."""


class Tokenizer:
    """What is asked of one before it is used."""

    model_max_length = 512


class OnMeta(FluxBackbone):
    """The published configuration: shapes without memory."""

    FOLDER: ClassVar[Path]
    PARTS: ClassVar[dict[str, Any]] = {
        "transformer": lambda: FluxTransformer2DModel(**TRANSFORMER),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP)),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(**T5)),
        "tokenizer": Tokenizer,
        "tokenizer_2": Tokenizer,
    }

    def _load(self, name: str, dtype: torch.dtype | None = None) -> Any:
        with torch.device("meta"):
            return self.PARTS[name]()


@pytest.fixture(autouse=True)
def scheduler(tmp_path: Path) -> None:
    """The folder that `on_meta` reads: of the published model it needs the scheduler's file alone."""
    FlowMatchEulerDiscreteScheduler(**DYNAMIC).save_pretrained(tmp_path / "scheduler")
    OnMeta.FOLDER = tmp_path


def on_meta(cells: tuple[int, int] | None = None) -> OnMeta:
    size = [] if cells is None else [8 * side for side in cells]
    return OnMeta(FluxSettings(image_size=size), OnMeta.FOLDER, torch.device("meta"))


def test_the_published_model_has_the_shapes_that_are_announced() -> None:
    """FLUX.1 dev at 1,024 pixels: 11.9 billion parameters, 512 tokens of 4,096 numbers, three taps on a grid of 64 x
    64; a critic on them; a forward pass of those shapes."""
    backbone = on_meta()
    assert sum(each.numel() for each in backbone.module.parameters()) == 11_901_408_320
    assert sum(each.numel() for each in backbone._t5.parameters()) == 4_762_310_656
    assert (backbone.latent_shape, backbone.image_size) == ((16, 128, 128), (1024, 1024))
    assert (backbone.text_width, backbone.max_tokens) == (4096, 512)
    assert backbone.tap_shapes == dict.fromkeys(("block_18", "block_37", "block_56"), (3072, 64, 64))
    latents = torch.zeros(2, 16, 128, 128, device="meta")
    conditioning = Conditioning(torch.zeros(2, 512, 4096, device="meta"), torch.zeros(2, 768, device="meta"))
    sigma = torch.ones(2, device="meta")
    with torch.no_grad():
        prediction, taps = backbone.predict(latents, sigma, conditioning)
    assert prediction.clean.shape == latents.shape
    assert {name: tuple(tap.shape[1:]) for name, tap in taps.items()} == backbone.tap_shapes
    with torch.device("meta"):
        critic = Critic(backbone, ("reward",), CriticSettings())
        features = critic.features(latents, prediction, taps)
        assert critic(features, sigma, conditioning).shape == (2, 1)


# What runs on it


@pytest.mark.parametrize("kernel", [CPS(0.9), FlowSDE(0.7)], ids=repr)
def test_the_card_call_makes_what_is_served(dev: Path, kernel: Any, tmp_path: Path) -> None:
    """In plain diffusers, from the folder and from its adapter on the base, within one grey level: with packed latents,
    the size, the guidance and the number of tokens."""
    copy(dev, tmp_path / "base", FLUX)
    backbone, folder = load(tmp_path / "base", distilled_guidance=2.0, text_tokens=12), tmp_path / "export"
    backbone.adapt(PolicySettings(adaptation="lora", lora_rank=2))
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    backbone.save(folder)
    policy = Policy(backbone, kernel)
    expected = served(policy, STEPS)
    assert expected.std() > 5
    code = usage(policy, folder, STEPS, PROMPT, 5)
    assert np.abs(drawn(code, folder) - expected).max() <= 1
    base = tmp_path / "base"
    adapter = usage(policy, folder, STEPS, PROMPT, 5, base_of(str(base))).replace('"base"', repr(str(base)))
    assert np.abs(drawn(adapter, folder) - expected).max() <= 1


@pytest.mark.parametrize("size", [[48, 64], []], ids=str)
def test_what_a_run_needs_is_counted_for_its_size(dev: Path, size: list[int]) -> None:
    """Latents, images, taps and text of the backbone that it loads, of 1,024 pixels where no size is given."""
    folder = {"use": "flux", "source": str(dev), "image_size": size, "text_tokens": 12}
    overrides = [f"backbone={json.dumps(folder)}", "kernel.use=cps"]
    config = resolve_all(recipe_fields("shapes-unet-smoke", "", overrides)).config
    model = read_model(dev, config)
    found = model.sizes
    backbone = load(dev, image_size=size, text_tokens=12)
    height, width = backbone.image_size
    assert (height, width) == (tuple(size) or (1024, 1024))
    assert found.latent == math.prod(backbone.latent_shape)
    assert found.image == 3 * height * width
    assert found.channels == sum(shape[0] for shape in backbone.tap_shapes.values())
    assert found.taps == sum(shape[0] * min(shape[1] * shape[2], 256) for shape in backbone.tap_shapes.values())
    assert found.text >= 12 * backbone.text_width  # counted with as many tokens as there may be
    assert found.units == (LONGEST + height * width // 16**2) * 32 * 6
    assert model.network == sum(each.numel() for each in backbone.module.parameters())
    backbone.adapt(PolicySettings(adaptation="lora", lora_rank=config.policy.lora_rank))
    assert model.adapters == sum(each.numel() for each in backbone.module.parameters() if each.requires_grad)


@pytest.mark.parametrize("method", STEERING)
def test_every_steering_method_runs_on_it(dev: Path, method: str) -> None:
    """Steered latents are finite and differ from the plain ones; strength 0 is bitwise the plain rollout."""
    backbone = load(dev)
    policy = Policy(backbone, KERNELS.build("cps"))
    critic = Critic(backbone, ("reward",), CriticSettings()).eval()
    torch.nn.init.normal_(critic.heads.weight, generator=torch.Generator().manual_seed(0))
    critic.requires_grad_(False)
    conditioning, uniforms = backbone.encode(PROMPTS), torch.full((len(PROMPTS), STEPS), 0.9)
    noise = noise_of(backbone, 4 * len(PROMPTS)).unflatten(0, (len(PROMPTS), 4))

    def steered(weight: float) -> torch.Tensor:
        steering = STEERING.build(method, torch.full((1,), weight), 4)
        return steered_rollout(policy, critic, conditioning, noise, SteeringRun(steering, uniforms)).latents

    rows = torch.arange(len(PROMPTS)).repeat_interleave(4)  # as many together as the particles
    plain = rollout(policy, critic, conditioning.rows(rows), noise.flatten(0, 1)).latents[::4]
    assert torch.equal(steered(0.0), plain)
    found = steered(50.0)
    assert bool(found.isfinite().all())
    assert not torch.equal(found, plain)


def test_the_card_has_no_call_for_classifier_free_guidance(dev: Path, schnell: Path, tmp_path: Path) -> None:
    """`guidance_scale` of FluxPipeline is the distilled guidance, also where the transformer ignores it."""
    for folder in (dev, schnell):
        backbone = load(folder, image_size=[*SIZE])
        backbone.save(tmp_path / folder.name)
        assert usage(Policy(backbone, CPS(0.9)), tmp_path / folder.name, 10, PROMPT, 5)
        assert not usage(Policy(guided(backbone, 3.0), CPS(0.9)), tmp_path / folder.name, 10, PROMPT, 5)

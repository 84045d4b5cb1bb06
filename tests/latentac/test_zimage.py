"""Z-Image: it is diffusers' ZImagePipeline, in every form of its folder, trained, saved and steered."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from latentac.backbones import Denoiser, load_backbone
from latentac.backbones.guided import guided
from latentac.backbones.layout import copy, listing
from latentac.backbones.source import locate
from latentac.backbones.zimage import ZImageBackbone, ZImageSettings
from latentac.backbones.zimage_layout import LONGEST, ZIMAGE
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
from latentac.system.modelfiles import chat
from tests.latentac.test_export import PROMPT, drawn, served
from tests.latentac.zimage_miniature import TEMPLATE, zimage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares and " + "a green triangle above " * 6, ""]
"""Of 22, 51 and 19 tokens, so that diffusers pads one of them to 64 and the others to 32."""
SIZE = [48, 64]
TOKENS = 96
STEPS = 4


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return zimage(tmp_path_factory.mktemp("zimage") / "turbo")


def load(folder: Path, **own: Any) -> Any:
    extension = Extension.model_validate({"use": "zimage", "image_size": SIZE, "text_tokens": TOKENS} | own)
    return load_backbone(extension, folder, CPU)


def noise_of(backbone: Denoiser, images: int = len(PROMPTS), steps: int = STEPS) -> torch.Tensor:
    return noise_for([(index,) for index in range(images)], 0, steps, backbone.latent_shape)


def state(backbone: Denoiser) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    return noise_of(backbone)[:, 0], backbone.schedule(STEPS)[1].expand(len(PROMPTS)), backbone.encode(PROMPTS)


def pipeline_of(folder: Path) -> Any:
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made(pipeline: Any, latents: torch.Tensor, **settings: Any) -> np.ndarray:
    """Images of plain diffusers as integers, [B, H, W, 3]."""
    call = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": STEPS, "max_sequence_length": TOKENS}
    images = pipeline(
        [*PROMPTS], latents=latents, output_type="np", **(call | {"guidance_scale": 0.0} | settings)
    ).images
    return (images * 255).round().astype(int)


# What it computes


@pytest.mark.parametrize("size", [[48, 64], [32, 32]], ids=str)
@pytest.mark.parametrize(
    "own", [{}, {"precision": "bfloat16"}, {"gradient_checkpointing": True}, {"text_tokens": 32}], ids=str
)
def test_the_contract_of_a_backbone_holds(turbo: Path, own: dict[str, Any], size: list[int]) -> None:
    """Also in half precision, with recomputed activations, and for images that are not square."""
    backbone: Any = testing.check_backbone("zimage", turbo, image_size=size, **own)
    assert backbone.image_size == tuple(size)
    assert backbone.latent_shape == (4, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_rollout_without_noise_is_what_plain_diffusers_makes(turbo: Path, guidance: float) -> None:
    """The same latents, number of steps and guidance, in one grey level, for prompts of different lengths. The scale of
    diffusers' pipeline is less by one: it adds what the prompt changes to the prediction with the prompt."""
    backbone = load(turbo)
    noise = noise_of(backbone)
    policy = Policy(guided(backbone, 1 + guidance), KERNELS.build("cps", noise=0.0))
    ours = backbone.decode(rollout(policy, None, backbone.encode(PROMPTS), noise).clean)
    theirs = made(pipeline_of(turbo), noise[:, 0], guidance_scale=guidance)
    assert ours.std() > 5
    assert np.abs(theirs - ours).max() <= 1


def test_it_predicts_as_the_forward_of_diffusers(turbo: Path) -> None:
    """The velocity of each row and its gradient by the latents, to the rounding of float32."""
    backbone = load(turbo)
    latents, sigma, conditioning = state(backbone)
    found, expected = (latents.clone().requires_grad_() for _ in range(2))
    ours = backbone._network(found, sigma, conditioning)
    captions, _ = pipeline_of(turbo).encode_prompt(
        [*PROMPTS], do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    rows = backbone.module([row[:, None] for row in expected], 1 - sigma, captions, return_dict=False)[0]
    theirs = -torch.stack(rows).squeeze(2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
    for latent, output in ((found, ours), (expected, theirs)):
        (output * weights).sum().backward()
        assert latent.grad is not None
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_row_does_not_depend_on_the_other_prompts(turbo: Path, precision: str) -> None:
    """Bitwise: a prompt of another length beside it changes no shape. So the ratio stays 1 in any batch of as many
    rows."""
    backbone = load(turbo, precision=precision)
    latents, sigma, conditioning = state(backbone)
    short = conditioning.rows(torch.tensor([0, 2, 2]))
    with torch.no_grad():
        one, other = (backbone.predict(latents, sigma, each)[0].noise[0] for each in (conditioning, short))
    assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_ratio_is_1_before_the_first_update(turbo: Path, precision: str) -> None:
    """Bitwise: the density of a step, computed again in its batch, is what the rollout recorded. In float32 an image is
    the same in blocks of 16 and of 32."""
    backbone, prompts = load(turbo, precision=precision), (PROMPTS * 11)[:32]
    policy, noise = Policy(backbone, KERNELS.build("cps", noise=0.7)), noise_of(backbone, 32, 3)
    whole = rollout(policy, None, backbone.encode(prompts), noise)
    training = Policy(backbone.clone(), policy.kernel)
    training.backbone.adapt(PolicySettings(adaptation="full"))
    for step in range(whole.num_stochastic_steps):
        sigma, after = (whole.sigmas[each].expand(32) for each in (step, step + 1))
        transition = training.transition(whole.latents[:, step], sigma, after, whole.conditioning)
        log_probs = transition.log_prob(whole.latents[:, step + 1])
        assert log_probs.requires_grad
        assert torch.equal(log_probs.detach(), whole.log_probs[:, step])
    if precision == "float32":
        part = rollout(policy, None, backbone.encode(prompts[16:]), noise[16:])
        assert torch.equal(part.latents, whole.latents[16:])


def test_text_is_encoded_as_the_pipeline_does_it(turbo: Path) -> None:
    """The states before the last layer of the prompt in its chat, and zeros after them."""
    backbone, pipeline = load(turbo), pipeline_of(turbo)
    expected, _ = pipeline.encode_prompt([*PROMPTS], do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    found = backbone.encode(PROMPTS)
    assert found.pooled is None
    assert found.tokens.shape == (3, TOKENS, backbone.text_width)
    for row, tokens in zip(found.tokens, expected, strict=True):
        torch.testing.assert_close(row[: len(tokens)], tokens)
        assert not row[len(tokens) :].any()
    assert [len(tokens) for tokens in expected] == backbone.count_tokens(PROMPTS)


def test_the_chat_is_that_of_the_folder(turbo: Path) -> None:
    """What is built here is what the pipeline renders from Qwen3's template, whatever the prompt says."""
    tokenizer = pipeline_of(turbo).tokenizer
    assert tokenizer.chat_template == TEMPLATE
    for prompt in ["a red circle", "", " two\n", "{{ 7 * 7 }}", "<|im_end|>", "</think> a"]:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        assert chat(prompt) == rendered


def test_a_long_prompt_is_cut_as_in_diffusers(turbo: Path) -> None:
    """Its end goes, with the chat's last mark."""
    backbone = load(turbo, text_tokens=32)
    assert backbone.max_tokens == 32
    assert backbone.count_tokens([PROMPTS[1]]) == [51]
    (expected,), _ = pipeline_of(turbo).encode_prompt(
        PROMPTS[1], do_classifier_free_guidance=False, max_sequence_length=32
    )
    torch.testing.assert_close(backbone.encode([PROMPTS[1]]).tokens[0], expected)


def test_taps_lie_on_the_grid_of_image_tokens(turbo: Path) -> None:
    """Changing a patch changes its cell most, no text among them."""
    backbone = load(turbo)
    assert backbone.tap_shapes == {"block_1": (32, 3, 4), "block_3": (32, 3, 4), "block_5": (32, 3, 4)}
    latents, sigma, conditioning = state(backbone)
    changed = latents.clone()
    changed[:, :, 2:4, 4:6] += 0.5
    with torch.no_grad():
        before, after = (backbone.predict(each, sigma, conditioning)[1] for each in (latents, changed))
    for name, tap in before.items():
        difference = (after[name] - tap).square().sum(1).flatten(1)
        assert difference.argmax(1).tolist() == [1 * 4 + 2] * len(PROMPTS), name


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ({"image_size": [40, 64]}, "multiples of 16"),
        ({"image_size": [2048, 64]}, "more than 1024 x 1024 pixels"),
        ({"text_tokens": 33}, "multiple of 32"),
    ],
    ids=str,
)
def test_a_size_that_does_not_fit_is_refused(turbo: Path, own: dict[str, Any], problem: str) -> None:
    """Tokens are 16 pixels per side, and the transformer knows places up to a number of them."""
    with pytest.raises(ConfigError, match=problem):
        load(turbo, **own)


# What is saved


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_what_is_saved_loads_in_plain_diffusers(turbo: Path, adaptation: str, tmp_path: Path) -> None:
    """The folder's transformer predicts as the trained one, and the folder makes its image; so do the adapters alone on
    the base."""
    copy(turbo, tmp_path / "base", ZIMAGE)  # as `prepare` does it
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
    saved, base = pipeline_of(tmp_path / "saved"), pipeline_of(turbo)
    assert np.abs(made(base, noise[:, 0]) - ours).max() > 5
    assert np.abs(made(saved, noise[:, 0]) - ours).max() <= 1
    assert (tmp_path / "saved" / folders.ADAPTER).exists() == (adaptation == "lora")
    if adaptation == "lora":
        base.load_lora_weights(tmp_path / "saved" / folders.ADAPTER)
        assert np.abs(made(base, noise[:, 0]) - ours).max() <= 1
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "Qwen2Tokenizer"]
    assert "tokenizer/tokenizer.json" not in listing(tmp_path / "saved")


def test_the_template_of_a_folder_is_never_rendered(turbo: Path, tmp_path: Path) -> None:
    """Neither here nor in what is copied and saved, whichever of its places it is in."""
    folder = shutil.copytree(turbo, tmp_path / "model")
    edit(folder / "tokenizer" / "tokenizer_config.json", chat_template="{{ range(10 ** 9) | join }}")
    (folder / "tokenizer" / "chat_template.jinja").write_text("{% for a in range(10 ** 9) %}a{% endfor %}")
    copy(folder, tmp_path / "copy", ZIMAGE)
    backbone = load(tmp_path / "copy")
    assert torch.equal(backbone.encode(PROMPTS).tokens, load(turbo).encode(PROMPTS).tokens)
    assert torch.equal(load(folder).encode(PROMPTS).tokens, load(turbo).encode(PROMPTS).tokens)
    backbone.save(tmp_path / "saved")
    for place in ("copy", "saved"):
        assert "tokenizer/chat_template.jinja" not in listing(tmp_path / place)
        tokenizer = pipeline_of(tmp_path / place).tokenizer
        settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        assert tokenizer.apply_chat_template([{"role": "user", "content": "{{ a"}], **settings) == chat("{{ a")


# What it is loaded from

ACCEPTED: dict[str, dict[str, Any]] = {
    "turbo": {},
    "dynamic shift": {"use_dynamic_shifting": True},
    "the encoder alone": {"whole": False},
    "sharded": {"sharded": True},
    "fp16 alone": {"variant": "fp16"},
    "bf16 alone, sharded": {"variant": "bf16", "sharded": True},
    "no quant_conv, as published": {"vae": {"use_quant_conv": False, "use_post_quant_conv": False}},
}


@pytest.mark.parametrize("case", sorted(ACCEPTED))
def test_each_form_of_the_folder_is_copied_whole_and_loads(case: str, tmp_path: Path) -> None:
    """The encoder's shards among them; the copy is also a whole pipeline for diffusers, with the same weights and
    tokens."""
    source = zimage(tmp_path / "source", **ACCEPTED[case])
    (source / "z_image.safetensors").write_bytes(b"12 gigabytes")
    locate(str(source), ZIMAGE)
    copy(source, tmp_path / "copy", ZIMAGE)
    assert not [file for file in listing(tmp_path / "copy") if "16" in file or "/" not in file][1:]
    backbone, pipeline = load(tmp_path / "copy"), pipeline_of(tmp_path / "copy")
    for module, theirs in ((backbone.module, pipeline.transformer), (backbone._text_encoder, pipeline.text_encoder)):
        expected = theirs.state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(expected[key].float(), tensor), key
    text = ["a Red circle <think> <|im_start|> \u00e9\u4e2d x"]
    assert backbone._tokenizer(text).input_ids == pipeline.tokenizer(text).input_ids
    assert backbone._tokenizer(text).input_ids == Qwen2Tokenizer.from_pretrained(source / "tokenizer")(text).input_ids


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("settings", [{"pad_token": None}, {"unk_token": None}, {"model_input_names": ["input_ids"]}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_settings_that_would_make_each_prompt_fail_are_not_read(
    turbo: Path, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    """They are left out, so that the tokenizer's class has its own. Z-Image pads, and reads the mask."""
    shutil.copytree(turbo, tmp_path / "turbo")
    file = tmp_path / "turbo" / "tokenizer" / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | settings))
    assert torch.equal(load(tmp_path / "turbo").encode(PROMPTS).tokens, load(turbo).encode(PROMPTS).tokens)


def _without_marks(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer_config.json"
    edit(file, added_tokens_decoder={}, additional_special_tokens=[], eos_token="a", pad_token="a", unk_token="a")


def _added(number: int) -> Any:
    def change(folder: Path) -> None:
        file = folder / "tokenizer" / "tokenizer_config.json"
        known = json.loads(file.read_text())["added_tokens_decoder"]
        edit(file, added_tokens_decoder=known | {str(number): {"content": "<cat>"}})

    return change


REFUSED: dict[str, tuple[Any, str, str]] = {
    "no encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder: is missing", "Fetch"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer: is missing", "Fetch"),
    "tokenizer.json alone": (
        lambda f: (f / "tokenizer" / "vocab.json").unlink(),
        "tokenizer: has no vocab.json with merges.txt, but tokenizer.json",
        "merges.txt",
    ),
    "another tokenizer": (
        lambda f: edit(f / "tokenizer" / "tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
        "tokenizer: tokenizer_config.json says tokenizer_class 'LlamaTokenizer'",
        "Supported",
    ),
    "a tokenizer without a chat's marks": (_without_marks, "tokenizer: has no token '<|im_start|>'", "Fetch"),
    "a token that the encoder does not know": (_added(5000), "tokenizer: has the token 5000", "trained with"),
    "a token for padding that is not there": (
        lambda f: edit(f / "tokenizer" / "tokenizer_config.json", pad_token="<none>"),
        "tokenizer: has no token '<none>', its pad_token",
        "Fetch",
    ),
    "a token for padding that is not there, in its second place": (
        lambda f: (f / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": {"content": "<none>"}}'),
        "tokenizer: has no token '<none>', its pad_token",
        "Fetch",
    ),
    "settings that would be checked and not be read": (
        lambda f: edit(f / "text_encoder" / "config.json", text_config={}),
        "text_encoder: config.json has a text_config, which only CLIP's has",
        "Fetch",
    ),
    "CLIP in its place": (
        lambda f: edit(f / "text_encoder" / "config.json", architectures=["CLIPTextModel"], model_type="clip"),
        "text_encoder: config.json says CLIPTextModel",
        "Supported",
    ),
    "Qwen2.5-VL": (
        lambda f: edit(f / "text_encoder" / "config.json", architectures=None, model_type="qwen2_5_vl"),
        "text_encoder: config.json says model_type 'qwen2_5_vl'",
        "Supported",
    ),
    "pickled": (
        lambda f: (f / "text_encoder" / "model.safetensors").rename(f / "text_encoder" / "pytorch_model.bin"),
        "text_encoder: has no safetensors weights, but pytorch_model.bin",
        "use_safetensors=False",
    ),
    "another encoder": (
        lambda f: edit(f / "transformer" / "config.json", cap_feat_dim=16),
        "transformer: cap_feat_dim is 16, and text_encoder has a hidden_size of 24",
        "trained with",
    ),
    "one layer of text": (
        lambda f: edit(f / "text_encoder" / "config.json", num_hidden_layers=1),
        "text_encoder: num_hidden_layers is 1",
        "trained with",
    ),
    "Omni": (
        lambda f: edit(f / "transformer" / "config.json", siglip_feat_dim=1152),
        "transformer: siglip_feat_dim is 1152",
        "Z-Image-Turbo",
    ),
    "other patches": (
        lambda f: edit(f / "transformer" / "config.json", all_patch_size=[1]),
        "transformer: all_patch_size has no 2",
        "Z-Image-Turbo",
    ),
    "other latents": (
        lambda f: edit(f / "transformer" / "config.json", in_channels=16),
        "transformer: in_channels is 16, and vae has latent_channels 4",
        "Z-Image-Turbo",
    ),
    "odd rotary axes": (
        lambda f: edit(f / "transformer" / "config.json", axes_dims=[4, 4, 4]),
        "transformer: axes_dims is [4, 4, 4]",
        "trained with",
    ),
    "few places": (
        lambda f: edit(f / "transformer" / "config.json", axes_lens=[512, 64, 64]),
        "transformer: axes_lens is [512, 64, 64], and must be three numbers, the first at least 514",
        "trained with",
    ),
    "a million layers": (
        lambda f: edit(f / "transformer" / "config.json", n_layers=10**6),
        "transformer: config.json: n_layers is 1000000, and must be a whole number from 1 to 128",
        "trained with",
    ),
    "a wide transformer": (
        lambda f: edit(f / "transformer" / "config.json", dim=8192, n_heads=512),
        "transformer: config.json: dim is 8,192, and no tensor of its weights is longer than 1,024",
        "belong to",
    ),
    "no shift": (
        lambda f: edit(f / "vae" / "config.json", shift_factor=None),
        "vae: shift_factor is null, and ZImagePipeline adds it",
        "0.0 for none",
    ),
    "a scheduler of a UNet": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
        "DDIMScheduler is not known to be of the flow noise process",
        "FlowMatchEuler",
    ),
    "the pipeline of Omni": (
        lambda f: edit(f / "model_index.json", _class_name="ZImageOmniPipeline"),
        "says ZImageOmniPipeline: Z-Image-Omni, which takes images beside the text, which is not supported",
        "ZImagePipeline",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_folder_that_does_not_fit_is_refused(turbo: Path, case: str, tmp_path: Path) -> None:
    """One problem, which names the part and the remedy."""
    change, problem, remedy = REFUSED[case]
    folder = shutil.copytree(turbo, tmp_path / "model")
    change(folder)
    with pytest.raises(ConfigError) as caught:
        locate(str(folder), ZIMAGE)
    (found,) = caught.value.problems
    assert problem in found.problem
    assert remedy in found.remedy


# The real model, without its weights

TRANSFORMER = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
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
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
"""Of Z-Image-Turbo."""


class OnMeta(ZImageBackbone):
    """The published configuration: shapes without memory."""

    FOLDER: ClassVar[Path]
    PARTS: ClassVar[dict[str, Any]] = {
        "transformer": lambda: ZImageTransformer2DModel(**TRANSFORMER),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: Qwen3Model(Qwen3Config(**QWEN3)),
        "tokenizer": lambda: None,
    }

    def _load(self, name: str, dtype: torch.dtype | None = None) -> Any:
        with torch.device("meta"):
            return self.PARTS[name]()


def test_the_published_model_has_the_shapes_that_are_announced(tmp_path: Path) -> None:
    """Z-Image-Turbo at 1,024 pixels: 6.2 billion parameters, 512 tokens of 2,560 numbers, three taps on a grid of 64 x
    64; a critic on them; a forward pass of those shapes."""
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "scheduler")
    OnMeta.FOLDER = tmp_path
    backbone = OnMeta(ZImageSettings(), tmp_path, torch.device("meta"))
    assert sum(each.numel() for each in backbone.module.parameters()) == 6_154_908_736
    assert sum(each.numel() for each in backbone._text_encoder.parameters()) == 4_022_468_096
    assert (backbone.latent_shape, backbone.image_size) == ((16, 128, 128), (1024, 1024))
    assert (backbone.text_width, backbone.max_tokens) == (2560, 512)
    assert backbone.tap_shapes == dict.fromkeys(("block_9", "block_19", "block_29"), (3840, 64, 64))
    latents = torch.zeros(2, 16, 128, 128, device="meta")
    conditioning = Conditioning(torch.zeros(2, 512, 2560, device="meta"))
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


@pytest.mark.parametrize("scale", [1.0, 3.3])
@pytest.mark.parametrize("kernel", [CPS(0.9), FlowSDE(0.7)], ids=repr)
def test_the_card_call_makes_what_is_served(turbo: Path, kernel: Any, scale: float, tmp_path: Path) -> None:
    """In plain diffusers, from the folder and from its adapter on the base, within one grey level: with the size, the
    number of tokens, and the guidance as that pipeline counts it."""
    copy(turbo, tmp_path / "base", ZIMAGE)
    backbone, folder = load(tmp_path / "base", text_tokens=64), tmp_path / "export"
    backbone.adapt(PolicySettings(adaptation="lora", lora_rank=2))
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    backbone.save(folder)
    policy = Policy(guided(backbone, scale), kernel)
    expected = served(policy, STEPS)
    assert expected.std() > 5
    code = usage(policy, folder, STEPS, PROMPT, 5)
    assert f"guidance_scale={0.0 if scale == 1 else 2.3}," in code
    assert np.abs(drawn(code, folder) - expected).max() <= 1
    base = tmp_path / "base"
    adapter = usage(policy, folder, STEPS, PROMPT, 5, base_of(str(base))).replace('"base"', repr(str(base)))
    assert np.abs(drawn(adapter, folder) - expected).max() <= 1


@pytest.mark.parametrize("size", [[48, 64], []], ids=str)
def test_what_a_run_needs_is_counted_for_its_size(turbo: Path, size: list[int]) -> None:
    """Latents, images, taps and text of the backbone that it loads, of 1,024 pixels where no size is given."""
    folder = {"use": "zimage", "source": str(turbo), "image_size": size, "text_tokens": 64}
    overrides = [f"backbone={json.dumps(folder)}", "kernel.use=cps"]
    config = resolve_all(recipe_fields("shapes-unet-smoke", "", overrides)).config
    model = read_model(turbo, config)
    found = model.sizes
    backbone = load(turbo, image_size=size, text_tokens=64)
    height, width = backbone.image_size
    assert (height, width) == (tuple(size) or (1024, 1024))
    assert found.latent == math.prod(backbone.latent_shape)
    assert found.image == 3 * height * width
    assert found.channels == sum(shape[0] for shape in backbone.tap_shapes.values())
    assert found.taps == sum(shape[0] * min(shape[1] * shape[2], 256) for shape in backbone.tap_shapes.values())
    assert found.text >= 64 * backbone.text_width  # counted with as many tokens as there may be
    assert found.units == (LONGEST + height * width // 16**2) * 32 * 7
    assert model.network == sum(each.numel() for each in backbone.module.parameters())
    backbone.adapt(PolicySettings(adaptation="lora", lora_rank=config.policy.lora_rank))
    assert model.adapters == sum(each.numel() for each in backbone.module.parameters() if each.requires_grad)


@pytest.mark.parametrize("method", STEERING)
def test_every_steering_method_runs_on_it(turbo: Path, method: str) -> None:
    """Steered latents are finite and differ from the plain ones; strength 0 is bitwise the plain rollout."""
    backbone = load(turbo)
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # torch.compile warns within itself, and fails where warnings are errors
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_network_compiled_as_a_whole_computes_the_same(turbo: Path) -> None:
    """Prediction, taps and gradients, but for rounding."""
    found = []
    for mode in ("none", "whole"):
        backbone = load(turbo, compile=mode)
        backbone.module.requires_grad_(True)
        prediction, taps = backbone.predict(*state(backbone))
        prediction.noise.square().mean().backward()
        gradients = [weights.grad.flatten() for weights in backbone.module.parameters() if weights.grad is not None]
        found.append([prediction.noise, *taps.values(), torch.cat(gradients)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)

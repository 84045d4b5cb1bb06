"""Stable Diffusion XL: the contract, parity with diffusers' own pipeline, the folders that users have, and the size of
the published model."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentac.backbones import Denoiser, load_backbone
from latentac.backbones.guided import Guided, guided
from latentac.backbones.layout import copy, listing
from latentac.backbones.sdxl import SDXLBackbone
from latentac.backbones.source import locate
from latentac.backbones.stable_diffusion_xl import SDXL
from latentac.config.learning import Critic as CriticSettings
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.critic import Critic
from latentac.method.diffusion import DDIM
from latentac.method.randomness import noise_for
from latentac.runs.testing import check_backbone
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout, steered_rollout
from latentac.sampling.snippet import usage
from latentac.sampling.steering import STEERING
from latentac.sampling.steering.run import SteeringRun
from latentac.system import folders
from latentac.system.errors import ConfigError, Problem
from tests.latentac import miniatures
from tests.latentac.test_export import PROMPT, drawn, served

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square"]
STEPS = 5
INDEX, UNET, VAE = "model_index.json", "unet/config.json", "vae/config.json"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.sdxl(tmp_path_factory.mktemp("sdxl") / "model")


def load(folder: Path, **own: Any) -> Any:
    return load_backbone(Extension.model_validate({"use": "sdxl", **own}), folder, CPU)


def noise_of(backbone: Denoiser) -> Tensor:
    """[B, K+1, *latent]"""
    return noise_for([(place,) for place in range(len(PROMPTS))], 0, STEPS, backbone.latent_shape)


def sampled(backbone: Denoiser, scale: float = 1.0) -> Tensor:
    """Clean latents of a rollout without noise."""
    policy = Policy(guided(backbone, scale), KERNELS.build("ddim", noise=0.0))
    return rollout(policy, None, backbone.encode(PROMPTS), noise_of(backbone)).clean


def by_diffusers(pipeline: Any, backbone: Denoiser, **call: Any) -> np.ndarray:
    """Images of diffusers' own pipeline from the same noise, as integers."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(PROMPTS, latents=noise_of(backbone)[:, 0], output_type="np", **call).images
    rounded: np.ndarray = (images * 255).round().astype(int)
    return rounded


def some_state(backbone: Denoiser) -> tuple[Tensor, Tensor, Any]:
    return noise_of(backbone)[:, 0], backbone.schedule(STEPS)[1].expand(len(PROMPTS)), backbone.encode(PROMPTS)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"precision": "bfloat16"},
        {"gradient_checkpointing": True},
        {"image_size": [48, 80]},
        {"image_size": [40, 72], "precision": "bfloat16", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_contract_holds(folder: Path, own: dict[str, Any]) -> None:
    """In each precision, with recomputed activations, and for images that are not square."""
    backbone: Any = check_backbone("sdxl", folder, **own)
    height, width = own.get("image_size", [64, 64])
    assert backbone.image_size == (height, width)
    assert backbone.decode(torch.zeros(1, *backbone.latent_shape)).shape == (1, height, width, 3)
    assert backbone.encode(PROMPTS).pooled.dtype == backbone.dtype


def test_recomputed_activations_change_no_gradient(folder: Path) -> None:
    """Gradients of the weights and of the latents, through prediction and taps."""
    found = []
    for own in ({}, {"gradient_checkpointing": True}):
        backbone = load(folder, **own)
        backbone.adapt(PolicySettings())
        latents, sigma, conditioning = some_state(backbone)
        latents.requires_grad_()
        prediction, taps = backbone.predict(latents, sigma, conditioning)
        loss = prediction.noise.square().sum() + sum(tap.square().mean() for tap in taps.values())
        loss.backward()
        found.append([latents.grad, *(parameter.grad for parameter in backbone.module.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("size", [[64, 64], [48, 80]], ids=str)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_rollout_without_noise_is_diffusers_own(
    tmp_path: Path, prediction_type: str, size: list[int], scale: float
) -> None:
    """With the scheduler of the folder, Euler's, at the same timesteps: within one grey level, with and without
    guidance, whose unconditional part has zeros in place of text. The network is told the image's size: at another one
    the image differs."""
    miniatures.sdxl(tmp_path, prediction_type=prediction_type)
    backbone = load(tmp_path, image_size=size)
    ours = backbone.decode(sampled(backbone, scale)).astype(int)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    trailing = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    trailing.set_timesteps(STEPS)
    call = {"timesteps": trailing.timesteps.tolist(), "guidance_scale": scale, "height": size[0], "width": size[1]}
    theirs = by_diffusers(pipeline, backbone, **call)
    assert theirs.shape == ours.shape == (len(PROMPTS), *size, 3)
    assert np.abs(theirs - ours).max() <= 1
    assert ours.std() > 5
    other = by_diffusers(pipeline, backbone, **call, original_size=(8, 8), crops_coords_top_left=(4, 0))
    assert np.abs(other - ours).max() > 1


@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_begins_where_the_folder_says(tmp_path: Path, zeros: bool) -> None:
    """At zeros with `force_zeros_for_empty_prompt`, otherwise at the empty prompt; an export keeps the setting."""
    miniatures.sdxl(tmp_path / "base", zeros=zeros)
    backbone = load(tmp_path / "base")
    empty, unconditional = backbone.encode([""]), backbone.unconditional()
    for own, text in ((unconditional.tokens, empty.tokens), (unconditional.pooled, empty.pooled)):
        assert torch.equal(own, torch.zeros_like(text) if zeros else text)
    backbone.save(tmp_path / "export")
    ours = backbone.decode(sampled(backbone, 5.0)).astype(int)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "export")
    theirs = by_diffusers(pipeline, backbone, num_inference_steps=STEPS, guidance_scale=5.0)
    assert np.abs(theirs - ours).max() <= 1
    assert pipeline.config.force_zeros_for_empty_prompt is zeros
    again = load(tmp_path / "export")
    state = some_state(backbone)
    with torch.no_grad():
        one, other = (Guided(each, 5.0).predict(*state)[0].noise for each in (backbone, again))
    torch.testing.assert_close(one, other)


def test_text_is_what_diffusers_encodes(folder: Path) -> None:
    """States before the last layer of both encoders, side by side, and the projection of the second, whose tokenizer
    pads with another token."""
    backbone = load(folder)
    ours = backbone.encode([*PROMPTS, ""])
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    tokens, _, pooled, _ = pipeline.encode_prompt([*PROMPTS, ""], do_classifier_free_guidance=False)
    assert torch.equal(ours.tokens, tokens)
    assert torch.equal(ours.pooled, pooled)
    assert ours.tokens.shape == (4, backbone.max_tokens, 80)
    assert pipeline.tokenizer.pad_token != backbone._pipeline.tokenizer_2.pad_token == "!"


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_what_is_saved_samples_in_plain_diffusers_as_trained(folder: Path, adaptation: str, tmp_path: Path) -> None:
    """The folder as it stands, with guidance, from the same noise; and the adapter on the untouched base."""
    backbone = load(folder)
    before = backbone.decode(sampled(backbone)).astype(int)
    backbone.adapt(PolicySettings.model_validate({"adaptation": adaptation, "lora_rank": 4, "lora_alpha": 12}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    backbone.save(tmp_path / "export")
    ours = backbone.decode(sampled(backbone)).astype(int)
    assert np.abs(ours - before).max() > 5
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.0}
    merged = StableDiffusionXLPipeline.from_pretrained(tmp_path / "export")
    assert np.abs(by_diffusers(merged, backbone, **call) - ours).max() <= 1
    state = some_state(backbone)
    with torch.no_grad():
        expected, found = backbone.predict(*state)[0].noise, load(tmp_path / "export").predict(*state)[0].noise
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    if adaptation == "lora":
        base = StableDiffusionXLPipeline.from_pretrained(folder)
        base.load_lora_weights((tmp_path / "export" / folders.ADAPTER).parent)
        base.scheduler = merged.scheduler
        assert np.abs(by_diffusers(base, backbone, **call) - ours).max() <= 1


def test_the_card_call_has_the_size_of_the_images(folder: Path, tmp_path: Path) -> None:
    """Where it is not the folder's own: diffusers would tell the network another one, and take other latents."""
    backbone = load(folder, image_size=[48, 80])
    backbone.save(tmp_path / "export")
    for kernel in (DDIM(1.0), DDIM(0.7)):
        policy = Policy(backbone, kernel)
        code = usage(policy, tmp_path / "export", 10, PROMPT, 5)
        assert "height=48" in code
        assert np.abs(drawn(code, tmp_path / "export") - served(policy, 10)).max() <= 1


@pytest.mark.parametrize("name", STEERING)
def test_every_steering_method_runs(folder: Path, name: str) -> None:
    """At weight 0 it is the plain rollout but for the rounding of twice the rows, otherwise finite and another."""
    backbone = load(folder)
    policy, conditioning, noise = Policy(backbone, KERNELS.build("ddim")), backbone.encode(PROMPTS), noise_of(backbone)
    torch.manual_seed(0)
    critic = Critic(backbone, ("reward",), CriticSettings()).eval().requires_grad_(False)
    torch.nn.init.normal_(critic.heads.weight)
    drawn = torch.stack([noise, noise_for([(9, place) for place in range(3)], 1, STEPS, backbone.latent_shape)], 1)
    plain = rollout(policy, None, conditioning, noise).latents

    def steered(weight: float) -> Tensor:
        run = SteeringRun(STEERING.build(name, torch.full((1,), weight), 2), torch.full((len(PROMPTS), STEPS), 0.5))
        return steered_rollout(policy, critic, conditioning, drawn, run).latents

    torch.testing.assert_close(steered(0.0), plain, rtol=1e-4, atol=1e-4)
    moved = steered(100.0)
    assert bool(moved.isfinite().all())
    assert not torch.allclose(moved, plain, rtol=1e-2, atol=1e-2)


def test_float16_is_decoded_in_float32(folder: Path) -> None:
    """The autoencoder of Stable Diffusion XL overflows in float16."""
    backbone = load(folder)
    backbone.dtype = torch.float16
    assert backbone._decoder_dtype(folder) == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float16_on_a_gpu_is_close_to_float32(folder: Path) -> None:
    """Prediction and image, although the autoencoder is kept in float32."""
    plain = load(folder)
    half: Any = load_backbone(
        Extension.model_validate({"use": "sdxl", "precision": "float16"}), folder, torch.device("cuda")
    )
    latents, sigma, conditioning = some_state(plain)
    with torch.no_grad():
        expected = plain.predict(latents, sigma, conditioning)[0].noise
        found = half.predict(latents.cuda(), sigma.cuda(), half.encode(PROMPTS))[0].noise.cpu()
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    assert next(half._autoencoder.parameters()).dtype == torch.float32
    assert np.abs(half.decode(latents.cuda()).astype(int) - plain.decode(latents).astype(int)).max() <= 2


# The folders that users have


def edit(folder: Path, file: str, **settings: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def problems(folder: Path) -> list[str]:
    found: Sequence[Problem] = ()
    try:
        locate(str(folder), SDXL)
    except ConfigError as error:
        found = error.problems
    assert all(problem.path == "backbone.source" and problem.remedy for problem in found)
    return [problem.problem for problem in found]


FORMS: dict[str, dict[str, Any]] = {
    "as published": {},
    "as fp16 alone": {"variant": "fp16"},
    "sharded": {"sharded": True},
    "as bf16 alone, sharded": {"variant": "bf16", "sharded": True},
    "Euler ancestral": {"scheduler": "EulerAncestralDiscreteScheduler"},
    "DPM-Solver": {"scheduler": "DPMSolverMultistepScheduler"},
    "DDIM": {"scheduler": "DDIMScheduler"},
    "PNDM": {"scheduler": "PNDMScheduler"},
    "v-prediction": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "96 x 64 pixels": {"unet": {"sample_size": [12, 8]}},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_folder_is_copied_whole_and_loads(form: str, tmp_path: Path) -> None:
    """By latentac, and the copy by plain diffusers, with the same weights and the noise levels of the folder's own
    scheduler. A null where a setting or an unused part may stand changes nothing, and neither does what lies beside."""
    source = miniatures.sdxl(tmp_path / "source", **FORMS[form])
    edit(source, INDEX, add_watermarker=None, image_encoder=None, force_zeros_for_empty_prompt=True)
    for extra in ("sd_xl_base_1.0.safetensors", "vae_1_0/config.json", "unet/model.onnx", "text_encoder_2/model.onnx"):
        (source / extra).parent.mkdir(exist_ok=True)
        (source / extra).write_text("x")
    assert problems(source) == []
    copy(source, tmp_path / "copy", SDXL)
    assert problems(tmp_path / "copy") == []
    assert {name.split("/")[0] for name in listing(tmp_path / "copy")} == {INDEX, *(part.name for part in SDXL.parts)}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "copy")
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    assert pipeline.config.force_zeros_for_empty_prompt is True
    assert pipeline.watermark is None
    backbone, theirs = load(source), pipeline.unet.state_dict()
    assert all(torch.equal(theirs[key].float(), tensor) for key, tensor in backbone.module.state_dict().items())
    levels = (1 - pipeline.scheduler.alphas_cumprod.double()).sqrt().float()
    torch.testing.assert_close(backbone.schedule(10)[:-1], levels[torch.arange(999, 0, -100)], rtol=0, atol=1e-6)
    assert backbone.decode(torch.zeros(1, *backbone.latent_shape)).shape[1:3] == backbone.image_size


def setting(file: str, **settings: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, file, **settings)


def without(*files: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for file in files:
            shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()

    return remove


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "the refiner's pipeline": (setting(INDEX, _class_name="StableDiffusionXLImg2ImgPipeline"), "the refiner"),
    "inpainting": (setting(INDEX, _class_name="StableDiffusionXLInpaintPipeline"), "inpainting"),
    "Stable Diffusion 1": (setting(INDEX, _class_name="StableDiffusionPipeline"), "another backbone's"),
    "one encoder": (without("text_encoder_2"), "text_encoder_2: is missing"),
    "an encoder of null": (setting(INDEX, text_encoder=[None, None]), "text_encoder: is null or missing"),
    "no second tokenizer": (without("tokenizer_2"), "tokenizer_2: is missing"),
    "no scheduler": (without("scheduler"), "scheduler: is missing"),
    "encoders of another model": (
        setting("text_encoder_2/config.json", hidden_size=32),
        "the two text encoders together have 64",
    ),
    "pooled text of another width": (
        setting("text_encoder_2/config.json", projection_dim=32),
        "projection_class_embeddings_input_dim is 96, and must be 6 times addition_time_embed_dim = 8 and the 32",
    ),
    "the refiner's UNet": (setting(UNET, projection_class_embeddings_input_dim=88), "the refiner has fewer sizes"),
    "a UNet without sizes": (setting(UNET, addition_embed_type=None), "addition_embed_type is None, and must be"),
    "Kandinsky's embeddings": (setting(UNET, addition_embed_type="image"), "addition_embed_type is 'image'"),
    "a distilled UNet": (setting(UNET, time_cond_proj_dim=256), "time_cond_proj_dim is 256.*distilled"),
    "an IP-Adapter's UNet": (setting(UNET, encoder_hid_dim_type="ip_image_proj"), "encoder_hid_dim_type is"),
    "an inpainting UNet": (setting(UNET, in_channels=9), r"in_channels is 9 \(inpainting"),
    "latents of an EDM model": (setting(VAE, latents_mean=[0.1, 0, 0, 0]), "latents_mean is set"),
    "an autoencoder of 16 channels": (setting(VAE, latent_channels=16), "latent_channels 16"),
    "an EDM scheduler": (
        setting("scheduler/scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler"),
        "EDMDPMSolverMultistepScheduler is not known",
    ),
    "two lengths": (setting("tokenizer_2/tokenizer_config.json", model_max_length=12), "model_max_length differs"),
    "a projecting first encoder": (
        setting(INDEX, text_encoder=["transformers", "CLIPTextModelWithProjection"]),
        "only CLIPTextModel is supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_wrong_is_one_problem_with_its_remedy(case: str, folder: Path, tmp_path: Path) -> None:
    """It names the part, before anything is loaded; who loads the backbone gets it too."""
    change, message = REFUSED[case]
    broken = shutil.copytree(folder, tmp_path / "model")
    change(broken)
    found = problems(broken)
    assert any(re.search(message, problem) for problem in found), found
    with pytest.raises(ConfigError):
        load(broken)


# The published model

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
BASE_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
BASE_VAE = {
    "sample_size": 1024,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}


class Described(SDXLBackbone):
    """The published model by its configuration: shapes without memory."""

    def _load(self, name: str, dtype: torch.dtype | None = None) -> Any:
        made: dict[str, Callable[[], Any]] = {
            "unet": lambda: UNet2DConditionModel(**BASE_UNET),
            "vae": lambda: AutoencoderKL(**BASE_VAE),
            "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)),
            "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G)),
        }
        if name not in made:
            return super()._load(name, dtype)
        with torch.device("meta"):
            return made[name]().eval().requires_grad_(False)


def test_the_published_model_has_the_published_size(tmp_path: Path) -> None:
    """On the meta device: 2.57 billion weights, text of 77 x 2048, taps and critic for them, adapters on the attention
    of all 70 blocks."""
    miniatures.sdxl(tmp_path, max_length=77)
    backbone = Described(Described.Settings(), tmp_path, torch.device("meta"))
    counts = {"unet": backbone.module, "vae": backbone._autoencoder}
    counts |= {name: getattr(backbone._pipeline, name) for name in ("text_encoder", "text_encoder_2")}
    assert {name: sum(each.numel() for each in module.parameters()) for name, module in counts.items()} == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert backbone.image_size == (1024, 1024)
    assert backbone.latent_shape == (4, 128, 128)
    assert (backbone.text_width, backbone.max_tokens) == (2048, 77)
    assert backbone.tap_shapes == {"middle": (1280, 32, 32), "last": (320, 128, 128)}
    conditioning = backbone.encode(PROMPTS)
    assert conditioning.tokens.shape == (3, 77, 2048)
    assert conditioning.pooled is not None
    assert conditioning.pooled.shape == (3, 1280)
    latents, sigma = torch.zeros(3, *backbone.latent_shape, device="meta"), torch.zeros(3, device="meta")
    with torch.device("meta"):
        prediction, taps = backbone.predict(latents, sigma, conditioning)
        critic = Critic(backbone, ("reward",), CriticSettings())
        values = critic(critic.features(latents, prediction, taps), sigma, conditioning)
    assert {name: tuple(tap.shape[1:]) for name, tap in taps.items()} == backbone.tap_shapes
    assert values.shape == (3, 1)
    backbone.adapt(PolicySettings(adaptation="lora", lora_rank=4))
    adapted = [name for name, each in backbone.module.named_parameters() if each.requires_grad]
    assert len(adapted) == 70 * 2 * 4 * 2

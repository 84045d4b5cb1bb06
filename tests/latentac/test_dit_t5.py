"""Stable Diffusion 3 with T5 (`backbone.t5`): it is diffusers' pipeline with all three text encoders."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from latentac.backbones import layout_of, load_backbone
from latentac.backbones.layout import copy, listing
from latentac.backbones.source import locate
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.method.diffusion import CPS
from latentac.method.randomness import noise_for
from latentac.runs import testing
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout
from latentac.sampling.snippet import usage
from latentac.system.errors import ConfigError
from tests.latentac import miniatures
from tests.latentac.flux_miniature import as_published, t5, t5_tokenizer
from tests.latentac.test_export import PROMPT, drawn, served

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares"]
STEPS, TOKENS = 4, 24
WITH = Extension.model_validate({"use": "dit", "t5": True})
WITHOUT = Extension(use="dit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    made = miniatures.sd3(tmp_path_factory.mktemp("sd3") / "model", t5=(t5(96), t5_tokenizer(TOKENS)))
    as_published(made / "tokenizer_3")
    return made


def pipeline_of(folder: Path) -> Any:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_rollout_without_noise_is_what_plain_diffusers_makes(folder: Path) -> None:
    """With the tokens of CLIP and T5, one after the other, within one grey level."""
    backbone, pipeline = load_backbone(WITH, folder, CPU), pipeline_of(folder)
    noise = noise_for([(index,) for index in range(2)], 0, STEPS, backbone.latent_shape)
    conditioning = backbone.encode(PROMPTS)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    torch.testing.assert_close(conditioning.tokens, tokens)
    torch.testing.assert_close(conditioning.pooled, pooled)
    assert tokens.shape == (2, 16 + TOKENS, backbone.text_width)
    assert bool((tokens[:, 16:].abs().amax(-1) > 0).all())
    ours = backbone.decode(rollout(Policy(backbone, KERNELS.build("cps", noise=0.0)), None, conditioning, noise).clean)
    theirs = pipeline(
        PROMPTS,
        latents=noise[:, 0],
        sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(),
        guidance_scale=1.0,
        max_sequence_length=TOKENS,
        output_type="np",
    ).images
    assert ours.std() > 5
    assert np.abs((theirs * 255).round().astype(int) - ours).max() <= 1


def test_the_contract_of_a_backbone_holds_with_t5(folder: Path) -> None:
    """Also for images that are not square; its prompts are counted by T5."""
    backbone: Any = testing.check_backbone("dit", folder, t5=True, image_size=[48, 64], precision="bfloat16")
    assert backbone.max_tokens == TOKENS
    assert backbone.count_tokens(["", "a red circle"]) == [1, 4]


def test_without_the_setting_nothing_of_t5_is_used(folder: Path, tmp_path: Path) -> None:
    """Neither copied nor loaded, though it lies there."""
    copy(folder, tmp_path / "copy", layout_of(WITHOUT))
    assert not [file for file in listing(tmp_path / "copy") if "_3/" in file]
    assert load_backbone(WITHOUT, folder, CPU).encode(PROMPTS).tokens.shape == (2, 16, 96)


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_an_export_keeps_t5(folder: Path, adaptation: str, tmp_path: Path) -> None:
    """The folder is a whole pipeline for diffusers, the code of its model card makes what is served, and it loads here
    with and without the setting."""
    copy(folder, tmp_path / "base", layout_of(WITH))
    backbone = load_backbone(WITH, tmp_path / "base", CPU)
    backbone.adapt(PolicySettings.model_validate({"adaptation": adaptation, "lora_rank": 2}))
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    backbone.save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["text_encoder_3"] == ["transformers", "T5EncoderModel"]
    policy = Policy(backbone, CPS(0.9))
    code = usage(policy, tmp_path / "saved", STEPS, PROMPT, 5)
    assert "None" not in code
    assert np.abs(drawn(code, tmp_path / "saved") - served(policy, STEPS)).max() <= 1
    for extension in (WITH, WITHOUT):
        load_backbone(extension, tmp_path / "saved", CPU)


REFUSED = {
    "no T5": (lambda f: shutil.rmtree(f / "text_encoder_3"), "text_encoder_3: is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_3"), "tokenizer_3: is missing"),
    "a narrow T5": (lambda f: _narrow(f), "joint_attention_dim is 96, and text_encoder_3 has a d_model of 24"),
}


def _narrow(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_3")
    t5(24).save_pretrained(folder / "text_encoder_3")


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_folder_that_does_not_fit_is_refused(folder: Path, case: str, tmp_path: Path) -> None:
    """One problem, which names the part; without the setting it is none."""
    change, problem = REFUSED[case]
    model = shutil.copytree(folder, tmp_path / "model")
    change(model)
    with pytest.raises(ConfigError) as caught:
        locate(str(model), layout_of(WITH))
    (found,) = caught.value.problems
    assert problem in found.problem
    locate(str(model), layout_of(WITHOUT))

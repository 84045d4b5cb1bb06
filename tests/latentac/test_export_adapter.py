"""The export of an adapter: LoRA weights that plain diffusers loads, and one base that the endpoint shares."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from latentac.backbones import Denoiser, layout_of, load_backbone
from latentac.backbones.layout import Layout, copy, used
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.critic import Critic
from latentac.runs.resolution import resolve_all
from latentac.serving.exported import BASE, Base, add_base, export
from latentac.serving.generator import Generator
from latentac.store.pool import hash_of
from latentac.system import folders
from latentac.worlds.shapes import builtin_pipeline
from tests.latentac import miniatures
from tests.latentac.flux_miniature import flux

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares"]
LORA = PolicySettings(adaptation="lora", lora_rank=4, lora_alpha=12)
WITHOUT: dict[str, Any] = {"dit": {"text_encoder_3": None, "tokenizer_3": None}}
"""What diffusers' pipeline of the family must be told is missing."""


def backbone_of(name: str) -> Extension:
    own = {"image_size": [32, 32]} if name == "flux" else {}
    return Extension.model_validate({"use": name.removeprefix("shapes-"), **own})


def layout(name: str) -> Layout:
    found = layout_of(backbone_of(name))
    assert found is not None
    return found


def base_of(name: str, folder: Path) -> Path:
    """A copy of the family's miniature, or of an embedded model, as `prepare` makes it."""
    makers: dict[str, Any] = {"unet": miniatures.sd15, "sdxl": miniatures.sdxl, "dit": miniatures.sd3}
    if name.startswith("shapes-"):
        source = builtin_pipeline(name)
    else:
        source = flux(folder / "source") if name == "flux" else makers[name](folder / "source", size=32)
    copy(source, folder / "base", layout(name))
    return folder / "base"


def trained(name: str, base: Path) -> Any:
    """The backbone of `base` with an adapter that changes what it predicts."""
    backbone = load_backbone(backbone_of(name), base, CPU)
    backbone.adapt(LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone


def predicted(backbone: Denoiser) -> Tensor:
    """What it predicts at two noise levels, in float32."""
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        prediction, _ = backbone.predict(latents, torch.tensor([0.3, 0.8]), backbone.encode(PROMPTS))
    return torch.stack([prediction.clean, prediction.noise])


def exports(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """A merged export, the export of its adapter with its base beside it, and the base."""
    base = base_of(name, folder)
    backbone, settings = trained(name, base), backbone_of(name)
    flow = "cps" if name.endswith(("dit", "flux")) else "ddim"
    fields = {
        "recipe": "test",
        "backbone": {"source": str(base), "use": settings.use, **settings.own},
        "kernel": {"use": flow, "num_steps": 3},
        "policy": {"adaptation": "lora"},
        "prompts": {"source": "builtin:shapes"},
        "rewards": [{"use": "jpeg_compressibility"}],
        "steering": {"methods": [{"use": "best_of_n"}]},
        "gate": {"reward": "jpeg_compressibility"},
    }
    backbone.save(folder / "pipeline")
    reference = Base(
        name="miniature",
        artifact="run/prepare",
        files={file: hash_of(base / file) for file in used(base, backbone.layout)},
    )
    for weights in ("merged", "adapter"):
        resolved, made = resolve_all({**fields, "export": {"weights": weights}}), folder / weights
        details: dict[str, Any] = {"run": "run", "version": weights, "extensions": resolved.described()}
        if weights == "merged":
            folders.copy_pipeline(folder / "pipeline", made)
            add_base(made, base)
        else:
            folders.copy_adapter(folder / "pipeline", made)
            details |= {"base": reference, "pipeline": base}
        torch.manual_seed(0)
        critic = Critic(backbone, resolved.config.reward_names, resolved.config.critic)
        torch.nn.init.normal_(critic.heads.weight, std=0.5)
        critic.save(made / "critic")
        export(made, resolved.config, **details)
    shutil.copytree(base, folder / "adapter" / BASE)
    return folder / "merged", folder / "adapter", base


FAMILIES = ["unet", "sdxl", "dit", "flux", "shapes-unet", "shapes-dit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_both_exports_are_the_same_model(name: str, tmp_path: Path) -> None:
    """Predictions agree up to rounding, those of the base bitwise with it. Plain diffusers makes the same network of
    each export."""
    merged, adapter, base = exports(name, tmp_path)
    whole, shared = Generator(merged, CPU), Generator(adapter, CPU)
    untouched = predicted(load_backbone(backbone_of(name), base, CPU))
    found = predicted(shared.policy("trained").backbone)
    expected = predicted(whole.policy("trained").backbone)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - untouched).abs().max() > 0.01
    assert torch.equal(predicted(shared.policy("base").backbone), untouched)
    network = layout(name).network
    own: Any = DiffusionPipeline.from_pretrained(merged, **WITHOUT.get(name.removeprefix("shapes-"), {}))
    loaded: Any = DiffusionPipeline.from_pretrained(base, **WITHOUT.get(name.removeprefix("shapes-"), {}))
    loaded.load_lora_weights(adapter)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    fused = dict(getattr(loaded, network).named_parameters())
    for key, tensor in getattr(own, network).named_parameters():
        torch.testing.assert_close(fused[key], tensor, rtol=1e-5, atol=1e-5)

"""Attention kernels by diffusers' own switch: who has the setting, what it reaches, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from latentac.backbones import BACKBONES, load_backbone
from latentac.backbones.attention import NATIVE, SwitchedSettings, check_attention, native_attention
from latentac.config.learning import Policy as PolicySettings
from latentac.config.sections import Extension
from latentac.method.randomness import noise_for
from latentac.runs.configuration import recipe_fields
from latentac.runs.preparation.costs import count_operations
from latentac.runs.resolution import resolve_all
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout
from latentac.serving.exported import export
from latentac.system.errors import ConfigError
from tests.latentac import miniatures
from tests.latentac.flux_miniature import flux
from tests.latentac.zimage_miniature import zimage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CPU = torch.device("cpu")
SIZE = [32, 32]
PROMPTS = ["a red circle", "two blue squares"]
MINIATURES: dict[str, Any] = {
    "unet": miniatures.sd15,
    "sdxl": miniatures.sdxl,
    "dit": miniatures.sd3,
    "flux": flux,
    "zimage": zimage,
}


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return flux(tmp_path_factory.mktemp("flux") / "dev")


def load(folder: Path, use: str = "flux", **own: Any) -> Any:
    return load_backbone(Extension.model_validate({"use": use, "image_size": SIZE} | own), folder, CPU)


def kernels(module: Any) -> set[Any]:
    """Those of the attention layers that diffusers can switch."""
    processors = [each.processor for each in module.modules() if hasattr(each, "processor")]
    return {each._attention_backend for each in processors if hasattr(each, "_attention_backend")}


def refusal(**own: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        BACKBONES.settings(Extension.model_validate({"use": "flux", **own}), "backbone")
    return str(caught.value)


@pytest.mark.parametrize("use", sorted(MINIATURES))
def test_a_backbone_has_the_setting_where_diffusers_can_switch(use: str, tmp_path: Path) -> None:
    """The others would take it without any effect, so for them it is an unknown setting."""
    settings: Any = BACKBONES.load(use).Settings
    folder = MINIATURES[use](tmp_path / use)
    assert ("attention" in settings.model_fields) == bool(kernels(load(folder, use).module))
    if "attention" not in settings.model_fields:
        with pytest.raises(ConfigError, match=r"backbone\.attention = 'native': .* has no such setting"):
            BACKBONES.settings(Extension.model_validate({"use": use, "attention": NATIVE}), "backbone")


def test_a_name_that_diffusers_does_not_know_is_refused() -> None:
    """With the field, the value, and the names; code from the hub is never run."""
    assert "backbone.attention = 'flsh'" in refusal(attention="flsh")
    assert 'Did you mean "flash"?' in refusal(attention="flsh")
    for name in [each.value for each in AttentionBackendName if each.value.endswith("_hub")]:
        assert "code on the hub" in refusal(attention=name)


def test_a_kernel_that_cannot_be_used_here_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    """The folder does not exist. A package that is missing is named, and so is a kernel without a gradient, or without
    masks where the network masks tokens."""
    for name, problem in (("xformers", "install `xformers"), ("flex", "does not support backward on CPU")):
        with pytest.raises(ConfigError, match=r"backbone\.attention") as caught:
            BACKBONES.make(Extension.model_validate({"use": "flux", "attention": name}), tmp_path / "none", CPU)
        assert problem in str(caught.value)
        assert "backbone.attention=native" in str(caught.value)
    settings = SwitchedSettings(attention="_native_flash")
    check_attention(settings, CPU, masked=False)
    with pytest.raises(ConfigError, match="with masked tokens: ValueError: `attn_mask` is not supported"):
        check_attention(settings, CPU, masked=True)


def test_a_kernel_with_another_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes a mask and does not apply it, for example."""
    registry = attention_dispatch._AttentionBackendRegistry
    right = registry._backends[AttentionBackendName._NATIVE_MATH]

    def wrong(attn_mask: Any = None, **given: Any) -> Any:
        return right(attn_mask=None, **given)

    monkeypatch.setitem(registry._backends, AttentionBackendName._NATIVE_MATH, wrong)
    settings = SwitchedSettings(attention="_native_math")
    check_attention(settings, CPU, masked=False)
    with pytest.raises(ConfigError, match="its result or its gradient is not that of native"):
        check_attention(settings, CPU, masked=True)


@pytest.mark.parametrize("use", ["flux", "zimage"])
def test_rollout_and_update_use_the_same_kernel(use: str, tmp_path: Path) -> None:
    """Also with LoRA and recomputed activations. The ratio is bitwise 1, and the kernel is another one than torch's
    choice: it rounds otherwise."""
    folder = MINIATURES[use](tmp_path / use)
    own = {"attention": "_native_math", "gradient_checkpointing": True, "text_tokens": 32}
    backbone, native = load(folder, use, **own), load(folder, use, text_tokens=32)
    assert kernels(backbone.module) == {AttentionBackendName._NATIVE_MATH}
    assert kernels(native.module) == {AttentionBackendName.NATIVE}
    noise = noise_for([(index,) for index in range(2)], 0, 3, backbone.latent_shape)
    policy = Policy(backbone, KERNELS.build("cps", noise=0.7))
    made = rollout(policy, None, backbone.encode(PROMPTS), noise)
    other = rollout(Policy(native, policy.kernel), None, backbone.encode(PROMPTS), noise)
    assert not torch.equal(made.latents, other.latents)
    torch.testing.assert_close(made.latents, other.latents, rtol=1e-3, atol=1e-3)
    training = Policy(backbone.clone(), policy.kernel)
    training.backbone.adapt(PolicySettings(adaptation="lora", lora_rank=2))
    assert kernels(training.backbone.module) == {AttentionBackendName._NATIVE_MATH}
    sigma, after = (made.sigmas[step].expand(2) for step in (0, 1))
    transition = training.transition(made.latents[:, 0], sigma, after, made.conditioning)
    log_probs = transition.log_prob(made.latents[:, 1])
    assert torch.equal(log_probs.detach(), made.log_probs[:, 0])
    log_probs.sum().backward()


def test_other_networks_keep_their_kernel(dev: Path) -> None:
    """diffusers makes the last kernel that was set the default of all networks of the process."""
    load(dev, attention="_native_math")
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def test_operations_do_not_depend_on_the_kernel(dev: Path) -> None:
    """Some kernels are opaque to the count, so it is made with the native one; the backbone keeps its own."""
    counted = []
    for name in (NATIVE, "_native_flash"):
        backbone = load(dev, attention=name)
        config = resolve_all(recipe_fields("shapes-dit-smoke", "", [])).config
        counted.append(count_operations(config, backbone, backbone.encode(PROMPTS[:1])))
        assert kernels(backbone.module) == {AttentionBackendName(name)}
        with native_attention(backbone):
            assert kernels(backbone.module) == {AttentionBackendName.NATIVE}
    assert counted[0] == counted[1]


def test_an_export_does_not_name_the_kernel(dev: Path, tmp_path: Path) -> None:
    """A server may have another device or lack the package."""
    backbone = f'{{"use": "flux", "source": "{dev}", "image_size": [32, 32], "attention": "_native_flash"}}'
    overrides = [f"backbone={backbone}", "kernel.use=cps", "steering.methods=[]"]
    config = resolve_all(recipe_fields("shapes-dit-smoke", "", overrides)).config
    units = {reward.name: "" for reward in config.rewards}
    made = export(tmp_path, config, run="run", version="one", extensions={"units": units, "methods": {}})
    assert "attention" not in made.backbone.own
    assert made.backbone.own["image_size"] == [32, 32]

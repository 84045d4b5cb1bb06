"""Which kernel computes attention: a setting of the backbones whose attention goes through diffusers' own switch.

These are the transformers of FLUX.1 and Z-Image. In diffusers, the UNets and Stable Diffusion 3 call torch's
`scaled_dot_product_attention` themselves, so they have no such setting: torch picks the kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging
from pydantic import field_validator
from torch import Tensor

from latentac.backbones.pipeline import PipelineSettings
from latentac.backbones.precision import compute_dtype
from latentac.config.schema import suggestion
from latentac.system.errors import ConfigError, Problem, describe

NATIVE = "native"
_HUB = "_hub"  # ends the names of kernels that are code from the hub
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class SwitchedSettings(PipelineSettings):
    """How a pipeline computes whose attention diffusers can switch."""

    attention: str = NATIVE
    """The attention kernel, by its name in diffusers: `native` is torch's own choice, `flash` and `_flash_3` need
    flash-attn, `xformers` needs xformers, `_native_cudnn`, `_native_flash`, and `_native_efficient` are kernels of
    torch. Rollouts and updates use the same one. Before the weights are loaded, it is tried on the run's device and
    dtype, with a gradient. An export does not name it: the endpoint uses `native`."""

    @field_validator("attention")
    @classmethod
    def _is_known(cls, name: str) -> str:
        known = [each.value for each in AttentionBackendName if not each.value.endswith(_HUB)]
        if name.endswith(_HUB):
            raise ValueError(f"is code on the hub, which is not run. Known: {', '.join(known)}")
        if name not in known:
            raise ValueError(f"is not a kernel of diffusers. {suggestion(name, known).removesuffix('.')}")
        return name


def check_attention(settings: SwitchedSettings, device: torch.device, *, masked: bool) -> None:
    """Raises ConfigError where the kernel does not compute attention and its gradient as `native` does, on this device
    and in the dtype of the forward passes. masked: whether the network masks tokens."""
    name = settings.attention
    if name == NATIVE:
        return
    dtype = compute_dtype(settings.precision, device)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(3, 2, 64, 2, 64, generator=generator).to(device, dtype)  # query, key, value: [B, L, heads, C]
    mask = (torch.arange(64, device=device) < torch.tensor([[64], [40]], device=device))[:, None, None]
    try:
        switch_attention(ModelMixin(), name)  # names the package that is missing
        found, expected = (_tried(each, given, mask if masked else None) for each in (name, NATIVE))
        close = [torch.allclose(*pair, rtol=0.0, atol=_TOLERANCE[dtype]) for pair in zip(found, expected, strict=True)]
        problem = "" if all(close) else "its result or its gradient is not that of native"
    except Exception as error:  # noqa: BLE001 - each kernel has its own
        problem = describe(error, 300).rstrip(".")
    if problem:
        where = f"on {device.type} in {str(dtype).removeprefix('torch.')}{' with masked tokens' if masked else ''}"
        remedy = "Use backbone.attention=native, or install what that kernel needs"
        raise ConfigError([Problem("backbone.attention", name, f"cannot be used {where}: {problem}", remedy)])


def switch_attention(module: Any, name: str) -> None:
    """Let the attention layers of a diffusers network use the kernel `name`. Others stay as they are."""
    _switch(module, name)
    _switch(ModelMixin(), NATIVE)  # diffusers also makes it the kernel of every network that was not switched


@contextmanager
def native_attention(backbone: Any) -> Iterator[None]:
    """Let a backbone use the kernel `native` within the body, whatever its settings say."""
    settings = getattr(getattr(backbone, "backbone", backbone), "settings", None)  # below classifier-free guidance
    name = settings.attention if isinstance(settings, SwitchedSettings) else NATIVE
    if name == NATIVE:
        yield
        return
    switch_attention(backbone.module, NATIVE)
    try:
        yield
    finally:
        switch_attention(backbone.module, name)


def _switch(module: Any, name: str) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that the feature is experimental
    try:
        module.set_attention_backend(name)
    finally:
        logging.set_verbosity(verbosity)


@torch.enable_grad()
def _tried(name: str, given: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention of query, key and value, and its gradient, in float32."""
    leaf = given.clone().requires_grad_()
    output = dispatch_attention_fn(*leaf.unbind(), attn_mask=mask, backend=AttentionBackendName(name))
    (gradient,) = torch.autograd.grad(output.float().square().sum(), leaf)
    return output.detach().float(), gradient.float()

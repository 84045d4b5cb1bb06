"""Training a diffusers module whole or by low-rank adapters, and writing it as if it had always been so."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from latentac.backbones.precision import full_precision
from latentac.config.learning import Policy
from latentac.system import folders


def adapt(module: Any, settings: Policy, attention: Sequence[str]) -> None:
    """Make all weights trainable, or adapters on the linear layers whose names end in one of `attention`."""
    if settings.adaptation == "full":
        module.requires_grad_(True)
    else:
        module.add_adapter(
            LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(attention))
        )


def save(module: Any, folder: Path, part: str) -> None:
    """`module` as the part `part` of the pipeline in `folder`, in float32: adapters merged, and once more alone."""
    adapted = bool(getattr(module, "peft_config", None))
    if adapted or module.dtype != torch.float32:
        weights = dict(full_precision(module))
        module = copy.deepcopy(module).cpu().float()
        module.load_state_dict(weights)
    if adapted:
        _save_adapter(module, folder / folders.ADAPTER, part)
        module.fuse_lora()
        module.unload_lora()
    folders.write_part(module, folder / part)


def _save_adapter(module: Any, file: Path, part: str) -> None:
    """The adapters as `load_lora_weights` of diffusers reads them.

    alpha / rank is multiplied into the weights: whoever reads the file takes it as 1.
    """
    (settings,) = module.peft_config.values()
    weights = {}
    for name, tensor in get_peft_model_state_dict(module).items():
        scale = settings.lora_alpha / settings.r if ".lora_B." in name else 1.0
        weights[f"{part}.{name}"] = (tensor.detach() * scale).cpu().contiguous()
    file.parent.mkdir()
    save_file(weights, file, metadata={"format": "pt"})

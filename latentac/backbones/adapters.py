"""Training a diffusers module whole or by low-rank adapters, and writing it as if it had always been so."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from latentac.config import Policy
from latentac.store import copy_folder


def adapt(module: Any, settings: Policy, attention: Sequence[str]) -> None:
    """Make all weights trainable, or adapters on the linear layers whose names end in one of `attention`."""
    if settings.adaptation == "full":
        module.requires_grad_(True)
    else:
        module.add_adapter(
            LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(attention))
        )


def save(module: Any, source: Path, folder: Path, subfolder: str) -> None:
    """The pipeline of `source` in `folder`, with `module`, adapters merged, as its `subfolder`; safetensors only."""
    copy_folder(source, folder)
    if getattr(module, "peft_config", None):
        module = copy.deepcopy(module)
        module.fuse_lora()
        module.unload_lora()
    module.save_pretrained(folder / subfolder, safe_serialization=True)

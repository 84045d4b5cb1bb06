"""A part of a pipeline as a module in float32 on its device, with every weight from the folder."""

from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from latentac.backbones.inspection import weights_of
from latentac.backbones.layout import Part
from latentac.errors import ConfigError, Problem


def load(kind: Any, folder: Path, part: Part, device: torch.device) -> Any:
    """`kind.from_pretrained`, frozen and in eval mode; from a variant where there is nothing else.

    Raises ConfigError where weights are missing or not of the shape that the configuration asks for: the libraries
    would draw those at random.
    """
    diffusers_logging.disable_progress_bar()  # loading takes milliseconds, or has a bar of its own in `prepare`
    transformers_logging.disable_progress_bar()
    chosen = weights_of(folder, part)
    try:
        module, info = kind.from_pretrained(
            folder,
            subfolder=part.name,
            variant=chosen.variant if chosen and chosen.variant else None,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = f"Use a complete {part.name} whose weights belong to its config.json"
        problem = f"{part.name}: cannot be loaded ({first})"
        raise ConfigError([Problem("backbone.source", str(folder), problem, remedy)]) from error
    wrong = {
        "lacks": _names(info["missing_keys"]),
        "holds in another shape": _names(info.get("mismatched_keys", ())),
        # An encoder's file may hold more than the encoder, such as CLIP's vision half.
        "has beside the weights of its configuration": []
        if part.kind == "text_encoder"
        else _names(info["unexpected_keys"]),
    }
    problems = [
        Problem(
            "backbone.source",
            str(folder),
            f"{part.name}: its weights file {what} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}",
            f"Use the weights that belong to {part.name}/config.json",
        )
        for what, names in wrong.items()
        if names
    ]
    if problems:
        raise ConfigError(problems)
    return module.eval().requires_grad_(False).to(device)


def _names(keys: Any) -> list[str]:
    """Sorted names of weights; a mismatch is (name, shape, shape). Integers that older versions kept are no weights."""
    names = [key if isinstance(key, str) else key[0] for key in keys]
    return sorted(name for name in names if not name.endswith("position_ids"))

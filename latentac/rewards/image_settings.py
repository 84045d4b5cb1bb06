"""How a folder says that images are prepared, as CLIP's processor reads it: `preprocessor_config.json` and its like."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

# Of two that the library has, the one that every published score was computed with; it needs no torchvision.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentac.system.modelfiles import Damaged, read_json, walk

PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Newer folders have the settings of images inside the first; where both have some, the library takes those."""
_KINDS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_FIELDS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)
_MOST_PIXELS = 1024  # a side; the largest published CLIPs see 448
_RESAMPLERS = 6


def image_processor(folder: Path) -> Any:
    """As the folder says. Raises Damaged."""
    return CLIPImageProcessorPil(**_preparation(folder))


def prepared(processor: Any, images: np.ndarray) -> Tensor:
    """float32 [B, 3, size, size] of `images` uint8 [B, H, W, 3]."""
    found: Tensor = processor(list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return found


def check_size(folder: Path, size: int) -> None:
    """Raises Damaged where the folder's images are not of `size` pixels a side."""
    made = prepared(image_processor(folder), np.zeros((1, 5, 8, 3), np.uint8))
    if made.shape != (1, 3, size, size):
        found = " x ".join(map(str, made.shape[2:]))
        raise Damaged(f"image settings: make {found} pixels, and vision_config.image_size is {size}")


def _preparation(folder: Path) -> dict[str, Any]:
    """What the folder says of how images are prepared. Raises Damaged."""
    nested, own = ((read_json(folder / name) if (folder / name).is_file() else {}) for name in PROCESSORS)
    inner = nested.get("image_processor")
    found: Mapping[str, Any] = inner if isinstance(inner, dict) else own
    if not found:
        raise Damaged(f"{PROCESSORS[1]} is missing, which says how images are prepared")
    kind = found.get("image_processor_type", found.get("feature_extractor_type"))
    if kind not in _KINDS:
        raise Damaged(f"{PROCESSORS[1]} says {str(kind)[:80]}, and only {_KINDS[0]} is supported")
    kept = {name: found[name] for name in _FIELDS if name in found}
    for name, _, value in walk({name: kept[name] for name in ("size", "crop_size") if name in kept}):
        if not isinstance(value, dict) and value is not None and not (type(value) is int and 0 < value <= _MOST_PIXELS):
            raise Damaged(f"{name} is {str(value)[:40]}, and must be a whole number from 1 to {_MOST_PIXELS:,}")
    if "resample" in kept and (type(kept["resample"]) is not int or not 0 <= kept["resample"] < _RESAMPLERS):
        raise Damaged(f"resample is {str(kept['resample'])[:40]}, and must be from 0 to {_RESAMPLERS - 1}")
    return kept

"""A CLIP of others as transformers keeps it: a folder or a hub id, judged and loaded as the backbones' parts are.

Read are config.json, safetensors weights, the tokenizer's files, and what says how images are prepared. No pickle, no
code, no link that leads out of the folder, and nothing from a network but the files of a hub id.
"""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

# Of two that the library has, the one that every published score was computed with; it needs no torchvision.
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentac.backbones.inspection import inspect_alone
from latentac.backbones.layout import Part
from latentac.backbones.loading import load, load_tokenizer
from latentac.backbones.source import not_had, repository_files
from latentac.backbones.vocabulary import read_tokenizer
from latentac.system.errors import ConfigError, Problem
from latentac.system.hub import offline, snapshot
from latentac.system.modelfiles import Damaged, faults, read_json, walk

_MODEL = Part(".", "text_encoder", ("CLIPModel",))
_TOKENIZER = Part(".", "tokenizer", ("CLIPTokenizer",))
_PARTS = (_MODEL, _TOKENIZER)
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Newer folders have the settings of images inside the first; where both have some, the library takes those."""
_KINDS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_FIELDS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)
_MOST_PIXELS = 1024  # a side; the largest published CLIPs see 448
_RESAMPLERS = 6
_REMEDY = "Use a folder that CLIPModel and CLIPProcessor of transformers have saved, or a hub id (owner/name)"


def is_local(source: str) -> bool:
    """Whether `source` means a folder of this machine, there or not."""
    given = source.startswith(("/", "./", "../", "~")) or source.count("/") > 1  # a hub id is owner/name
    return given or os.path.exists(os.path.expanduser(source))


def locate(source: str, revision: str = "") -> Path:
    """The folder on this machine of the CLIP that `source` names, fetched if need be, and inspected.

    source: a folder or a hub id; revision: a commit, tag or branch of a hub id. Raises ConfigError with all that is
    wrong.
    """
    if is_local(source):
        path = Path(os.path.expanduser(source))
        if revision:
            problem = f"{source} is not a hub id and has no revision"
            raise ConfigError([Problem("revision", revision, problem, "Leave it out")])
        if not path.is_dir():
            raise _bad(source, "is a file" if path.exists() else "is not a folder here", _REMEDY)
        _refuse(source, _problems(path))
        return path
    try:
        folder = snapshot(source, revision or None, ["config.json"])
        names = [name for name in repository_files(source, folder, folder.name) if "/" not in name]
        used = {*_MODEL.files(names), *_TOKENIZER.files(names), *(name for name in _PROCESSORS if name in names)}
        small = {name for name in used if not name.endswith(".safetensors")}
        if small == used and any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            problem = "has no safetensors weights: pickles can run code and are never loaded"
            raise _bad(source, problem, "Load it with CLIPModel where you trust it, and call save_pretrained")
        for wanted in (small, used):
            snapshot(source, folder.name, [glob.escape(name) for name in sorted(wanted)])
            _refuse(source, _problems(folder, weights=wanted is used or offline()))
        return folder
    except (OSError, HFValidationError) as error:
        raise _bad(source, *not_had(revision, error, _REMEDY)) from error


def width(folder: Path) -> int:
    """Of the vectors that images and texts are mapped to."""
    return int(read_json(folder / "config.json").get("projection_dim", 512))  # CLIPConfig's own default


class Clip:
    """Unit vectors of images and texts. Calls of `images` and `texts` may come from several threads; those of `move`
    may not come beside them."""

    def __init__(self, source: str, folder: Path, dtype: torch.dtype) -> None:
        """On the CPU. Raises ConfigError where the files do not belong to each other."""
        self.dtype, cpu = dtype, torch.device("cpu")
        try:
            self.model: Any = load(CLIPModel, folder, _MODEL, cpu, dtype)
            self._tokenizer = load_tokenizer(CLIPTokenizer, folder, _TOKENIZER)
        except ConfigError as error:  # reported as a backbone's
            raise ConfigError([Problem("source", source, one.problem, one.remedy) for one in error.problems]) from error
        self._processor = CLIPImageProcessorPil(**_preparation(folder))
        self.max_tokens = min(self.model.config.text_config.max_position_embeddings, self._tokenizer.model_max_length)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def logit_scale(self) -> Tensor:
        """float32 [], of which the exponential multiplies a cosine."""
        scale: Tensor = self.model.logit_scale
        return scale.float()

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device=device, dtype=dtype)
        self.dtype = dtype

    def prepare(self, images: np.ndarray) -> Tensor:
        """float32 [B, 3, size, size] of `images` uint8 [B, H, W, 3], as the folder's own settings say."""
        return _prepared(self._processor, images)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Numbers and mask int64 [B, max_tokens]: a longer prompt loses its end, as in CLIP itself. Threads must take
        turns: the tokenizer keeps how it cuts."""
        asked = {"padding": "max_length", "truncation": True, "max_length": self.max_tokens, "return_tensors": "pt"}
        found = self._tokenizer(list(prompts), **asked)
        return found["input_ids"], found["attention_mask"]

    def image_vectors(self, pixels: Tensor) -> Tensor:
        """float32 [B, width] of what `prepare` gave."""
        found = self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return functional.normalize(found.float(), dim=-1)

    def text_vectors(self, tokens: tuple[Tensor, Tensor]) -> Tensor:
        """float32 [B, width] of what `tokenize` gave."""
        numbers, mask = (each.to(self.device) for each in tokens)
        found = self.model.get_text_features(input_ids=numbers, attention_mask=mask).pooler_output
        return functional.normalize(found.float(), dim=-1)


def _problems(folder: Path, *, weights: bool = True) -> Iterator[tuple[str, str]]:
    """What is wrong with a CLIP's folder, and the remedy."""
    found = [(f"{name}: {problem}", to) for name, problem, to in inspect_alone(folder, _PARTS, weights=weights)]
    found += [(f"{name}: {problem}", to) for name, problem, to in faults(folder, _PROCESSORS)]
    yield from found
    if found:
        return
    try:
        described = read_json(folder / "config.json")
        text, vision = (described.get(half) for half in ("text_config", "vision_config"))
        if not isinstance(text, dict) or not isinstance(vision, dict):
            raise Damaged("config.json: has no text_config and vision_config, as a whole CLIP has")
        vocabulary = text.get("vocab_size", 49408)  # as above
        highest = read_tokenizer(folder, "clip")["highest_id"]
        if type(vocabulary) is not int or highest >= vocabulary:
            raise Damaged(f"CLIPTokenizer: has a token {highest}, and text_config.vocab_size is {vocabulary}")
        size = vision.get("image_size", 224)
        prepared = _prepared(CLIPImageProcessorPil(**_preparation(folder)), np.zeros((1, 5, 8, 3), np.uint8))
        if prepared.shape != (1, 3, size, size):
            made = " x ".join(map(str, prepared.shape[2:]))
            raise Damaged(f"image settings: make {made} pixels, and vision_config.image_size is {size}")
    except (Damaged, OSError) as error:
        yield str(error), _REMEDY
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        yield f"has values of the wrong type ({error})", _REMEDY


def _prepared(processor: Any, images: np.ndarray) -> Tensor:
    found: Tensor = processor(list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return found


def _preparation(folder: Path) -> dict[str, Any]:
    """What the folder says of how images are prepared. Raises Damaged."""
    nested, own = ((read_json(folder / name) if (folder / name).is_file() else {}) for name in _PROCESSORS)
    inner = nested.get("image_processor")
    found: Mapping[str, Any] = inner if isinstance(inner, dict) else own
    if not found:
        raise Damaged(f"{_PROCESSORS[1]} is missing, which says how images are prepared")
    kind = found.get("image_processor_type", found.get("feature_extractor_type"))
    if kind not in _KINDS:
        raise Damaged(f"{_PROCESSORS[1]} says {str(kind)[:80]}, and only {_KINDS[0]} is supported")
    kept = {name: found[name] for name in _FIELDS if name in found}
    for name, _, value in walk({name: kept[name] for name in ("size", "crop_size") if name in kept}):
        if not isinstance(value, dict) and value is not None and not (type(value) is int and 0 < value <= _MOST_PIXELS):
            raise Damaged(f"{name} is {str(value)[:40]}, and must be a whole number from 1 to {_MOST_PIXELS:,}")
    if "resample" in kept and (type(kept["resample"]) is not int or not 0 <= kept["resample"] < _RESAMPLERS):
        raise Damaged(f"resample is {str(kept['resample'])[:40]}, and must be from 0 to {_RESAMPLERS - 1}")
    return kept


def _refuse(source: str, problems: Iterator[tuple[str, str]]) -> None:
    """Raises ConfigError with all of `problems` if there are any."""
    found = [Problem("source", source, problem, remedy) for problem, remedy in problems]
    if found:
        raise ConfigError(found)


def _bad(source: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("source", source, problem, remedy)])

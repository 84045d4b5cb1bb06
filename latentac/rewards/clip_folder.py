"""A CLIP of others as transformers keeps it: a folder or a hub id, judged and loaded as the backbones' parts are.

Read are config.json, safetensors weights, the tokenizer's files, and what says how images are prepared. No pickle, no
code, no link that leads out of the folder, and nothing from a network but the files of a hub id.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from latentac.backbones.inspection import inspect_alone
from latentac.backbones.layout import Part
from latentac.backbones.loading import load, load_tokenizer
from latentac.backbones.vocabulary import read_tokenizer
from latentac.rewards import folders
from latentac.rewards.conversion import command
from latentac.rewards.image_settings import PROCESSORS, check_size, image_processor, prepared
from latentac.rewards.network import ModelNetwork
from latentac.system.errors import ConfigError
from latentac.system.modelfiles import Damaged, faults, read_json

_MODEL = Part(".", "text_encoder", ("CLIPModel",))
_TOKENIZER = Part(".", "tokenizer", ("CLIPTokenizer",))
_PARTS = (_MODEL, _TOKENIZER)
_REMEDY = "Use a folder that CLIPModel and CLIPProcessor of transformers have saved, or a hub id (owner/name)"


def locate(source: str, revision: str = "", conversion: str = "") -> Path:
    """The folder on this machine of the CLIP that `source` names, fetched if need be, and inspected.

    source: a folder or a hub id; revision: a commit, tag or branch of a hub id; conversion: the kind of `latentac
    convert-weights` that makes it, if it is published as a pickle. Raises ConfigError with all that is wrong.
    """
    remedy = f"Use a folder that `{command(conversion, 'FILE')}` has written" if conversion else _REMEDY
    saved = "Load it with CLIPModel where you trust it, and call save_pretrained"
    return folders.locate(source, revision, folders.Format(files, problems, remedy, saved, conversion))


def width(folder: Path) -> int:
    """Of the vectors that images and texts are mapped to."""
    return int(read_json(folder / "config.json").get("projection_dim", 512))  # CLIPConfig's own default


class Clip(ModelNetwork):
    """Unit vectors of images and texts. Calls of `images` and `texts` may come from several threads; those of `move`
    may not come beside them."""

    def __init__(self, source: str, folder: Path, dtype: torch.dtype) -> None:
        """On the CPU. Raises ConfigError where the files do not belong to each other."""
        self.dtype, cpu = dtype, torch.device("cpu")
        try:
            self.model = load(CLIPModel, folder, _MODEL, cpu, dtype)
            self._tokenizer = load_tokenizer(CLIPTokenizer, folder, _TOKENIZER)
        except ConfigError as error:  # reported as a backbone's
            raise folders.as_source(source, error) from error
        self._processor = image_processor(folder)
        self.max_tokens = min(self.model.config.text_config.max_position_embeddings, self._tokenizer.model_max_length)

    @property
    def size(self) -> int:
        """Pixels a side of the images that it sees."""
        return int(self.model.config.vision_config.image_size)

    @property
    def logit_scale(self) -> Tensor:
        """float32 [], of which the exponential multiplies a cosine."""
        scale: Tensor = self.model.logit_scale
        return scale.float()

    def prepare(self, images: np.ndarray) -> Tensor:
        """float32 [B, 3, size, size] of `images` uint8 [B, H, W, 3], as the folder's own settings say."""
        return prepared(self._processor, images)

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


def files(names: Collection[str]) -> set[str]:
    """Those of a folder's file names that are used."""
    return {*_MODEL.files(names), *_TOKENIZER.files(names), *(name for name in PROCESSORS if name in names)}


def problems(folder: Path, *, weights: bool = True) -> Iterator[tuple[str, str]]:
    """What is wrong with a CLIP's folder, and the remedy."""
    found = [(f"{name}: {problem}", to) for name, problem, to in inspect_alone(folder, _PARTS, weights=weights)]
    found += [(f"{name}: {problem}", to) for name, problem, to in faults(folder, PROCESSORS)]
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
        check_size(folder, size)
    except (Damaged, OSError) as error:
        yield str(error), _REMEDY
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        yield f"has values of the wrong type ({error})", _REMEDY

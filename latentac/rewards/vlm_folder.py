"""A model of images and text that answers in text, as transformers keeps it: a folder or a hub id, judged and loaded.

Read are config.json, safetensors weights, and the files of the tokenizer and of the images' settings. No pickle, no
code, and no chat template, which is a program: the reward's settings say how a question is put.
"""

import inspect
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from latentac.backbones.inspection import inspect_alone
from latentac.backbones.layout import Part
from latentac.backbones.loading import load
from latentac.rewards import folders
from latentac.rewards.network import ModelNetwork
from latentac.system.errors import ConfigError, describe
from latentac.system.modelfiles import Damaged, faults, read_json

_PROCESSOR = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "processor_config.json", "preprocessor_config.json"),
)
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")
_KEPT = ("add_bos_token", "add_eos_token", "legacy", "image_token")
"""Of tokenizer_config.json, beside what every tokenizer's has: marks and switches."""
_REMEDY = (
    "Use a folder that a model for image-text-to-text of transformers was saved to with its processor, or a hub id"
)
_SAVED = "Load it with AutoModelForImageTextToText where you trust it, and call save_pretrained"


def locate(source: str, revision: str = "") -> Path:
    """The folder on this machine that `source` names, fetched if need be, and inspected. Raises ConfigError."""
    return folders.locate(source, revision, folders.Format(files, problems, _REMEDY, _SAVED))


def files(names: Collection[str]) -> set[str]:
    """Those of a folder's file names that are used."""
    part = Part(".", "model", ("any",))
    return {*part.files(names), *(name for name in _PROCESSOR if name in names)}


def problems(folder: Path, *, weights: bool = True) -> Iterator[tuple[str, str]]:
    """What is wrong with a folder, and the remedy."""
    try:
        part = _part(folder)
    except (Damaged, OSError) as error:
        yield str(error), _REMEDY
        return
    found = [(f"{name}: {problem}", to) for name, problem, to in inspect_alone(folder, (part,), weights=weights)]
    found += [(f"{name}: {problem}", to) for name, problem, to in faults(folder, _PROCESSOR)]
    if not any((folder / name).exists() for name in _TOKENIZERS):
        found.append((f"tokenizer: has none of {', '.join(_TOKENIZERS)}", "Save its processor there too"))
    yield from found
    if not found:
        try:
            processor(folder)
        except Damaged as error:
            yield str(error), _REMEDY


def _part(folder: Path) -> Part:
    """The model in `folder`. Raises Damaged for one that gives no text after an image and a text."""
    if not (folder / "config.json").is_file():
        raise Damaged("has no config.json")
    described = read_json(folder / "config.json")
    listed = described.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else "no class"
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(str(described.get("model_type")), ())
    if name not in ({known} if isinstance(known, str) else set(known)):
        raise Damaged(f"config.json says {name[:80]}, which is no model for image-text-to-text of transformers")
    if "logits_to_keep" not in inspect.signature(getattr(transformers, name).forward).parameters:
        raise Damaged(f"{name} does not take logits_to_keep, by which the next token alone is computed")
    return Part(".", "model", (name,))


def processor(folder: Path) -> Any:
    """The folder's tokenizer and image settings as one object of transformers. Raises Damaged."""
    try:
        with folders.view(folder, _PROCESSOR) as view:
            _keep_marks(folder / "tokenizer_config.json", view / "tokenizer_config.json")
            found = transformers.AutoProcessor.from_pretrained(view, local_files_only=True, trust_remote_code=False)
    except (Damaged, OSError) as error:
        raise Damaged(f"processor: {error}") from error
    except Exception as error:
        raise Damaged(f"processor: cannot be loaded ({describe(error, 300)})") from error
    if getattr(found, "tokenizer", None) is None or getattr(found, "image_processor", None) is None:
        raise Damaged("processor: has no tokenizer or no image settings")
    if found.tokenizer.pad_token is None:
        found.tokenizer.pad_token = found.tokenizer.eos_token  # what is padded is masked
    return found


def _keep_marks(given: Path, reduced: Path) -> None:
    if reduced.is_file():
        all_of_it = read_json(given)
        kept = {name: all_of_it[name] for name in _KEPT if isinstance(all_of_it.get(name), bool | str)}
        reduced.write_text(json.dumps({**read_json(reduced), **kept}, ensure_ascii=False), encoding="utf-8")


class Vlm(ModelNetwork):
    """Probabilities of an answer's first token. Calls of `ask` must take turns: the tokenizer keeps how it pads."""

    def __init__(self, source: str, folder: Path, dtype: torch.dtype) -> None:
        """On the CPU. Raises ConfigError where the files do not belong to each other."""
        self.dtype = dtype
        try:
            part = _part(folder)
            self.model = load(getattr(transformers, part.classes[0]), folder, part, torch.device("cpu"), dtype)
            self.processor = processor(folder)
        except ConfigError as error:
            raise folders.as_source(source, error) from error
        except Damaged as error:
            raise folders.bad(source, str(error), _REMEDY) from error

    def ask(self, images: np.ndarray, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """What the model takes, of `images` uint8 [B, H, W, 3] and texts with a mark for the image each."""
        return inputs(self.processor, images, texts)

    def probabilities(self, asked: Mapping[str, Tensor], answer: int) -> Tensor:
        """float32 [B]: of the token `answer` as the first one that is generated, over the whole vocabulary.

        Texts are padded at their end: what comes later does not reach a causal model's output at the last token.
        """
        given = {name: self._placed(tensor) for name, tensor in asked.items()}
        last = given["attention_mask"].sum(dim=1) - 1
        places, own = torch.unique(last, return_inverse=True)
        logits = self.model(**given, use_cache=False, logits_to_keep=places).logits
        rows = logits[torch.arange(len(last), device=logits.device), own].float()
        found: Tensor = rows.softmax(dim=-1)[:, answer]
        return found

    def _placed(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype)


def inputs(maker: Any, images: np.ndarray, texts: Sequence[str]) -> Mapping[str, Tensor]:
    """What a processor makes of images and texts, padded at the end."""
    asked = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    found = maker(images=[[image] for image in images], text=list(texts), **asked)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def without_marks(maker: Any, text: str) -> str:
    """A text in which no token has a meaning of its own, such as the mark for an image."""
    marks = {*maker.tokenizer.all_special_tokens, getattr(maker, "image_token", "<image>")}
    for mark in sorted(filter(None, marks), key=len, reverse=True):
        text = text.replace(str(mark), " ")
    return text


def first_token(maker: Any, answer: str) -> int | None:
    """Of an answer; None for one that the vocabulary does not have."""
    tokens = maker.tokenizer.encode(answer, add_special_tokens=False)
    return None if not tokens or tokens[0] == maker.tokenizer.unk_token_id else int(tokens[0])

"""An instance segmentation model as transformers keeps it (Mask2Former): a folder or a hub id, judged and loaded."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from latentac.backbones.inspection import inspect_alone
from latentac.backbones.layout import Part
from latentac.backbones.loading import load
from latentac.rewards import folders
from latentac.rewards.geneval_tasks import Detection
from latentac.rewards.network import ModelNetwork
from latentac.system.errors import ConfigError, describe
from latentac.system.modelfiles import Damaged, faults, read_json

_MODEL = Part(".", "model", ("Mask2FormerForUniversalSegmentation",))
_PROCESSOR = ("preprocessor_config.json",)
_REMEDY = "Use a folder that Mask2FormerForUniversalSegmentation of transformers has saved, or a hub id (owner/name)"
_SAVED = "Load it with Mask2FormerForUniversalSegmentation where you trust it, and call save_pretrained"
_MOST = 100  # findings of an image, as published


def locate(source: str, revision: str = "") -> Path:
    """The folder on this machine that `source` names, fetched if need be, and inspected. Raises ConfigError."""
    return folders.locate(source, revision, folders.Format(files, problems, _REMEDY, _SAVED))


def files(names: Collection[str]) -> set[str]:
    """Those of a folder's file names that are used."""
    return {*_MODEL.files(names), *(name for name in _PROCESSOR if name in names)}


def problems(folder: Path, *, weights: bool = True) -> Iterator[tuple[str, str]]:
    """What is wrong with a folder, and the remedy."""
    found = [(f"{name}: {problem}", to) for name, problem, to in inspect_alone(folder, (_MODEL,), weights=weights)]
    found += [(f"{name}: {problem}", to) for name, problem, to in faults(folder, _PROCESSOR)]
    yield from found
    if not found:
        try:
            labels(folder)
            _processor(folder)
        except (Damaged, OSError) as error:
            yield str(error), _REMEDY


def labels(folder: Path) -> list[str]:
    """The classes, by number. Raises Damaged."""
    given = read_json(folder / "config.json").get("id2label")
    if not isinstance(given, dict) or set(given) != set(map(str, range(len(given)))) or not given:
        raise Damaged("config.json: id2label does not name the classes from 0 on")
    return [str(given[str(number)]) for number in range(len(given))]


def _processor(folder: Path) -> Any:
    """Raises Damaged."""
    if not (folder / _PROCESSOR[0]).is_file():
        raise Damaged(f"{_PROCESSOR[0]} is missing, which says how images are prepared")
    try:
        with folders.view(folder, _PROCESSOR) as view:
            found = Mask2FormerImageProcessorPil.from_pretrained(view, local_files_only=True)
            found([np.zeros((8, 8, 3), np.uint8)], return_tensors="pt", input_data_format="channels_last")
    except Damaged:
        raise
    except Exception as error:
        raise Damaged(f"{_PROCESSOR[0]}: cannot be used ({describe(error, 200)})") from error
    return found


class Detector(ModelNetwork):
    """Calls of `find` may come from several threads; those of `move` may not come beside them."""

    def __init__(self, source: str, folder: Path, dtype: torch.dtype) -> None:
        """On the CPU. Raises ConfigError where the files do not belong to each other."""
        self.dtype = dtype
        try:
            self.model = load(Mask2FormerForUniversalSegmentation, folder, _MODEL, torch.device("cpu"), dtype)
            self.labels, self._processor = labels(folder), _processor(folder)
        except ConfigError as error:
            raise folders.as_source(source, error) from error
        except Damaged as error:
            raise folders.bad(source, str(error), _REMEDY) from error

    def find(self, images: np.ndarray, threshold: float) -> list[list[tuple[str, Detection]]]:
        """What is in each of `images` uint8 [B, H, W, 3] with a score above `threshold`, with masks."""
        given = self._processor(list(images), return_tensors="pt", input_data_format="channels_last")
        pixels, seen = given["pixel_values"].to(self.device, self.dtype), given["pixel_mask"].to(self.device)
        found = self.model(pixel_values=pixels, pixel_mask=seen)
        size = (int(images.shape[1]), int(images.shape[2]))
        return [
            self._findings(classes.float(), masks.float(), one, (size, tuple(pixels.shape[-2:])), threshold)
            for classes, masks, one in zip(found.class_queries_logits, found.masks_queries_logits, seen, strict=True)
        ]

    def _findings(
        self, classes: Tensor, masks: Tensor, seen: Tensor, sizes: tuple[Any, Any], threshold: float
    ) -> list[tuple[str, Detection]]:
        """Of one image. classes: [Q, classes + 1]; masks: [Q, h, w]; seen: [H', W'], what is no padding; sizes: of the
        image, and of what the model saw. A score is that of the class times the mean of the mask within itself."""
        scores = classes.softmax(dim=-1)[:, :-1].flatten()
        best, places = scores.topk(min(_MOST, len(scores)))
        few = places[best > threshold]  # the mask's part is at most 1
        found = []
        for place in few.tolist():
            query, kind = divmod(place, len(self.labels))
            whole = functional.interpolate(masks[query][None, None], sizes[1], mode="bilinear", align_corners=False)
            height, width = int(seen.any(dim=1).sum()), int(seen.any(dim=0).sum())
            own = whole[..., :height, :width]
            own = functional.interpolate(own, sizes[0], mode="bilinear", align_corners=False)[0, 0]
            inside = own > 0
            if not bool(inside.any()):
                continue
            score = float(scores[place] * own.sigmoid()[inside].mean())
            if score > threshold:
                mask = inside.cpu().numpy()
                found.append((self.labels[kind], Detection(box_of(mask), score, mask)))
        return found


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around the True of a mask: left, top, and one beyond right and bottom."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)

"""Published pickles as tensors of the classes that are used here. It runs in a process without a network.

See `conversion.py`, which starts it. Three layouts are known, tensor by tensor; whatever is missing, left over, of
another shape or not finite is an error, so a file of another kind is not converted into something that looks like one.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentac.system import isolation
from latentac.system.errors import ConfigError, LatentacError, Problem, describe
from latentac.system.lifetime import die_with_parent
from latentac.system.modelfiles import Damaged, check, plain, read_json
from latentac.system.reading import parse_json

_RECORD = "conversion.json"
_FETCH = "Fetch the published file again, and name its kind"
Renames = Sequence[tuple[str, str]]
"""Regular expressions that match a whole name, and what it becomes."""

_BLOCK = r"(visual\.)?transformer\.resblocks\.(\d+)\."
_CLIP: Renames = (
    (r"logit_scale", "logit_scale"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (r"text_projection", "text_projection.weight"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (_BLOCK + r"ln_([12])\.(weight|bias)", r"\1layers.\2.layer_norm\3.\4"),
    (_BLOCK + r"attn\.in_proj_(weight|bias)", r"\1layers.\2.self_attn.qkv.\3"),
    (_BLOCK + r"attn\.out_proj\.(weight|bias)", r"\1layers.\2.self_attn.out_proj.\3"),
    (_BLOCK + r"mlp\.c_fc\.(weight|bias)", r"\1layers.\2.mlp.fc1.\3"),
    (_BLOCK + r"mlp\.c_proj\.(weight|bias)", r"\1layers.\2.mlp.fc2.\3"),
)
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
"""open_clip multiplies by these from the right."""

_IMAGE_REWARD: Renames = (
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.norm\.(weight|bias)", r"vision.post_layernorm.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(\w+)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)", r"vision.encoder.layers.\1.mlp.fc\2.\3"),
    (r"blip\.text_encoder\.(embeddings|encoder)\.(.+)", r"text.\1.\2"),
    (r"mlp\.layers\.(\d+)\.(weight|bias)", r"head.\1.\2"),
)
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|.*\.position_ids")
"""Of BLIP's pretraining, and numbers that are counted anew."""


def renamed(state: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    """The tensors under their new names. Raises Damaged for a name that no rule knows."""
    found = {}
    for name, tensor in state.items():
        if _UNUSED.fullmatch(name):
            continue
        for pattern, replacement in renames:
            match = re.fullmatch(pattern, name)
            if match:
                found[match.expand(replacement)] = tensor
                break
        else:
            raise Damaged(f"holds {name[:80]!r}, which the published file does not have")
    return found


def clip_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of open_clip's CLIP as CLIPModel of transformers names them: query, key and value apart, projections
    transposed. Raises Damaged."""
    found: dict[str, Tensor] = {}
    for name, tensor in renamed(state, _CLIP).items():
        own = re.sub(r"^(visual\.)?layers\.", lambda half: f"{_half(half[1])}.encoder.layers.", name)
        if ".qkv." in own:
            for part, piece in zip("qkv", tensor.chunk(3), strict=False):
                found[own.replace("qkv", f"{part}_proj")] = piece
        else:
            found[own] = tensor.T if own in _TRANSPOSED else tensor
    return found


def _half(visual: str | None) -> str:
    return "vision_model" if visual else "text_model"


def _hpsv2(content: Mapping[str, Any], like: Path, to: Path) -> None:
    tensors = clip_tensors(_state(content.get("state_dict")))
    from transformers import CLIPConfig, CLIPModel  # seconds, which a file of another kind need not wait for

    from latentac.rewards import clip_folder

    described = plain("config.json", read_json(like / "config.json"))
    _compare(tensors, lambda: CLIPModel(CLIPConfig(**described)))
    names = clip_folder.files([path.name for path in like.iterdir()])
    _copy(like, to, {name for name in names if not name.endswith((".safetensors", ".index.json"))})
    _save(tensors, to / "model.safetensors")
    _check(clip_folder.problems(to))


def _image_reward(content: Mapping[str, Any], like: Path, to: Path) -> None:
    tensors = renamed(_state(content), _IMAGE_REWARD)
    from latentac.rewards import blip_folder

    described = blip_folder.description({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    _compare(tensors, lambda: blip_folder.empty(described))
    _copy(like, to, set(blip_folder.TOKENIZER))
    _write(to / "config.json", described)
    _write(to / "preprocessor_config.json", blip_folder.image_settings(described))
    _save(tensors, to / "model.safetensors")
    _check(blip_folder.problems(to))


def _aesthetic(content: Mapping[str, Any], like: Path, to: Path) -> None:
    del like
    from latentac.rewards.aesthetic import shapes

    state = _state(content)
    first = state.get("layers.0.weight")
    wanted = shapes(first.shape[-1] if first is not None and first.ndim == 2 else 0)
    _same({name: tuple(tensor.shape) for name, tensor in state.items()}, wanted)
    _save(state, to)


_MAKERS: Mapping[str, Callable[[Mapping[str, Any], Path, Path], None]] = {
    "hpsv2": _hpsv2,
    "image_reward": _image_reward,
    "aesthetic": _aesthetic,
}


def _load(file: Path) -> Mapping[str, Any]:
    """What a pickle holds, where it holds tensors and plain values alone. Raises Damaged."""
    try:
        try:  # mapped, so that of a large file only what is used is read
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the older form cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        first = describe(error, 200).partition(" This file can still be loaded")[0]
        raise Damaged(f"is no checkpoint that can be read without running code ({first})") from error
    if not isinstance(content, Mapping):
        raise Damaged(f"holds a {type(content).__name__}, not tensors by name")
    return content


def _state(content: object) -> dict[str, Tensor]:
    """Raises Damaged where `content` is not tensors by name, or where one is not finite."""
    if not isinstance(content, Mapping) or not content:
        raise Damaged("holds no tensors where the published file has them")
    found: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise Damaged(f"holds {str(name)[:80]!r}, which is no tensor")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Damaged(f"{name[:80]} is not finite")
        found[name] = tensor
    return found


def _compare(tensors: Mapping[str, Tensor], make: Callable[[], Any]) -> None:
    """Raises Damaged where `tensors` are not those of the module that `make` makes."""
    with torch.device("meta"):
        module = make()
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    _same({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted)


def _same(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted({*wanted, *found}):
        if found.get(name) != wanted.get(name):
            here, there = (list(each[name]) if name in each else "missing" for each in (found, wanted))
            raise Damaged(f"{name[:80]} is {here} in it, and {there} in the model that it is converted for")


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """In the dtype that they have."""
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, {"format": "pt"})


def _copy(like: Path, to: Path, names: set[str]) -> None:
    there = sorted(name for name in names if (like / name).exists())
    check(like, *there)
    to.mkdir()
    for name in there:
        if name.endswith(".json"):
            _write(to / name, plain(name, read_json(like / name)))
        else:
            shutil.copyfile(like / name, to / name)


def _write(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(problems: Iterator[tuple[str, str]]) -> None:
    for problem, _ in problems:
        raise Damaged(f"does not go with the folder of `like`: {problem}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make(kind: str, file: Path, to: Path, like: Path) -> dict[str, Any]:
    """Convert `file` to the new folder or file `to`; what was read and written. Raises ConfigError."""
    read = _sha256(file)
    try:
        _MAKERS[kind](_load(file), like, to)
    except Damaged as error:
        raise ConfigError([Problem("from", str(file), str(error), _FETCH)]) from error
    weights = to / "model.safetensors" if to.is_dir() else to
    answer = {"kind": kind, "from": str(file), "sha256_from": read, "sha256_weights": _sha256(weights)}
    if to.is_dir():
        _write(to / _RECORD, {**answer, "from": file.name})
    return {**answer, "bytes": weights.stat().st_size, "network_refused_by": isolation.guarantee()}


def main(arguments: Sequence[str]) -> int:
    """One conversion, as JSON in the first argument; its answer or its error as JSON on stdout."""
    asked = parse_json(arguments[0])
    if not isolation.guarantee():
        raise PermissionError("checkpoints are opened in a process without a network alone")
    try:
        answer = make(asked["kind"], *(Path(asked[name]) for name in ("file", "to", "like")))
    except LatentacError as error:
        answer = {"error": error.to_dict()}
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    die_with_parent()
    raise SystemExit(main(sys.argv[1:]))

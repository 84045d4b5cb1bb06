"""Training a diffusers module whole or by low-rank adapters, and writing it as if it had always been so."""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from latentac.backbones.layout import Layout
from latentac.backbones.precision import full_precision
from latentac.backbones.weights import header
from latentac.config.learning import Policy
from latentac.system import folders
from latentac.system.errors import ConfigError, Problem
from latentac.system.modelfiles import Damaged, check


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


def adapted(module: Any, file: Path, layout: Layout) -> Any:
    """A module with the adapters that `save` wrote to `file`, frozen and in eval mode. It shares all other weights with
    `module`, which stays as it is: both can be used at the same time.

    Raises ConfigError where the file does not have exactly the adapters of this module, before they are allocated.
    """
    rank = _check(module, file, layout)
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    other = copy.deepcopy(module, shared)
    other.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layout.adapted)))
    weights = {name.removeprefix(f"{layout.network}."): tensor for name, tensor in load_file(file).items()}
    set_peft_model_state_dict(other, weights)
    return other.eval().requires_grad_(False)


@torch.no_grad()
def merge(module: nn.Module, file: Path, layout: Layout) -> None:
    """Add the adapters that `save` wrote to `file` to the weights of `module`. Raises ConfigError as `adapted` does."""
    _check(module, file, layout)
    weights = load_file(file)
    for name, layer in _layers(module, layout).items():
        change = weights[f"{name}.lora_B.weight"].float() @ weights[f"{name}.lora_A.weight"].float()
        layer.weight.copy_(layer.weight.float() + change.to(layer.weight.device))


def _check(module: nn.Module, file: Path, layout: Layout) -> int:
    """The rank of the adapters in `file`. Raises ConfigError unless they are those of `module`."""
    try:
        check(file.parent, file.name)
        return _rank(file.name, header(file), _layers(module, layout))
    except (Damaged, OSError) as error:
        remedy = "Use the adapter with the base that it was trained on"
        raise ConfigError([Problem("backbone.source", str(file), str(error), remedy)]) from None


def _layers(module: nn.Module, layout: Layout) -> dict[str, nn.Linear]:
    """Each layer that gets adapters, by its name in the file."""
    suffixes = tuple(f".{name}" for name in layout.adapted)
    return {
        f"{layout.network}.{name}": layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and f".{name}".endswith(suffixes)
    }


def _rank(file: str, found: Mapping[str, tuple[int, ...]], layers: Mapping[str, nn.Linear]) -> int:
    """The rank of the adapters in a file, tensor name -> shape, that belong to these layers. Raises Damaged."""
    ranks = {shape[0] for name, shape in found.items() if name.endswith(".lora_A.weight") and shape}
    if len(ranks) != 1:
        raise Damaged(f"{file} has adapters of {len(ranks)} ranks, and must have one")
    (rank,) = ranks
    wanted: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        wanted[f"{name}.lora_A.weight"] = (rank, layer.in_features)
        wanted[f"{name}.lora_B.weight"] = (layer.out_features, rank)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            problem = f"{name} is {_shape(found.get(name))}, and this base needs {_shape(wanted.get(name))}"
            raise Damaged(f"{file}: {problem}")
    return rank


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"of shape {list(shape)}"

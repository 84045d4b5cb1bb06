"""Training a diffusers module whole or by low-rank adapters, and writing it as if it had always been so."""

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentac.backbones.layout import Layout
from latentac.backbones.precision import full_precision
from latentac.backbones.weights import header
from latentac.config.learning import Policy
from latentac.system import folders
from latentac.system.errors import ConfigError, Problem
from latentac.system.modelfiles import Damaged, check

_BASE = ".base_layer.weight"  # ends the name of a weight that has adapters


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
    if getattr(module, "peft_config", None):
        _save_adapter(module, folder / folders.ADAPTER, part)
        module = _with_weights(module, _merged(module))
    elif module.dtype != torch.float32:
        module = _with_weights(module, dict(full_precision(module)))
    folders.write_part(module, folder / part)


def _scale(module: Any) -> float:
    (settings,) = module.peft_config.values()
    return float(settings.lora_alpha / settings.r)


@torch.no_grad()
def _merged(module: Any) -> dict[str, Tensor]:
    """The weights of an adapted module by their names without adapters, float32 on the CPU. Nothing of it is copied on
    the module's own device."""
    weights = dict(full_precision(module))
    bases = {name.removesuffix(_BASE): name for name in weights if name.endswith(_BASE)}
    for layer, name in bases.items():
        down, up = (weights.pop(f"{layer}.lora_{side}.default.weight") for side in "AB")
        base = weights.pop(name)
        weights[f"{layer}.weight"] = base + (up @ down) * _scale(module)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in weights.items()}


def _with_weights(module: Any, weights: Mapping[str, Tensor]) -> Any:
    """A module of the same configuration that consists of these very tensors."""
    with torch.device("meta"):
        empty = type(module).from_config(module.config)
    empty.load_state_dict(weights, assign=True)
    return empty


def _save_adapter(module: Any, file: Path, part: str) -> None:
    """The adapters as `load_lora_weights` of diffusers reads them, float32.

    alpha / rank is multiplied into the weights: whoever reads the file takes it as 1.
    """
    weights = {}
    for name, tensor in full_precision(module):
        if ".lora_" in name:
            scale = _scale(module) if ".lora_B." in name else 1.0
            weights[f"{part}.{name.replace('.default.', '.')}"] = (tensor * scale).contiguous()
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

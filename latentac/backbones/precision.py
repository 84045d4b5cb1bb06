"""The dtype that a network computes in, and float32 masters of the weights that are trained in a lower one."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentac.system.errors import ConfigError, Problem

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the forward passes. `auto` is bfloat16 on a GPU that computes in it, else float32.

    Raises ConfigError for float16 on a CPU, where it is slower than float32 and has no loss scaling.
    """
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if precision == "float16" and device.type == "cpu":
        remedy = "Use backbone.precision=auto, float32 or bfloat16, or a GPU"
        raise ConfigError([Problem("backbone.precision", precision, "is not supported on a CPU", remedy)])
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


class MasterWeights:
    """Float32 copies of a module's trainable weights (Micikevicius et al. 2018, sec. 3.1).

    The optimizer updates the masters. `publish` rounds them into the module. Each backward pass of the module adds its
    gradients to those of the masters, in float32, and frees its own. A float32 weight is its own master.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tensors: dict[str, nn.Parameter] = {}
        """name of the weight in the module -> its master."""
        self._rounded: list[tuple[Tensor, Tensor]] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.tensors[name] = self._master(parameter)

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dtype == torch.float32:
            return parameter
        master = nn.Parameter(parameter.detach().float())
        parameter.register_post_accumulate_grad_hook(_adds_to(master))
        parameter.master = master  # type: ignore[attr-defined]
        self._rounded.append((parameter, master))
        return master

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the module."""
        for parameter, master in self._rounded:
            parameter.copy_(master)


def _adds_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    return move


def full_precision(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight of a module by name, in float32 on the CPU: its master where it has one."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        master: Any = getattr(tensor, "master", tensor)
        yield name, master.detach().float().cpu() if master.is_floating_point() else master.detach().cpu()

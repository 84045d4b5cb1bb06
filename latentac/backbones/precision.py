"""The dtype that a network computes in, and float32 masters of the weights that are trained in a lower one, or of which
a worker has a share."""

from collections.abc import Callable, Iterator, Mapping
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

    Where the module's weights are shared out to workers (FSDP2), a master has this worker's rows, as a plain tensor
    with the attribute `shared`. That of a float32 weight has the same memory as the weight.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tensors: dict[str, nn.Parameter] = {}
        """name of the weight in the module -> its master."""
        self.pairs: list[tuple[Tensor, nn.Parameter]] = []
        """(weight of the module, its master)."""
        self._rounded: list[tuple[Tensor, Tensor]] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.tensors[name] = self._master(parameter)
                self.pairs.append((parameter, self.tensors[name]))

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        own = own_rows(parameter.detach())
        if own.dtype == torch.float32 and not is_shared(parameter):
            return parameter
        master = nn.Parameter(own.float())
        parameter.register_post_accumulate_grad_hook(_adds_to(master))
        parameter.master = master  # type: ignore[attr-defined]
        master.shared = is_shared(parameter)  # type: ignore[attr-defined]
        if own.dtype != torch.float32:
            self._rounded.append((own, master))
        return master

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put weights, by name, into masters and module."""
        for name, master in self.tensors.items():
            master.copy_(tensors[name])
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the module."""
        for own, master in self._rounded:
            own.copy_(master)


def is_shared(weight: Tensor) -> bool:
    """Whether a worker has only some rows of it: a DTensor of a module, or the master of one."""
    return getattr(weight, "shared", False) or hasattr(weight, "to_local")  # importing DTensor would take seconds


def own_rows(tensor: Tensor) -> Tensor:
    """Those of this worker; all of a tensor that is not shared out. The memory is the tensor's."""
    rows: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return rows


def _adds_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        if parameter.grad is not None:
            gradient = own_rows(parameter.grad).float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    return move


def full_precision(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight of a module by name, in float32 on the CPU: its master where it has one."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        master: Any = getattr(tensor, "master", tensor)
        yield name, master.detach().float().cpu() if master.is_floating_point() else master.detach().cpu()

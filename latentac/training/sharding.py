"""FSDP2: each worker holds a share of every weight, of its gradient, and of what the optimizer knows of it.

A forward pass gathers the weights of one layer after the other, and frees them again. A backward pass does the same,
and each worker gets the sum of the gradients of its own share. So each forward and each backward pass is a collective
operation: all workers must do the same number of them.

The optimizer, the EMA and the checkpoints see the shares as plain float32 tensors (`MasterWeights`). A checkpoint has
whole tensors, so it does not depend on the number of workers, nor on sharding.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from latentac.backbones import Denoiser
from latentac.backbones.precision import is_shared
from latentac.method.diffusion import Prediction
from latentac.method.records import Conditioning
from latentac.training.distributed import Mesh


class Sharding:
    """How weights lie on the workers of `mesh`: each worker has all of them, or its share.

    active: whether there are shares. One worker alone has everything.
    """

    def __init__(self, mesh: Mesh, wanted: bool) -> None:
        self.mesh, self.active = mesh, wanted and mesh.size > 1

    def shard(self, backbone: Denoiser) -> Denoiser:
        """The denoiser with this worker's share of its weights alone; `backbone` itself if there are no shares."""
        return cast(Denoiser, _Sharded(backbone, self.mesh)) if self.active else backbone

    def whole(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """All rows of a tensor that belongs to `weight`, such as Adam's moments of it. All workers call it together;
        only the leading one gets the rows, in the host's memory."""
        if not (self.active and is_shared(weight) and tensor.ndim):
            return tensor
        rows = self.mesh.gather(tensor)
        return rows.cpu() if self.mesh.leads else rows[:0]

    def own(self, tensor: Tensor, weight: Tensor) -> Tensor:
        """Undo `whole`: this worker's rows."""
        if not (self.active and is_shared(weight) and tensor.ndim):
            return tensor
        each = -(-len(tensor) // self.mesh.size)
        return tensor[self.mesh.rank * each : (self.mesh.rank + 1) * each].clone()  # without the memory of the others

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the workers, where each has a share of what is summed."""
        return self.mesh.gather(tensor[None]).sum(0) if self.active else tensor

    def clip(self, weights: Sequence[Tensor], most: float) -> Tensor:
        """Limit the L2 norm of the gradients, of all shares together, to `most`. Returns the norm before."""
        if not self.active:
            return clip_grad_norm_(weights, most)
        parts = [[weight for weight in weights if is_shared(weight) is kind] for kind in (True, False)]
        squares = [get_total_norm([w.grad for w in part if w.grad is not None]).square() for part in parts]
        norm = (self.sum(squares[0].to(self.mesh.device)) + squares[1].to(self.mesh.device)).sqrt()
        clip_grads_with_norm_(weights, most, norm)
        return norm

    def idle(self, passes: int) -> int:
        """How many passes this worker has to add to the `passes` that it is going to do, so that each worker does as
        many. All workers call it together, before their passes."""
        if not self.active:
            return 0
        return int(self.mesh.gather(torch.tensor([passes], device=self.mesh.device)).max()) - passes


class _Sharded:
    """A denoiser whose weights are shared out. Everything but `predict` is the denoiser's own."""

    def __init__(self, backbone: Denoiser, mesh: Mesh) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        # Nothing changes a tap in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        self._backbone, self._forward = backbone, _Forward(backbone)
        workers = init_device_mesh(mesh.device.type, (mesh.size,))
        sums = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for unit in [*_units(backbone.module), self._forward]:
            # Whole weights would be out of date after the next update, so the outermost unit frees its own, too.
            fully_shard(unit, mesh=workers, reshard_after_forward=True, mp_policy=sums)
        for module in self._forward.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum, as without sharding
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[Prediction, dict[str, Tensor]]:
        clean, noise, taps = self._forward(latents, sigma, conditioning.tokens, conditioning.pooled)
        return Prediction(clean, noise), taps


class _Forward(nn.Module):
    """A denoiser's `predict` as the forward pass of a module, for FSDP2 gathers weights around forward passes. The taps
    are among its outputs: a gradient may come through them alone."""

    def __init__(self, backbone: Denoiser) -> None:
        super().__init__()
        self.module, self._predict = backbone.module, backbone.predict

    def forward(
        self, latents: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        prediction, taps = self._predict(latents, sigma, Conditioning(tokens, pooled))
        return prediction.clean, prediction.noise, taps


def _units(network: nn.Module) -> Iterator[nn.Module]:
    """The parts whose weights are gathered together: each entry of the network's lists of blocks, and each other part
    that has lists of its own, such as a UNet's middle. What remains belongs to the outermost unit."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(module, nn.ModuleList) for module in child.modules()):
            yield child

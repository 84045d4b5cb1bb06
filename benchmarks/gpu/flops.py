"""What an image costs in floating-point operations, and how many the device does per second at best."""

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.models import Model

BACKWARD = {"lora": 1, "full": 2}
"""Adaptation -> the cost of a backward pass in forwards. Frozen weights need no gradient, so LoRA saves half of it."""
_SECONDS = 0.5


@dataclass(frozen=True)
class Cost:
    """Operations of one forward of the network and of one decoding, for one image; parameters: of the network."""

    forward: float
    decoding: float
    parameters: int

    def image(self, steps: int, trained: int, adaptation: str) -> float:
        """Operations of an image in training: K forwards, a forward and a backward for each trained transition, and
        one decoding. What is recomputed, and what a critic adds, does not count."""
        return (steps + trained * (1 + BACKWARD[adaptation])) * self.forward + self.decoding


@torch.no_grad()
def count(model: Model) -> Cost:
    """Counted on the meta device, for one image."""
    (length, width), pooled = model.text_shapes
    with torch.device("meta"):
        network, autoencoder = model.build_network(), model.build_autoencoder()
        latents, time_step, text = torch.empty(1, *model.latent_shape), torch.empty(1), torch.empty(1, length, width)
        with FlopCounterMode(display=False) as forward:
            if pooled is None:
                network(latents, time_step, text)
            else:
                network(latents, text, torch.empty(1, pooled), time_step)
        with FlopCounterMode(display=False) as decoding:
            autoencoder.decode(latents)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(forward.get_total_flops(), decoding.get_total_flops(), parameters)


def peak(device: torch.device) -> float:
    """Operations per second of a large matrix product: bfloat16 on a GPU, float32 on a CPU; the best of several."""
    cuda = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rates, began = [], time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        started = clock(device)
        for _ in range(10):
            first @ second
        rates.append(10 * 2 * side**3 / (clock(device) - started))
    return max(rates)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""Speed of common GPUs, to estimate how long a run takes. Without torch, for the help text of a command."""

import itertools
import re

GPUS = {"h100": 989, "h200": 989, "a100": 312, "l40s": 362, "rtx4090": 165, "a10": 125, "l4": 121}
"""TFLOP/s of dense bfloat16 matrix products, from the vendors' data sheets."""


def peak_of(name: str) -> float | None:
    """TFLOP/s of the GPU that its driver calls `name`, such as "NVIDIA H100 80GB HBM3"; None where it is not known."""
    words = re.findall("[a-z0-9]+", name.lower())
    words += [first + second for first, second in itertools.pairwise(words)]  # RTX 4090
    return next((float(speed) for gpu, speed in GPUS.items() if gpu in words), None)


SHARE = 0.15
"""Share of that which a run is expected to reach. A plain training loop with LoRA reached it on an H100 at 512 px, with
Stable Diffusion 1.5 and 3.5-M. This estimate was not compared with a run of latentac."""

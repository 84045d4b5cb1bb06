"""Speed of common GPUs, to estimate how long a run takes. Without torch, for the help text of a command."""

GPUS = {"h100": 989, "h200": 989, "a100": 312, "l40s": 362, "rtx4090": 165, "a10": 125, "l4": 121}
"""TFLOP/s of dense bfloat16 matrix products, from the vendors' data sheets."""

SHARE = 0.15
"""Share of that which a run is expected to reach. A plain training loop with LoRA reached it on an H100 at 512 px, with
Stable Diffusion 1.5 and 3.5-M. This estimate was not compared with a run of latentac."""

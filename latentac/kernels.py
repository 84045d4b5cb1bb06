"""The table of kernels: those of `latentac.diffusion`, built from settings."""

from typing import Any

from latentac import diffusion
from latentac.config import Fraction
from latentac.extensions import Settings, Table

KERNELS = Table(
    "kernel",
    {
        "ddim": "latentac.kernels:DDIM",
        "flow_sde": "latentac.kernels:FlowSDE",
        "dance_sde": "latentac.kernels:DanceSDE",
        "cps": "latentac.kernels:CPS",
    },
)
"""A kernel is built as `Class(settings)`; the protocol is `latentac.diffusion.Kernel`."""


class NoiseLevel(Settings):
    """How stochastic a step is."""

    noise: Fraction = 1.0
    """eta of DDIM, the noise level of the flow kernels. 0 is deterministic."""


class _FromSettings:
    Settings = NoiseLevel

    def __init__(self, settings: NoiseLevel) -> None:
        made: Any = super()  # the kernel beside this class in a row's bases
        made.__init__(settings.noise)


class DDIM(_FromSettings, diffusion.DDIM):
    """For variance-preserving models; noise is eta."""


class FlowSDE(_FromSettings, diffusion.FlowSDE):
    """For flow models: the SDE of Flow-GRPO."""


class DanceSDE(_FromSettings, diffusion.DanceSDE):
    """For flow models: the SDE of DanceGRPO."""


class CPS(_FromSettings, diffusion.CPS):
    """For flow models: coefficient-preserving sampling."""

"""The table of kernels: those of `latentac.method.diffusion`, built from settings."""

from typing import Any

from latentac.config.extensions import Settings, Table
from latentac.config.sections import Fraction
from latentac.method import diffusion

KERNELS = Table(
    "kernel",
    {
        "ddim": "latentac.sampling.kernels:DDIM",
        "flow_sde": "latentac.sampling.kernels:FlowSDE",
        "dance_sde": "latentac.sampling.kernels:DanceSDE",
        "cps": "latentac.sampling.kernels:CPS",
    },
)
"""A kernel is built as `Class(settings)`; the protocol is `latentac.method.diffusion.Kernel`."""


class NoiseLevel(Settings):
    """How stochastic a step is."""

    noise: Fraction = 1.0
    """eta of DDIM, or the noise level of the flow kernels. 0 is deterministic."""


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

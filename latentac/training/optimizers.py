"""The policy's optimizer: AdamW, with moments in float32 or in 8 bits."""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from latentac.config.learning import Policy
from latentac.system.errors import ConfigError, Problem

_BETAS = (0.9, 0.95)
_PACKAGE = "bitsandbytes"


def missing_optimizer(settings: Policy) -> list[Problem]:
    """The problem where the configured optimizer is not installed here. Nothing is imported."""
    if settings.optimizer == "adamw" or find_spec(_PACKAGE) is not None:
        return []
    remedy = "pip install 'latentac[optimizers]', or use adamw"
    return [Problem("policy.optimizer", settings.optimizer, f"needs {_PACKAGE}, which is not installed here", remedy)]


def policy_optimizer(
    settings: Policy, parameters: Iterable[nn.Parameter], eps: float, device: torch.device
) -> torch.optim.Optimizer:
    """The configured optimizer of float32 parameters. Raises ConfigError where its package is missing or broken.

    The 8-bit one keeps moments of tensors with fewer than 4,096 numbers in float32.
    """
    given: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": _BETAS,
        "eps": eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type == "cuda", **given)
    if problems := missing_optimizer(settings):
        raise ConfigError(problems)
    try:
        library: Any = import_module(f"{_PACKAGE}.optim")
    except Exception as error:  # its native code may not fit this machine
        problem = f"{_PACKAGE} cannot be imported ({error})"
        remedy = "Install a version for this machine, or use adamw"
        raise ConfigError([Problem("policy.optimizer", settings.optimizer, problem, remedy)]) from error
    made: torch.optim.Optimizer = library.AdamW8bit(parameters, **given)
    return made

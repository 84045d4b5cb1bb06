"""The noise process of a folder's scheduler.

Which levels are sampled is latentac's own affair; how a level mixes signal and noise, and what the network predicts
there, must be what it was trained on.

A class has defaults of its own, so its configuration is read by that class, and only then as DDIM's.
"""

import inspect
import math
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from latentac.system.errors import ConfigError, Problem
from latentac.system.modelfiles import Damaged, plain, read_json

VARIANCE_PRESERVING = {
    "DDIMScheduler": "scheduling_ddim",
    "DDIMParallelScheduler": "scheduling_ddim_parallel",
    "DDPMScheduler": "scheduling_ddpm",
    "DDPMParallelScheduler": "scheduling_ddpm_parallel",
    "PNDMScheduler": "scheduling_pndm",
    "LMSDiscreteScheduler": "scheduling_lms_discrete",
    "EulerDiscreteScheduler": "scheduling_euler_discrete",
    "EulerAncestralDiscreteScheduler": "scheduling_euler_ancestral_discrete",
    "HeunDiscreteScheduler": "scheduling_heun_discrete",
    "KDPM2DiscreteScheduler": "scheduling_k_dpm_2_discrete",
    "KDPM2AncestralDiscreteScheduler": "scheduling_k_dpm_2_ancestral_discrete",
    "DEISMultistepScheduler": "scheduling_deis_multistep",
    "DPMSolverMultistepScheduler": "scheduling_dpmsolver_multistep",
    "DPMSolverSinglestepScheduler": "scheduling_dpmsolver_singlestep",
    "UniPCMultistepScheduler": "scheduling_unipc_multistep",
    "SASolverScheduler": "scheduling_sasolver",
}
"""Schedulers of models that learned to denoise x = sqrt(alpha-bar) x0 + sqrt(1 - alpha-bar) n, at whole timesteps."""

FLOW = {
    "FlowMatchEulerDiscreteScheduler": "scheduling_flow_match_euler_discrete",
    "FlowMatchHeunDiscreteScheduler": "scheduling_flow_match_heun_discrete",
}
"""Schedulers of models that learned the velocity of x = (1 - sigma) x0 + sigma n."""

PREDICTIONS = ("epsilon", "v_prediction")
_FAINTEST = 2e-5
"""Of alpha-bar: below this, float32 noise levels are too near 1 to compute the signal's share from them."""

FILE = "scheduler/scheduler_config.json"


def variance_preserving(folder: Path, source: str = "") -> Any:
    """A DDIMScheduler with the betas and the prediction type of a pipeline's scheduler. Raises ConfigError."""
    own, settings = _own(folder, VARIANCE_PRESERVING, source)

    def refuse(condition: bool, problem: str, remedy: str) -> None:
        if condition:
            raise _unsuitable(folder, source, problem, remedy)

    refuse(
        bool(settings.get("use_flow_sigmas")),
        "use_flow_sigmas is true: a flow model's noise, which is not how a UNet mixes signal and noise",
        "Use a model with a variance-preserving scheduler, or backbone.use=dit for Stable Diffusion 3",
    )
    refuse(
        settings.get("timestep_type") == "continuous",
        "timestep_type is continuous: an EDM model, which takes the noise level and not a timestep",
        f"Use a model that was trained with one of {', '.join(VARIANCE_PRESERVING)} and whole timesteps",
    )
    prediction = settings.get("prediction_type")
    refuse(
        prediction not in PREDICTIONS,
        f"prediction_type is {prediction!r}, and only {' and '.join(PREDICTIONS)} are supported",
        "Use a model that predicts the noise or v. If this one does, correct the file",
    )
    refuse(
        bool(settings.get("thresholding")),
        "thresholding is true: it changes each predicted image, and latentac does not do it",
        "Set it to false, as diffusers advises for all latent models",
    )
    # What of DDIM's settings the class does not know has no effect on it, whatever the file says.
    known = {name: settings[name] for name in _parameters(DDIMScheduler) if name in settings}
    try:
        ddim = DDIMScheduler(**known)
    except Exception as error:  # whatever the class says of the file
        raise _unsuitable(folder, source, f"DDIMScheduler cannot be built ({error})", "Correct the file") from error
    same = ddim.alphas_cumprod.shape == own.alphas_cumprod.shape
    refuse(
        not same or float((ddim.alphas_cumprod - own.alphas_cumprod).abs().max()) > 1e-6,
        f"beta_schedule {settings.get('beta_schedule')!r} gives DDIM other noise levels than {type(own).__name__}",
        "Use a scheduler with the betas that the model was trained on",
    )
    sound = ddim.betas.isfinite().all() and float(ddim.betas.min()) >= 0 and float(ddim.betas.max()) <= 1
    refuse(
        not sound or float(ddim.betas[0]) == 0,
        "its betas are not between 0 and 1, so they make no noise schedule",
        "Correct beta_start, beta_end, beta_schedule or trained_betas",
    )
    faintest = float(ddim.alphas_cumprod[-1])
    refuse(
        prediction == "epsilon" and faintest < _FAINTEST,
        f"the last timestep has no signal (alpha-bar {faintest:.1g}; rescale_betas_zero_snr is "
        f"{settings.get('rescale_betas_zero_snr', False)}), and from noise alone epsilon prediction recovers nothing",
        "Set rescale_betas_zero_snr to false, or use a v_prediction model, which is trained for zero terminal SNR",
    )
    return ddim


def flow_shift(folder: Path, cells: int, source: str = "") -> tuple[float, int]:
    """The shift of a flow's levels towards noise, and the number of timesteps; `cells`: image tokens, by which dynamic
    shifting goes. Raises ConfigError."""
    _, settings = _own(folder, FLOW, source)
    for name in ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if settings.get(name):
            problem = f"{name} is {settings[name]!r}: levels that latentac's own schedule does not follow"
            raise _unsuitable(folder, source, problem, f"Set {name} to null or false: Stable Diffusion 3 has it so")
    shift = float(settings.get("shift", 1.0))
    if settings.get("use_dynamic_shifting"):
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        try:
            first, last, low, high = (float(settings[name]) for name in names)
            slope = (high - low) / (last - first)
            mu = cells * slope + low - slope * first
            shift = math.exp(mu) if settings.get("time_shift_type") == "exponential" else mu
        except (ArithmeticError, TypeError, ValueError, KeyError) as error:
            given = ", ".join(f"{name} {settings.get(name)!r}" for name in names)
            problem = f"use_dynamic_shifting needs four numbers that give a shift, and has {given}"
            raise _unsuitable(folder, source, problem, "Write those that the model was trained with") from error
    if not (math.isfinite(shift) and shift > 0):
        raise _unsuitable(folder, source, f"shift is {shift!r}", "Use a positive number; Stable Diffusion 3 has 3.0")
    return shift, int(settings["num_train_timesteps"])


def _own(folder: Path, known: dict[str, str], source: str) -> tuple[Any, dict[str, Any]]:
    """The scheduler of the folder as its own class reads it, and the settings that this class knows."""
    try:
        written = read_json(folder / FILE)
    except (OSError, Damaged) as error:
        problem = str(error) if isinstance(error, Damaged) else "is missing"
        raise _unsuitable(folder, source, problem, "Use a complete diffusers folder") from None
    name = str(written.get("_class_name"))
    if name not in known:
        kind = "variance-preserving" if known is VARIANCE_PRESERVING else "flow"
        problem = f"{name} is not known to be of the {kind} noise process that this backbone learned"
        raise _unsuitable(folder, source, problem, f"Supported: {', '.join(known)}")
    scheduler = getattr(import_module(f"diffusers.schedulers.{known[name]}"), name)
    try:
        kept = plain("scheduler_config.json", written)
        own = scheduler.from_config({k: v for k, v in kept.items() if k != "_use_default_values"})
    except Exception as error:  # whatever the class says of its own file
        raise _unsuitable(folder, source, f"{name} cannot be built ({error})", "Correct the file") from error
    return own, {key: own.config[key] for key in _parameters(scheduler) if key in own.config}


def _parameters(scheduler: Any) -> list[str]:
    return [name for name in inspect.signature(scheduler.__init__).parameters if name != "self"]


def _unsuitable(folder: Path, source: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("backbone.source", source or str(folder), f"{FILE}: {problem}", remedy)])

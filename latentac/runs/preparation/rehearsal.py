"""The run in small, once, before it begins: the backbone from the very copy that the run loads, a prompt, a step, a
image, the adapter, the critic. What cannot work fails here, with all that can be found together."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentac.backbones import Denoiser, load_backbone
from latentac.config.learning import Policy as PolicySettings
from latentac.config.schema import Config
from latentac.method.diffusion import num_stochastic_steps
from latentac.method.randomness import noise_for
from latentac.sampling.policy import Policy, configured_policy
from latentac.system.errors import ConfigError, LatentacError, Problem, ResourceError, describe
from latentac.training.value_pretraining import new_critic

_OTHER_MODEL = "Use a sound copy of the model, or another one"


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal found.

    latent_shape: of one latent image; image_size: (height, width); text_shape: (tokens, width) of a prompt;
    parameters, trainable: of the denoiser, counted; parameter_bytes: in memory; seconds: that it took
    images: uint8 [1, H, W, 3], what one step made of pure noise, to try rewards on
    backbone: the one that was built, made trainable; whoever needs it once more need not load it again
    """

    latent_shape: tuple[int, ...]
    image_size: tuple[int, int]
    text_shape: tuple[int, int]
    parameters: int
    trainable: int
    parameter_bytes: int
    seconds: float
    images: np.ndarray
    backbone: Denoiser

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the image and the backbone."""
        return {name: value for name, value in vars(self).items() if name not in {"images", "backbone"}}


class _Found:
    """Problems, as they are found."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, path: str, value: object, problem: str, remedy: str) -> None:
        self.problems.append(Problem(path, value, problem, remedy))

    @contextmanager
    def trying(self, path: str, value: object, what: str, remedy: str) -> Iterator[None]:
        """Note what the body raises as a problem of the field `path`, and go on behind it."""
        try:
            yield
        except ConfigError as error:
            self.problems += error.problems
        except (LatentacError, MemoryError):
            raise
        except torch.OutOfMemoryError as error:
            remedy = "Use a smaller train.block_images, policy.adaptation=lora, or a device with more memory"
            raise ResourceError(
                "backbone.device", f"has too little memory for {what} ({describe(error)})", remedy
            ) from error
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any library's failure is a finding here
            self.add(path, value, f"{what} fails: {describe(error)}", remedy)

    def stop(self) -> None:
        if self.problems:
            raise ConfigError(self.problems)


def rehearse(config: Config, folder: Path, prompt: str, device: torch.device) -> Rehearsal:
    """Build the backbone of the pipeline in `folder` on `device` and take it through all that a run asks of it.

    Raises ConfigError with every problem that it can find; what cannot be tried any more because of one is left out.
    ResourceError where memory is short.
    """
    started, found = time.monotonic(), _Found()
    with found.trying("backbone.source", config.backbone.source, "loading it", _OTHER_MODEL):
        backbone = load_backbone(config.backbone, folder, device)
    found.stop()
    with found.trying("kernel.use", config.kernel.use, "building the sampler", "Use a kernel of the backbone's kind"):
        policy = configured_policy(config, backbone)
    found.stop()
    text_shape, images = _step(config, policy, prompt, found)
    parameters = list(backbone.module.parameters())
    with found.trying("critic.body.use", config.critic.body.use, "building the critic", "Use another critic.body"):
        new_critic(config, policy)
    trainable = _adapted(config.policy, backbone, found)
    found.stop()
    return Rehearsal(
        tuple(backbone.latent_shape),
        (images.shape[1], images.shape[2]),
        text_shape,
        sum(each.numel() for each in parameters),
        trainable,
        sum(each.numel() * each.element_size() for each in parameters),
        time.monotonic() - started,
        images,
        backbone,
    )


@torch.no_grad()
def _step(config: Config, policy: Policy, prompt: str, found: _Found) -> tuple[tuple[int, int], np.ndarray]:
    """The shape of the prompt's tokens, and the image that the first step's prediction decodes to."""
    backbone, source, num_steps = policy.backbone, config.backbone.source, config.kernel.num_steps
    text_shape, images = (0, 0), np.zeros((1, 0, 0, 3), np.uint8)
    with found.trying("kernel.num_steps", num_steps, "making the schedule", "Use another number of steps"):
        sigmas = backbone.schedule(num_steps)
        _check_schedule(sigmas, num_steps, found)
        num_stochastic_steps(policy.kernel, sigmas)
    with found.trying("backbone.source", source, "encoding a prompt", _OTHER_MODEL):
        conditioning = backbone.encode([prompt])
        text_shape = conditioning.tokens.shape[1], conditioning.tokens.shape[2]
        _check_finite(conditioning.tokens, "the text encoder's output", source, found)
        if text_shape[-1] != backbone.text_width:
            problem = f"its text has width {text_shape[-1]}, and the denoiser reads {backbone.text_width}"
            found.add("backbone.source", source, problem, _OTHER_MODEL)
    found.stop()
    with found.trying("backbone.source", source, "a step", _OTHER_MODEL):
        noise = noise_for([("rehearsal",)], config.seed, 1, backbone.latent_shape).to(backbone.device)
        for step in (num_steps - 1, 0):  # the last and the first: at both ends of the noise
            sigma, sigma_next = (sigmas[k].to(backbone.device).expand(1) for k in (step, step + 1))
            output = policy.forward(noise[:, 0], sigma, sigma_next, conditioning)
            what = f"the denoiser's output at noise level {float(sigma):.3g}"
            _check_finite(torch.cat([output.prediction.clean, output.prediction.noise]), what, source, found)
            _check_finite(output.transition.mean, f"the step from noise level {float(sigma):.3g}", source, found)
            if {name: tuple(tap.shape[1:]) for name, tap in output.taps.items()} != dict(backbone.tap_shapes):
                found.add("backbone.source", source, "its feature maps are not shaped as announced", _OTHER_MODEL)
    found.stop()
    with found.trying("backbone.source", source, "decoding an image", _OTHER_MODEL):
        _check_finite(backbone.images(output.prediction.clean), "the decoded image", source, found)
        images = backbone.decode(output.prediction.clean)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[0] != 1 or images.shape[-1] != 3:
            problem = f"it decodes one latent to {images.dtype} of shape {images.shape}, not uint8 [1, H, W, 3]"
            found.add("backbone.source", source, problem, _OTHER_MODEL)
    found.stop()
    return text_shape, images


def _adapted(settings: PolicySettings, backbone: Denoiser, found: _Found) -> int:
    """How many parameters train, after the module was made trainable as the run does it."""
    remedy = "Use policy.adaptation=full, or a backbone whose attention has the usual names"
    trainable = 0
    with found.trying("policy.adaptation", settings.adaptation, "making the denoiser trainable", remedy):
        backbone.adapt(settings)
        trainable = sum(each.numel() for each in backbone.module.parameters() if each.requires_grad)
        if not trainable:
            found.add("policy.adaptation", settings.adaptation, "no parameter of the denoiser would train", remedy)
    return trainable


def _check_schedule(sigmas: Tensor, num_steps: int, found: _Found) -> None:
    falling = bool((sigmas[:-1] > sigmas[1:]).all())
    if sigmas.shape != (num_steps + 1,) or not falling or float(sigmas[-1]) != 0 or float(sigmas[0]) > 1:
        problem = "the model has no schedule of so many different noise levels that falls from at most 1 to 0"
        found.add("kernel.num_steps", num_steps, problem, "Use fewer steps")


def _check_finite(tensor: Tensor, what: str, source: str, found: _Found) -> None:
    if not bool(tensor.isfinite().all()):
        found.add("backbone.source", source, f"{what} is not finite: {_share(tensor)} NaN or infinite", _OTHER_MODEL)


def _share(tensor: Tensor) -> str:
    return f"{float((~tensor.isfinite()).float().mean()):.0%} is"

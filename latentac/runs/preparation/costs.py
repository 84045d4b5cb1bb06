"""What a run computes, step by step, in floating-point operations, and how long that takes on a GPU of known speed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentac.backbones import Denoiser
from latentac.backbones.attention import native_attention
from latentac.config.schema import Config
from latentac.evaluation.benchmark import arms
from latentac.method.diffusion import num_stochastic_steps
from latentac.method.records import Conditioning
from latentac.runs.gpus import GPUS, SHARE
from latentac.sampling.kernels import KERNELS
from latentac.sampling.steering import Steering

_BACKWARD = {"lora": 1, "full": 2}
"""Cost of a backward pass in forward passes. Frozen weights need no gradient, so LoRA saves half of it."""
_POLICIES = 2.25
"""Of evaluation: the base, the trained policy, and a quarter as many images of training prompts."""


@dataclass(frozen=True)
class Operations:
    """Floating-point operations for one image, counted. forward: of one denoising step, both rows of classifier-free
    guidance included; decoding: of the autoencoder; num_stochastic: steps that have a density."""

    forward: float
    decoding: float
    num_stochastic: int


@torch.no_grad()
def count_operations(config: Config, backbone: Denoiser, conditioning: Conditioning) -> Operations:
    """Count those of a policy's denoiser, which has its guidance, from the shapes of its tensors. Nothing is computed.

    conditioning: of one prompt. Only matrix products, convolutions and attention count. The operations of a kernel of
    one's own are not known.
    """
    # The count knows no fused attention of a CPU, so attention is counted by its matrix products.
    exact = sdpa_kernel([SDPBackend.MATH])
    with native_attention(backbone), FakeTensorMode(allow_non_fake_inputs=True), exact:
        latents = torch.zeros(1, *backbone.latent_shape, device=backbone.device)
        sigma = torch.full((1,), 0.5, device=backbone.device)
        forward, decoding = _of_forward(backbone, latents, sigma, conditioning), _of_decoding(backbone, latents)
    kernel, sigmas = KERNELS.make(config.kernel, path="kernel"), backbone.schedule(config.kernel.num_steps)
    return Operations(forward, decoding, num_stochastic_steps(kernel, sigmas))


def operations_by_step(config: Config, one: Operations) -> dict[str, float]:
    """Floating-point operations of the steps of a run, without rewards and without the heads of the critic.

    With F of a forward pass, D of the decoder, K steps, S of them stochastic, and a backward pass of b F (1 with LoRA,
    2 without):

        image            K F + D
        training image   image, S (1 + b) F for the update, and: S F for `algorithm.value_gradient` in the rollout, S F
                         for the reference of `algorithm.prediction_kl`, S F for gradient checkpointing, K F for each
                         pass of the critic over its replay, and for a critic body with its own backbone K F in the
                         rollout and K (1 + b) F in each pass
    """
    settings, steps, critic = config.algorithm.own, config.kernel.num_steps, config.critic
    image = steps * one.forward + one.decoding
    backward = _BACKWARD[config.policy.adaptation]
    stochastic = 1 + backward
    stochastic += settings.get("value_gradient", 0) > 0
    stochastic += settings.get("prediction_kl", 0) > 0
    stochastic += bool(config.backbone.own.get("gradient_checkpointing"))
    every = critic.num_passes * (critic.replay_images > 0)
    if critic.body.use in ("lora", "copy"):
        every += 1 + critic.num_passes * (1 + (1 if critic.body.use == "lora" else 2))
    trained = image + (one.num_stochastic * stochastic + steps * every) * one.forward
    pretraining, evaluation = config.pretrain, config.evaluation
    learnt = pretraining.num_images and pretraining.num_images + pretraining.num_held_out_images
    noised = pretraining.num_passes * pretraining.num_images * steps * pretraining.forward_noised
    more = 2 * evaluation.num_diversity_prompts * evaluation.images_per_prompt
    steering = arms(config.steering, [reward.weight for reward in config.rewards])
    steered = sum(_steered(arm.steering, arm.particles, steps) for arm in steering)
    return {
        "pretrain-value": learnt * image + noised * one.forward,
        "train": config.train.num_iterations * config.train.images_per_iteration * trained,
        "evaluate": (_POLICIES * evaluation.num_images + more) * image,
        "steer": config.steering.num_images * (steered * one.forward + len(steering) * one.decoding),
    }


def operations_per_image(config: Config, one: Operations) -> float:
    """Floating-point operations of training per image of an iteration."""
    train = config.train
    return operations_by_step(config, one)["train"] / train.num_iterations / train.images_per_iteration


def describe_costs(config: Config, one: Operations, gpu: str = "", price: float = 0.0) -> list[str]:
    """Lines for a person. gpu: one of `GPUS`, or "" for none; price: of an hour of one GPU, in any currency."""
    steps = operations_by_step(config, one)
    total, each = sum(steps.values()), operations_per_image(config, one)
    counts = ", ".join(f"{step} {_flop(count)}" for step, count in steps.items())
    lines = [
        f"compute: {_flop(total)} ({counts})",
        f"{_flop(one.forward)} per denoising step, {_flop(each)} per training image; rewards are not included",
    ]
    if gpu:
        hours = total / (SHARE * GPUS[gpu] * 1e12) / 3600
        speed = f"{SHARE:.0%} of its {GPUS[gpu]} TFLOP/s"
        lines.append(f"time on one {gpu}: about {hours:.3g} h at {speed}")
        lines.append("longer for slow rewards, and for a model that is too small to fill the GPU")
        if price:
            lines.append(f"cost: about {hours * price:.3g} at {price:g} per GPU-hour")
    return lines


def _steered(steering: Steering | None, particles: int, steps: int) -> int:
    """Forward passes per image; a backward pass to the latents costs as much as one."""
    gradients = len(steering.steps(steps)) if steering is not None and steering.needs_gradient else 0
    return particles * (steps + gradients)


def _of_forward(denoiser: Denoiser, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> float:
    with FlopCounterMode(display=False) as counter:
        denoiser.predict(latents, sigma, conditioning)
    return counter.get_total_flops()


def _of_decoding(backbone: Denoiser, latents: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        backbone.images(latents)
    return counter.get_total_flops()


def _flop(count: float) -> str:
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e9:.3g} GFLOP"

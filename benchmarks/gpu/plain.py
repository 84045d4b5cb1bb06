"""The field's plain loop, as trainers of diffusion models are usually written.

Parts of a diffusers pipeline, bfloat16 autocast, adapters from peft, one denoising step per forward, a batch that fits,
the autoencoder included, every transition trained on once, AdamW. It shares the reward with latentac and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor

from benchmarks.gpu.flops import clock
from benchmarks.gpu.models import PROMPTS, ZERO_LENGTH, Model
from benchmarks.gpu.turns import Turn
from latentac.rewards.jpeg_compressibility import JpegCompressibility

_RANK, _ALPHA = 32, 64
_GRADIENT_CLIP = 1.0
_TINY = 1e-6


@dataclass(frozen=True)
class Transition:
    """A normal distribution of the next latents. mean: [B, *latent]; std: one number."""

    mean: Tensor
    std: Tensor

    def log_prob(self, latents: Tensor) -> Tensor:
        """[B], the mean over the latent dimensions, without the constant."""
        return (-((latents - self.mean) ** 2) / (2 * self.std**2) - self.std.log()).flatten(1).mean(1)


class Diffusion:
    """Stable Diffusion 1: DDIM with eta 1 on trailing timesteps. The last step has no noise, so it is not trained."""

    def __init__(self, model: Model, folder: Path, device: torch.device) -> None:
        self.pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        self.network: Any = self.pipeline.unet
        scheduler: Any = DDIMScheduler.from_config(self.pipeline.scheduler.config, timestep_spacing="trailing")
        scheduler.set_timesteps(model.steps)
        self.timesteps = scheduler.timesteps.to(device)
        alphas = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps.cpu()], torch.ones(1)])
        self.levels, self.trained = alphas.to(device), model.steps - 1

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        tokens, _ = self.pipeline.encode_prompt(list(prompts), device, 1, False)
        return {"encoder_hidden_states": tokens}

    def transition(self, latents: Tensor, noise: Tensor, step: int) -> Transition:
        signal, after = self.levels[step], self.levels[step + 1]
        variance = (1 - after) / (1 - signal) * (1 - signal / after)
        clean = (latents - (1 - signal).sqrt() * noise) / signal.sqrt()
        return Transition(after.sqrt() * clean + (1 - after - variance).clamp(min=0).sqrt() * noise, variance.sqrt())


class Flow:
    """Stable Diffusion 3: the stochastic sampler of Flow-GRPO (Liu et al. 2025, eq. 9)."""

    def __init__(self, model: Model, folder: Path, device: torch.device) -> None:
        self.pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
            folder, text_encoder_3=None, tokenizer_3=None, dtype=torch.bfloat16
        ).to(device)
        self.network: Any = self.pipeline.transformer
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(model.steps)
        self.timesteps, self.levels = scheduler.timesteps.to(device), scheduler.sigmas.to(device)
        self.trained, self._noise = model.steps, model.noise

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=ZERO_LENGTH
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def transition(self, latents: Tensor, velocity: Tensor, step: int) -> Transition:
        level, after = self.levels[step], self.levels[step + 1]
        diffusion = self._noise * (level / (1 - (after if step == 0 else level))).sqrt()
        half, distance = diffusion**2 / (2 * level), after - level
        mean = latents * (1 + half * distance) + velocity * (1 + half * (1 - level)) * distance
        return Transition(mean, diffusion * (-distance).sqrt())


@dataclass(frozen=True)
class Rollout:
    """Of a batch. latents: K+1 tensors [B, *latent]; log_probs: of each trained step, [B]."""

    latents: list[Tensor]
    log_probs: list[Tensor]
    text: dict[str, Tensor]
    images: np.ndarray
    prompts: Sequence[str]


class PlainLoop:
    """One batch per iteration: its rollout, then a forward and a backward for each step, and one optimizer step.

    trained: transitions per image.
    """

    def __init__(self, model: Model, folder: Path, adaptation: str, rows: int, device: torch.device) -> None:
        self.rows = self.images = rows
        self._model, self._device = model, device
        self._sampler = (Diffusion if model.family == "sd" else Flow)(model, folder, device)
        self.trained = self._sampler.trained
        self._prompts = (folder.parent / PROMPTS).read_text().splitlines()
        self._reward, self._done = JpegCompressibility(), 0
        network = self._sampler.network.requires_grad_(False)
        if adaptation == "lora":
            network.add_adapter(
                LoraConfig(r=_RANK, lora_alpha=_ALPHA, init_lora_weights="gaussian", target_modules=list(model.adapted))
            )
            cast_training_params(network, torch.float32)
        else:
            network.to(torch.float32).requires_grad_(True)
        self._weights = [weight for weight in network.parameters() if weight.requires_grad]
        rate = model.rate * (3 if adaptation == "lora" else 1)
        self._optimizer = torch.optim.AdamW(self._weights, rate, (0.9, 0.999), weight_decay=1e-4)
        self._generator = torch.Generator(device).manual_seed(0)

    def iterate(self) -> Turn:
        began = clock(self._device)
        rollout = self._roll_out()
        rewards = torch.tensor(self._reward(rollout.images, rollout.prompts), device=self._device)
        rolled_out = clock(self._device)
        self._update(rollout, (rewards - rewards.mean()) / (rewards.std() + _TINY))
        return Turn(self.rows, clock(self._device) - began, rolled_out - began)

    @torch.no_grad()
    def _roll_out(self) -> Rollout:
        places = [(self._done + place) % len(self._prompts) for place in range(self.rows)]
        self._done += self.rows
        prompts = [self._prompts[place] for place in places]
        text = self._sampler.encode(prompts, self._device)
        latents, log_probs = [self._noise()], []
        for step in range(self._model.steps):
            transition = self._forward(latents[-1], text, step)
            trained = step < self._sampler.trained
            drawn = transition.mean + transition.std * self._noise() if trained else transition.mean
            latents.append(drawn)
            if trained:
                log_probs.append(transition.log_prob(drawn))
        return Rollout(latents, log_probs, text, self._decode(latents[-1]), prompts)

    def _forward(self, latents: Tensor, text: dict[str, Tensor], step: int) -> Transition:
        time_step = self._sampler.timesteps[step].expand(len(latents))
        network = self._sampler.network
        with torch.autocast(self._device.type, torch.bfloat16):
            output = network(latents.to(network.dtype), timestep=time_step, return_dict=False, **text)[0]
        return self._sampler.transition(latents, output.float(), step)

    def _decode(self, latents: Tensor) -> np.ndarray:
        vae = self._sampler.pipeline.vae
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        images = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        array: np.ndarray = images.permute(0, 2, 3, 1).cpu().numpy()
        return array

    def _update(self, rollout: Rollout, advantages: Tensor) -> None:
        bound = self._model.clip
        for step in range(self._sampler.trained):
            transition = self._forward(rollout.latents[step], rollout.text, step)
            ratio = (transition.log_prob(rollout.latents[step + 1]) - rollout.log_probs[step]).exp()
            clipped = ratio.clamp(1 - bound, 1 + bound)
            loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
            (loss / self._sampler.trained).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._weights, _GRADIENT_CLIP)
        if not math.isfinite(float(norm)):
            raise ValueError(f"the gradient's norm is {float(norm)}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _noise(self) -> Tensor:
        shape = self.rows, *self._model.latent_shape
        return torch.randn(shape, generator=self._generator, device=self._device)

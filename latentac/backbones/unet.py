"""A UNet in the folder layout of diffusers' StableDiffusionPipeline."""

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentac.backbones import adapters, count_tokens, to_arrays
from latentac.backbones.loading import load, load_tokenizer
from latentac.backbones.schedulers import variance_preserving
from latentac.backbones.stable_diffusion import UNET
from latentac.config.learning import Policy
from latentac.method import diffusion
from latentac.method.records import Conditioning
from latentac.system import folders

_PARTS: dict[str, tuple[str | None, str | None]] = {
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
_ABSENT = dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), (None, None))


class UNetBackbone:
    """Taps: `middle`, the mid block's output, and `last`, the last up-block's output.

    Integer timesteps exist only in here: outside, a noise level is the float sigma = sqrt(1 - alpha-bar).
    """

    path: diffusion.Path = "variance_preserving"
    layout = UNET

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.module: Any = load(UNet2DConditionModel, folder, UNET.part("unet"), device)
        self._autoencoder = load(AutoencoderKL, folder, UNET.part("vae"), device)
        self._text_encoder = load(CLIPTextModel, folder, UNET.part("text_encoder"), device)
        self._tokenizer = load_tokenizer(CLIPTokenizer, folder, UNET.part("tokenizer"))
        scheduler = variance_preserving(folder)
        self._scheduler = scheduler
        self._prediction_type: str = scheduler.config.prediction_type
        self._sigma_table = (1 - scheduler.alphas_cumprod.double()).sqrt().float()

        config = self.module.config
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self.latent_shape = (config.in_channels, height, width)
        self.text_width: int = config.cross_attention_dim
        longest = self._text_encoder.config.max_position_embeddings  # some tokenizers name no bound of their own
        self.max_tokens: int = min(self._tokenizer.model_max_length, longest)
        self._tokenizing = threading.Lock()  # a tokenizer's padding is state that a call may change
        self._taps = threading.local()
        for name, block in (("middle", self.module.mid_block), ("last", self.module.up_blocks[-1])):
            block.register_forward_hook(_tap(self._taps, name))
        self.tap_shapes = self._probe_taps()

    def _probe_taps(self) -> dict[str, tuple[int, int, int]]:
        tokens = torch.zeros(1, 1, self.text_width, device=self.device)
        latents = torch.zeros(1, *self.latent_shape, device=self.device)
        with torch.no_grad():
            _, taps = self.predict(latents, self._sigma_table[:1].to(self.device), Conditioning(tokens))
        return {name: (tap.shape[1], tap.shape[2], tap.shape[3]) for name, tap in taps.items()}

    def clone(self) -> Self:
        other = copy.copy(self)  # the hooks are copied with the module; `predict` takes the taps that it made
        other.module = copy.deepcopy(self.module)
        return other

    def schedule(self, num_steps: int) -> Tensor:
        """Trailing timesteps (Lin et al. 2024, table 2): the first level is the noisiest that the model knows.

        Computed as diffusers does it, whose rounding decides which of two timesteps a step in the middle takes.
        """
        total = len(self._sigma_table)
        trailing = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
        timesteps = torch.from_numpy(trailing.astype(np.int64))
        return torch.cat([self._sigma_table[timesteps], torch.zeros(1)])

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        with self._tokenizing:
            tokens = self._tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
        with torch.no_grad():
            return Conditioning(self._text_encoder(tokens.input_ids.to(self.device)).last_hidden_state.float())

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        with self._tokenizing:
            return count_tokens(self._tokenizer, prompts)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[diffusion.Prediction, dict[str, Tensor]]:
        timestep = (self._sigma_table[None] - sigma.cpu()[:, None]).abs().argmin(1).to(self.device)
        output = self.module(latents, timestep, conditioning.tokens, return_dict=False)[0]
        alpha = diffusion.broadcast(diffusion.alpha_of(sigma, self.path), latents)
        noise_level = diffusion.broadcast(sigma, latents)
        if self._prediction_type == "v_prediction":
            clean = alpha * latents - noise_level * output
            noise = alpha * output + noise_level * latents
        else:
            noise = output
            clean = (latents - noise_level * noise) / alpha
        return diffusion.Prediction(clean, noise), dict(vars(self._taps))

    def images(self, latents: Tensor) -> Tensor:
        decoded = self._autoencoder.decode(latents / self._autoencoder.config.scaling_factor, return_dict=False)[0]
        images: Tensor = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return images

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_arrays(self.images, latents)

    def adapt(self, settings: Policy) -> None:
        adapters.adapt(self.module, settings, self.layout.adapted)

    def save(self, folder: Path) -> None:
        """StableDiffusionPipeline without its safety checker, which served images do not pass either, and with the
        scheduler that takes the steps of `schedule`: the base's own may space, clip or end otherwise."""
        folders.begin(folder)
        adapters.save(self.module, folder, "unet")
        folders.copy_parts(self.folder, folder, ("vae", "text_encoder", "tokenizer"))
        scheduler = DDIMScheduler.from_config(
            self._scheduler.config,
            timestep_spacing="trailing",
            clip_sample=False,
            thresholding=False,
            set_alpha_to_one=True,
        )
        folders.write_part(scheduler, folder / "scheduler")
        folders.write_index(folder, "StableDiffusionPipeline", {**_PARTS, **_ABSENT}, requires_safety_checker=False)


def _tap(taps: threading.local, name: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        vars(taps)[name] = output

    return hook

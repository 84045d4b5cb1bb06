"""A diffusion transformer in the folder layout of diffusers' StableDiffusion3Pipeline, used without its T5 encoder."""

import copy
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentac.backbones import adapters, count_tokens, to_arrays
from latentac.backbones.loading import load, load_tokenizer
from latentac.backbones.schedulers import flow_shift
from latentac.backbones.stable_diffusion import DIT
from latentac.config.learning import Policy
from latentac.method import diffusion
from latentac.method.records import Conditioning
from latentac.system import folders

_CLIP_LENGTH = 77  # tokens of Stable Diffusion 3's CLIP encoders,
_T5_LENGTH = 256  # and the zero tokens that it puts after them where T5 would be
_NUM_TAPS = 3
_PARTS: dict[str, tuple[str | None, str | None]] = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
_ABSENT = dict.fromkeys(("feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3"), (None, None))


class DiTBackbone:
    """Taps: `block_<i>`, the image tokens on their grid after the blocks at one third, two thirds and the end.

    The transformer knows float timesteps, sigma times their number, so a noise level needs no table here.
    """

    path: diffusion.Path = "flow"
    layout = DIT

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.module: Any = load(SD3Transformer2DModel, folder, DIT.part("transformer"), device)
        # The library's own pipeline encodes the text; it also holds the autoencoder.
        self._pipeline = StableDiffusion3Pipeline(
            transformer=self.module,
            scheduler=None,
            vae=load(AutoencoderKL, folder, DIT.part("vae"), device),
            text_encoder=load(CLIPTextModelWithProjection, folder, DIT.part("text_encoder"), device),
            tokenizer=load_tokenizer(CLIPTokenizer, folder, DIT.part("tokenizer")),
            text_encoder_2=load(CLIPTextModelWithProjection, folder, DIT.part("text_encoder_2"), device),
            tokenizer_2=load_tokenizer(CLIPTokenizer, folder, DIT.part("tokenizer_2")),
            text_encoder_3=None,
            tokenizer_3=None,
        )
        config = self.module.config
        self._shift, self._num_timesteps = flow_shift(folder, (config.sample_size // config.patch_size) ** 2)
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.text_width: int = config.joint_attention_dim
        self.max_tokens: int = self._pipeline.tokenizer_max_length  # of both encoders
        self._taps = threading.local()
        self._tokenizing = threading.Lock()  # a tokenizer's padding is state that a call changes
        self.tap_shapes = {}
        side, count = config.sample_size // config.patch_size, len(self.module.transformer_blocks)
        for index in sorted({math.ceil(count * part / _NUM_TAPS) - 1 for part in range(1, _NUM_TAPS + 1)}):
            hook = _tap(self._taps, f"block_{index}", side)
            self.module.transformer_blocks[index].register_forward_hook(hook)
            self.tap_shapes[f"block_{index}"] = (self.module.inner_dim, side, side)

    def clone(self) -> Self:
        other = copy.copy(self)  # the hooks are copied with the module; `predict` takes the taps that it made
        other.module = copy.deepcopy(self.module)
        return other

    def schedule(self, num_steps: int) -> Tensor:
        """Even levels, shifted towards noise by the scheduler's `shift` (Esser et al. 2024, eq. 23)."""
        even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).float()
        return torch.cat([self._shift * even / (1 + (self._shift - 1) * even), torch.zeros(1)])

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        standard = self._pipeline.tokenizer_max_length >= _CLIP_LENGTH
        with self._tokenizing, torch.no_grad():
            tokens, _, pooled, _ = self._pipeline.encode_prompt(
                list(prompts),
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=_T5_LENGTH if standard else 0,
            )
        return Conditioning(tokens.float(), pooled.float())

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """For that of the two tokenizers which makes more of them."""
        with self._tokenizing:
            both = [count_tokens(one, prompts) for one in (self._pipeline.tokenizer, self._pipeline.tokenizer_2)]
        return [max(counts) for counts in zip(*both, strict=True)]

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[diffusion.Prediction, dict[str, Tensor]]:
        velocity = self.module(
            latents,
            encoder_hidden_states=conditioning.tokens,
            pooled_projections=conditioning.pooled,
            timestep=sigma * self._num_timesteps,
            return_dict=False,
        )[0]
        level = diffusion.broadcast(sigma, latents)
        taps = dict(vars(self._taps))
        return diffusion.Prediction(latents - level * velocity, latents + (1 - level) * velocity), taps

    def images(self, latents: Tensor) -> Tensor:
        autoencoder = self._pipeline.vae
        latents = latents / autoencoder.config.scaling_factor + (autoencoder.config.shift_factor or 0.0)
        images: Tensor = (autoencoder.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        return images

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_arrays(self.images, latents)

    def adapt(self, settings: Policy) -> None:
        adapters.adapt(self.module, settings, self.layout.adapted)

    def save(self, folder: Path) -> None:
        """StableDiffusion3Pipeline without T5, with which it would draw other images than those that were trained on,
        and with the scheduler that shifts as `schedule` does. Its spacing is its caller's: `sigmas=`."""
        folders.begin(folder)
        adapters.save(self.module, folder, "transformer")
        folders.copy_parts(self.folder, folder, ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=self._num_timesteps, shift=self._shift)
        folders.write_part(scheduler, folder / "scheduler")
        folders.write_index(folder, "StableDiffusion3Pipeline", {**_PARTS, **_ABSENT})


def _tap(
    taps: threading.local, name: str, side: int
) -> Callable[[nn.Module, object, tuple[Tensor | None, Tensor]], None]:
    """A hook of a block, which returns the text's tokens and the image's, [B, side * side, width]."""

    def hook(module: nn.Module, inputs: object, output: tuple[Tensor | None, Tensor]) -> None:
        vars(taps)[name] = output[1].transpose(1, 2).unflatten(2, (side, side))

    return hook

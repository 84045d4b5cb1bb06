"""A UNet in the folder layout of diffusers' StableDiffusionXLPipeline, without the refiner."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor

from latentac.backbones import count_tokens
from latentac.backbones.layout import INDEX
from latentac.backbones.pipeline import PipelineSettings
from latentac.backbones.stable_diffusion_xl import SDXL
from latentac.backbones.unet import VariancePreservingUNet
from latentac.method.records import Conditioning
from latentac.system.modelfiles import read_json

_ZEROS = "force_zeros_for_empty_prompt"


class SDXLBackbone(VariancePreservingUNet):
    """Stable Diffusion XL without its refiner. Taps: `middle`, the mid block's output, and `last`, the last up-block's
    output.

    The network gets the states of two CLIP encoders before their last layer, the second one's pooled text, and sizes.
    Original and target size are `image_size`, and nothing is cropped: diffusers' defaults.
    """

    layout = SDXL

    def __init__(self, settings: PipelineSettings, folder: Path, device: torch.device) -> None:
        super().__init__(settings, folder, device)
        # The library's own pipeline encodes the text.
        self._pipeline = StableDiffusionXLPipeline(
            unet=None,
            scheduler=None,
            vae=None,
            text_encoder=self._load("text_encoder"),
            tokenizer=self._load("tokenizer"),
            text_encoder_2=self._load("text_encoder_2"),
            tokenizer_2=self._load("tokenizer_2"),
            force_zeros_for_empty_prompt=bool(read_json(folder / INDEX).get(_ZEROS, True)),
            add_watermarker=False,
        )
        self.max_tokens: int = self._pipeline.tokenizer.model_max_length  # of both encoders
        sizes = (*self.image_size, 0, 0, *self.image_size)
        self._sizes = torch.tensor([sizes], dtype=torch.float32, device=device)

    def _text_encoders(self) -> Sequence[Any]:
        return [self._pipeline.text_encoder, self._pipeline.text_encoder_2]

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        with self._tokenizing:
            tokens, _, pooled, _ = self._pipeline.encode_prompt(
                list(prompts), device=self._text_device, do_classifier_free_guidance=False
            )
        return Conditioning(tokens, pooled)

    def unconditional(self) -> Conditioning:
        """What the pipeline takes for no prompt: zeros, or the empty prompt's states where model_index.json says so."""
        with self._tokenizing, torch.no_grad():
            _, tokens, _, pooled = self._pipeline.encode_prompt([""], device=self._text_device)
        return Conditioning(tokens, pooled).to(self.device)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """For that of the two tokenizers which makes more of them."""
        with self._tokenizing:
            both = [count_tokens(one, prompts) for one in (self._pipeline.tokenizer, self._pipeline.tokenizer_2)]
        return [max(counts) for counts in zip(*both, strict=True)]

    def _network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        added = {"text_embeds": conditioning.pooled, "time_ids": self._sizes.expand(len(latents), -1)}
        output: Tensor = self.module(
            latents, self._timesteps(sigma), conditioning.tokens, added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    def _flags(self) -> Mapping[str, object]:
        return {_ZEROS: self._pipeline.config.force_zeros_for_empty_prompt}

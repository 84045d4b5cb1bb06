"""An exported model in the manner of a diffusers pipeline, for a notebook or a script."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from latentac.sampling.devices import pick_device
from latentac.serving.generator import Generator


@dataclass(frozen=True)
class SteeredImages:
    """images: N images, those of a prompt beside each other; values: float32 [N, K, M], the critic's estimate at each
    denoised state, in each reward's own unit; reward_names: the M heads; nfe: function evaluations per image; seeds: of
    each prompt, as `Generator.generate` takes them; tokens: of each prompt; truncated: whether they are more than the
    text encoder reads, which a model refuses unless its latentac.json allows it."""

    images: list[Image.Image]
    values: np.ndarray
    reward_names: tuple[str, ...]
    nfe: int
    seeds: list[int]
    tokens: list[int]
    truncated: list[bool]


class LatentacPipeline:
    """`pipe("two red squares", steering={"shapes_verifier": 3.0}, method="resampling", particles=8).images`

    The same images as the endpoint's for the same seed. The folder is a plain diffusers pipeline too: without
    steering any of diffusers' own tools loads it.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "auto", base: str | Path | None = None) -> Self:
        """The model that `latentac deploy` exported to `folder`. base: folder with the base of an adapter, by default
        `base/` in `folder`. Raises ServingError if it is none, or damaged."""
        return cls(Generator(Path(folder), pick_device(device), None if base is None else Path(base)))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steering: dict[str, float] | None = None,
        method: str | None = None,
        particles: int | None = None,
        guidance_scale: float | None = None,
        policy: str | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
    ) -> SteeredImages:
        """Images of each prompt.

        steering: reward name -> weight in standard deviations of that reward, the exported defaults if None.
        method: one of the model's, or `none`; its default if None. particles: rollouts per image, the method's
        default if None. guidance_scale: of classifier-free guidance; 1, the default, is none. policy: `trained`
        weights, the default, or `base`. generator: decides the noise; without one each call draws another. Raises
        ConfigError with every problem of the request.
        """
        found = [
            self._generator.generate(
                text,
                seed=int(torch.randint(2**63 - 1, (1,), generator=generator)),
                count=num_images_per_prompt,
                num_steps=num_inference_steps,
                method=method,
                steering=steering,
                particles=particles,
                guidance_scale=guidance_scale,
                policy=policy,
            )
            for text in ([prompt] if isinstance(prompt, str) else prompt)
        ]
        return SteeredImages(
            images=[Image.fromarray(image) for each in found for image in each.images],
            values=np.concatenate([each.values for each in found]),
            reward_names=found[0].reward_names,
            nfe=found[0].nfe,
            seeds=[each.seed for each in found],
            tokens=[each.tokens for each in found],
            truncated=[each.truncated for each in found],
        )

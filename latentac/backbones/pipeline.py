"""What the backbones of diffusers pipelines share: loading, precision, taps, decoding, cloning and saving.

A backbone derives from `PipelineBackbone`. Its own file holds what differs: the text encoders, the network's arguments,
the noise schedule, and which layers are taps.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from latentac.backbones import adapters, to_arrays
from latentac.backbones.layout import Layout
from latentac.backbones.loading import load, load_tokenizer
from latentac.backbones.precision import Precision, compute_dtype
from latentac.config.extensions import Settings
from latentac.config.learning import Policy
from latentac.method import diffusion
from latentac.method.records import Conditioning
from latentac.system import folders
from latentac.system.errors import ConfigError, Problem

_DECODED_PIXELS = 4 * 1024**2
"""Pixels of the images that a GPU decodes together. An activation of the decoder takes 512 bytes or more per pixel."""
_TILED_PIXELS = 1024**2
"""An image with more pixels is decoded in tiles."""


class PipelineSettings(Settings):
    """How a diffusers pipeline computes."""

    precision: Precision = "auto"
    """Dtype of the forward passes: `float32`, `bfloat16`, or `float16` with loss scaling. `auto` is bfloat16 on a GPU
    that supports it, and float32 otherwise. Trained weights, latents and all arithmetic of the method stay float32."""
    image_size: Annotated[list[Annotated[int, Field(ge=8, le=4096)]], Field(max_length=2)] = []
    """Height and width of the images in pixels: `[512, 512]`. Default: the size that the model's configuration
    names."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time per
    update."""
    tf32: bool = False
    """Let a GPU round the inputs of float32 matrix products to TF32."""
    compile: Literal["none", "blocks", "whole"] = "none"
    """`torch.compile` of the network's repeated blocks, or of the whole network. The first forward passes then take
    minutes."""


class Taps:
    """The outputs of chosen layers, for the critic. Only what a `recording` surrounds is kept, per thread."""

    def __init__(self, compiled: bool) -> None:
        """compiled: whether the layers will be; their compiler must not follow the hooks."""
        self._compiled, self._local = compiled, threading.local()

    def watch(self, layer: nn.Module, name: str, read: Callable[[Any], Tensor]) -> None:
        """Record `read` of the layer's output under `name`. A copy of the layer records too."""
        local = self._local  # a closure: a deep copy of the layer would copy an object

        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            recorded = getattr(local, "taps", None)
            if recorded is not None:
                recorded[name] = read(output)

        layer.register_forward_hook(torch.compiler.disable(hook) if self._compiled else hook)

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """The taps of the forward in the body, by name. A recomputation in a backward pass is outside of it."""
        taps: dict[str, Tensor] = {}
        self._local.taps = taps
        try:
            yield taps
        finally:
            self._local.taps = None


class PipelineBackbone:
    """A `Denoiser` on the folder of a diffusers pipeline. Weights that are not trained are kept in the compute dtype.

    dtype: of the forward passes     image_size: (height, width) in pixels
    """

    Settings: ClassVar[type[PipelineSettings]] = PipelineSettings
    layout: Layout
    packed: ClassVar[str] = "{}"
    """Python of the latents that the pipeline's call takes, where `{}` stands for those of `latent_shape`."""
    guides: ClassVar[bool] = True
    """Whether `guidance_scale` of the pipeline's call is the scale of classifier-free guidance."""
    unguided: ClassVar[float] = 1.0
    """The `guidance_scale` of the pipeline's call that stands for the scale 1, which is no guidance."""
    cells: ClassVar[int | None] = None
    """Cells of the latents per side where no image size is given and the network knows none of its own."""
    path: diffusion.Path
    latent_shape: tuple[int, int, int]
    tap_shapes: dict[str, tuple[int, int, int]]
    text_width: int
    max_tokens: int

    def __init__(self, settings: PipelineSettings, folder: Path, device: torch.device) -> None:
        self.settings, self.folder, self.device = settings, folder, device
        self.layout = self.layout_for(settings)
        self.dtype = compute_dtype(settings.precision, device)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
        self.module: Any = self._load(self.layout.network)
        self._autoencoder: Any = self._load("vae", self._decoder_dtype(folder))
        self._taps = Taps(settings.compile != "none")
        self._text_device = device
        self._tokenizing = threading.Lock()  # a tokenizer's padding is state that a call may change
        factor = 2 ** (len(self._autoencoder.config.block_out_channels) - 1)
        height, width = self._latent_size(factor)
        self.latent_shape = (self._autoencoder.config.latent_channels, height, width)
        self.image_size = (height * factor, width * factor)
        if self.image_size[0] * self.image_size[1] > _TILED_PIXELS:
            self._autoencoder.enable_tiling()
        if settings.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()

    @classmethod
    def layout_for(cls, settings: PipelineSettings) -> Layout:
        """The folder layout with which a backbone of these settings is loaded and saved."""
        return cls.layout

    def compile(self) -> None:
        """Compile the network as the settings say; a subclass calls this after it has placed its taps."""
        if self.settings.compile == "whole":
            self.module.compile()
        elif self.settings.compile == "blocks":
            self.module.compile_repeated_blocks()

    def _load(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """The part `name` of the folder: a module in `dtype`, by default the compute dtype, or a tokenizer."""
        part = self.layout.part(name)
        kind = getattr(import_module(part.library), part.classes[0])
        if part.kind == "tokenizer":
            return load_tokenizer(kind, self.folder, part)
        return load(kind, self.folder, part, self.device, dtype or self.dtype)

    def _decoder_dtype(self, folder: Path) -> torch.dtype:
        """Some autoencoders overflow in float16: their configuration forces an upcast."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def _latent_size(self, factor: int) -> tuple[int, int]:
        """Height and width of the latents. factor: pixels per cell of the latents. Raises ConfigError."""
        size, patch = self.settings.image_size, self._patch
        if not size:
            own = self.cells or self.module.config.sample_size
            height, width = own if isinstance(own, list | tuple) else (own, own)
            return height, width
        unit = factor * patch
        if len(size) != 2 or size[0] % unit or size[1] % unit:
            remedy = f"Give height and width as multiples of {unit}"
            raise ConfigError([Problem("backbone.image_size", size, "does not fit this model", remedy)])
        return size[0] // factor, size[1] // factor

    @property
    def _patch(self) -> int:
        """Cells of the latents per token and side; 1 where the network has no tokens."""
        return getattr(self.module.config, "patch_size", None) or 1

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        with torch.no_grad():
            return self._encode(prompts).to(self.device)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """As `encode`, on `self._text_device`, where the text encoders are."""
        raise NotImplementedError

    def release_text_encoders(self) -> None:
        """Move the text encoders to the host's memory, where `encode` still works, but slowly."""
        self._text_device = torch.device("cpu")
        for encoder in self._text_encoders():
            encoder.to(self._text_device)

    def _text_encoders(self) -> Sequence[Any]:
        """The modules that encode text."""
        raise NotImplementedError

    def clone(self) -> Self:
        other = copy.copy(self)  # the hooks are copied with the module, and `predict` takes the taps that it made
        other.module = copy.deepcopy(self.module)
        return other

    def adapted(self, file: Path) -> Self:
        """Another denoiser with the LoRA adapter in `file`. It shares every weight with this one, which stays as it is.
        Raises ConfigError where the adapter is not of this network."""
        other = copy.copy(self)
        other.module = adapters.adapted(self.module, file, self.layout)
        other.compile()
        return other

    def merge(self, file: Path) -> None:
        """Add the LoRA adapter in `file` to the weights. Raises ConfigError where it is not of this network."""
        adapters.merge(self.module, file, self.layout)

    def predict(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> tuple[diffusion.Prediction, dict[str, Tensor]]:
        dtype = getattr(self.module, "dtype", self.dtype)  # a critic's own copy may have another one
        given = Conditioning(
            conditioning.tokens.to(dtype), None if conditioning.pooled is None else conditioning.pooled.to(dtype)
        )
        with self._taps.recording() as taps:
            output = self._network(latents.to(dtype), sigma, given)
        return self._prediction(latents, sigma, output.float()), taps

    def _network(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output [B, *latent]; latents and conditioning are in its dtype, sigma is float32."""
        raise NotImplementedError

    def _prediction(self, latents: Tensor, sigma: Tensor, output: Tensor) -> diffusion.Prediction:
        """What the network's output, float32, says of the clean image and the noise."""
        raise NotImplementedError

    def images(self, latents: Tensor) -> Tensor:
        config = self._autoencoder.config
        latents = latents / config.scaling_factor
        if getattr(config, "shift_factor", None):
            latents = latents + config.shift_factor
        decoded = self._autoencoder.decode(latents.to(self._autoencoder.dtype), return_dict=False)[0]
        images: Tensor = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return images

    def decode(self, latents: Tensor) -> np.ndarray:
        together = len(latents)
        if self.device.type == "cuda":
            together = max(1, _DECODED_PIXELS // (self.image_size[0] * self.image_size[1]))
        return np.concatenate([to_arrays(self.images, rows) for rows in latents.split(together)])

    def adapt(self, settings: Policy) -> None:
        adapters.adapt(self.module, settings, self.layout.adapted)

    def save(self, folder: Path) -> None:
        """A folder for the layout's pipeline of diffusers, float32, whose scheduler takes the steps of `schedule`: the
        base's own may space, clip or end otherwise. What the backbone does not use is null."""
        folders.begin(folder)
        adapters.save(self.module, folder, self.layout.network)
        copied = [part for part in self.layout.parts if part.kind not in ("network", "scheduler")]
        folders.copy_parts(self.folder, folder, [part.name for part in copied])
        scheduler = self._scheduler_of_schedule()
        folders.write_part(scheduler, folder / "scheduler")
        index: dict[str, tuple[str | None, str | None]] = dict.fromkeys(self.layout.absent, (None, None))
        index |= {part.name: (part.library, part.classes[0]) for part in self.layout.parts if part.classes}
        index["scheduler"] = ("diffusers", type(scheduler).__name__)
        folders.write_index(folder, self.layout.pipeline, index, **self._flags())

    def _flags(self) -> Mapping[str, object]:
        """What the model_index.json of an export says beside the parts."""
        return self.layout.flags

    def call(self) -> dict[str, str]:
        """Arguments of the pipeline's call, as Python, that this backbone's settings stand for."""
        height, width = map(str, self.image_size)
        return {"height": height, "width": width} if self.settings.image_size else {}

    def _scheduler_of_schedule(self) -> Any:
        """A scheduler of diffusers that takes the steps of `schedule`."""
        raise NotImplementedError

"""An exported model: a plain diffusers pipeline folder, plus `critic/` and `latentac.json`, which says how to sample.

Diffusers ignores what it does not know, so `StableDiffusionPipeline.from_pretrained(folder)` loads the same folder. An
export of an adapter has LoRA weights in place of the pipeline, for `load_lora_weights(folder)` on the base.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from latentac.config.schema import Batching, Config, Kernel, Limits
from latentac.config.sections import (
    Extension,
    Named,
    NonNegative,
    Particles,
    Rate,
    Section,
)
from latentac.system import folders
from latentac.system.errors import ServingError
from latentac.system.modelfiles import Damaged, check, read_json, shorten
from latentac.system.names import PLAIN

FILE = "latentac.json"
BASE = "base"
"""Folder of the untouched denoiser, where there is one; beside an adapter, of its whole base."""
ADAPTER = Path(folders.ADAPTER).name
"""In an export of an adapter: its weights."""

Side = Annotated[int, Field(gt=0, le=2**14)]


class Method(Section):
    """A way to steer that this model offers.

    extension: of the steering table, with its settings; summary: what it does, in a few words; needs_gradient: whether
    it takes the gradient of the values. Where a request does not say: strength, of a reward of weight 1, in standard
    deviations of that reward, and particles, rollouts per image.
    """

    extension: Named
    summary: str
    needs_gradient: bool
    strength: Rate
    particles: Particles


_OF_A_MACHINE = {"attention"}
"""Settings of a backbone that an export leaves out: they change only rounding, and need what a server may not have."""
_DESCRIBED = ("summary", "needs_gradient", "strength", "particles")
"""Of a method, what `prepare` writes to extensions.json."""


class Head(Section):
    """A reward whose value the critic predicts. weight: its share in training; unit: what one unit means, or ""."""

    name: str
    weight: NonNegative
    unit: str


class Base(Section):
    """The model that an adapter belongs to.

    name: `builtin:<name>`, a hub id, or a folder's name; commit: of a hub id, or ""; artifact: key in the store of the
    run's copy, in whose folder `backbone` it is; files: path in that folder -> sha256.
    """

    name: Annotated[str, Field(max_length=1000)]
    commit: Annotated[str, Field(max_length=100)] = ""
    artifact: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,249}/prepare$")]
    files: Annotated[
        dict[Annotated[str, Field(max_length=300)], Annotated[str, Field(pattern="^[0-9a-f]{64}$")]],
        Field(min_length=1, max_length=1000),
    ]


class Exported(Section):
    """latentac.json. version: of the model, chosen by who deploys; base: of an adapter, None for a whole pipeline;
    guidance_scale: of classifier-free guidance where a request does not say; rewards: the critic's heads, in their
    order; size: (height, width) of an image in pixels; examples: prompts to begin with; notice: what its users must
    know, or ""; methods: of steering, by name; default_method: of a request that names none: the best one of the
    run's benchmark, or `none`."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    schema_version: Literal[4] = Field(default=4, alias="schema")
    version: str
    run: str
    base: Base | None = None
    backbone: Extension
    kernel: Kernel
    guidance_scale: Annotated[float, Field(ge=1, le=100)] = 1.0
    size: tuple[Side, Side]
    policies: list[Literal["trained", "base"]]
    rewards: Annotated[list[Head], Field(max_length=64)]
    examples: Annotated[list[str], Field(max_length=64)]
    notice: str = ""
    methods: Annotated[dict[str, Method], Field(max_length=64)]
    default_method: str
    limits: Limits
    batching: Batching

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.default_method not in {PLAIN, *self.methods}:
            raise ValueError(f"default_method is {self.default_method!r}, which is not one of the methods")
        if "trained" not in self.policies:
            raise ValueError("policies lacks `trained`")
        return self

    @property
    def size_name(self) -> str:
        """As a caller writes it, width x height: `32x32`."""
        return f"{self.size[1]}x{self.size[0]}"

    def default_weights(self, method: str) -> dict[str, float]:
        """Reward name -> steering weight of a method, in standard deviations of that reward."""
        strength = self.methods[method].strength if method in self.methods else 0.0
        return {reward.name: strength * reward.weight for reward in self.rewards}


def export(
    folder: Path,
    config: Config,
    *,
    run: str,
    version: str,
    examples: Sequence[str] = (),
    notice: str = "",
    extensions: Mapping[str, Any],
    best: Mapping[str, Any] | None = None,
    base: Base | None = None,
    pipeline: Path | None = None,
) -> Exported:
    """Complete `folder`, which holds a diffusers pipeline or an adapter and `critic/`, with its latentac.json.

    extensions: what `prepare` wrote of them: `units` of the rewards and `methods` of steering. best: the row of the
    steering benchmark whose method, strength and number of particles become the default; without one it is the first
    configured method. base: of an adapter; pipeline: its folder.
    """
    serving, units = config.serving, extensions["units"]
    own = {name: value for name, value in config.backbone.own.items() if name not in _OF_A_MACHINE}
    limits = serving.model_dump(include=set(Limits.model_fields))
    methods = {
        method.name: Method(extension=method, **{name: extensions["methods"][method.name][name] for name in _DESCRIBED})
        for method in config.steering.methods
    }
    if best is not None:
        chosen = {"strength": float(best["strength"]), "particles": int(best["particles"])}
        methods[best["method"]] = methods[best["method"]].model_copy(update=chosen)
    exported = Exported(
        version=version,
        run=run,
        base=base,
        backbone=Extension.model_validate({"use": config.backbone.use, **own}),
        kernel=config.kernel,
        guidance_scale=config.policy.guidance_scale,
        size=tuple(config.backbone.own.get("image_size") or image_size(pipeline or folder)),
        policies=["trained", "base"] if (serving.include_base if base else (folder / BASE).is_dir()) else ["trained"],
        rewards=[Head(name=one.name, weight=one.weight, unit=units[one.name]) for one in config.rewards],
        examples=list(examples),
        notice=notice,
        methods=methods,
        default_method=best["method"] if best else next(iter(methods), "none"),
        limits=Limits.model_validate(limits | {"max_steps": max(serving.max_steps, config.kernel.num_steps)}),
        batching=Batching.model_validate(serving.model_dump(include=set(Batching.model_fields))),
    )
    (folder / FILE).write_text(exported.model_dump_json(indent=2) + "\n")
    return exported


def add_base(folder: Path, base: Path) -> None:
    """Put the untouched denoiser of the pipeline `base` into the exported `folder`, under `base/`."""
    part = denoiser_folder(base)
    folders.copy_part(base / part, folder / BASE / part)


def read(folder: Path) -> Exported:
    """The description of an exported folder. Raises ServingError if it is none, or none that this version reads."""
    _need(folder, FILE, "critic/config.json")
    try:
        check(folder, FILE, "critic/config.json")
        described = Exported.model_validate_json(json.dumps(read_json(folder / FILE)))
        network = ADAPTER if described.base else folders.INDEX
        _need(folder, network)
        check(folder, network)
    except Damaged as error:
        raise ServingError(str(folder), str(error), "Deploy the run again, or fetch the model again.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        found = f", not {shorten(repr(first['input']))}" if path and first["type"] != "missing" else ""
        raise ServingError(
            str(folder / FILE),
            f"is not valid ({path or 'the file'}: {first['msg']}{found})",
            "Deploy the run again with this version of latentac.",
        ) from None
    return described


def _need(folder: Path, *parts: str) -> None:
    for part in parts:
        if not (folder / part).exists():
            problem = f"is not an exported model: it has no {part}"
            raise ServingError(str(folder), problem, "Name the folder of a deployed model.")


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) of the images, in pixels: what latentac.json says, or the diffusers configs."""
    if (folder / FILE).is_file():
        return read(folder).size
    denoiser = read_json(folder / denoiser_folder(folder) / "config.json")
    autoencoder = read_json(folder / "vae" / "config.json")
    # FLUX.1 and Z-Image name no size of their own; their pipelines have this default.
    size, factor = denoiser.get("sample_size", 128), 2 ** (len(autoencoder["block_out_channels"]) - 1)
    height, width = size if isinstance(size, list) else (size, size)
    return height * factor, width * factor


def denoiser_folder(folder: Path) -> str:
    """The part of a diffusers pipeline that denoises: `unet` or `transformer`."""
    return "unet" if "unet" in read_json(folder / "model_index.json") else "transformer"

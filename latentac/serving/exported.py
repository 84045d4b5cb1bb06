"""An exported model: a plain diffusers pipeline folder, plus `critic/` and `latentac.json`, which says how to sample.

Diffusers ignores what it does not know, so `StableDiffusionPipeline.from_pretrained(folder)` loads the same folder.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError

from latentac.config import Config, Kernel, NonNegative, Positive, Reward, Section
from latentac.errors import ServingError

FILE = "latentac.json"


class DefaultSteering(Section):
    """What a request without `steering` gets: each reward's head at `strength` times the reward's weight."""

    method: Literal["value_gradient", "best_of_n"] = "value_gradient"
    strength: NonNegative


class Limits(Section):
    """What one request may ask for; `max_images` is over all its instances."""

    max_images: Positive
    max_steps: Positive = 100
    max_candidates: Positive = 32
    max_prompt_characters: Positive = 1000


class Exported(Section):
    """latentac.json. version: of the model, chosen by who deploys; rewards: the critic's heads, in their order."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    version: str
    run: str
    backbone: str
    kernel: Kernel
    rewards: list[Reward]
    steering: DefaultSteering
    limits: Limits

    @property
    def default_weights(self) -> dict[str, float]:
        """Reward name -> steering weight, in standard deviations of that reward."""
        return {reward.name: self.steering.strength * reward.weight for reward in self.rewards}


def export(folder: Path, config: Config, *, run: str, version: str) -> Exported:
    """Complete `folder`, which holds a diffusers pipeline and `critic/`, with its latentac.json."""
    exported = Exported(
        version=version,
        run=run,
        backbone=config.backbone.name,
        kernel=config.kernel,
        rewards=config.rewards,
        steering=DefaultSteering(strength=config.steering.strengths.value_gradient),
        limits=Limits(max_images=config.serving.max_images, max_steps=max(100, config.kernel.num_steps)),
    )
    (folder / FILE).write_text(exported.model_dump_json(indent=2) + "\n")
    return exported


def read(folder: Path) -> Exported:
    """The description of an exported folder. Raises ServingError if it is none, or none that this version reads."""
    for part in (FILE, "model_index.json", "critic/config.json"):
        if not (folder / part).is_file():
            raise ServingError(
                str(folder), f"is no exported model: it has no {part}", "Name the folder of a deployed model."
            )
    try:
        return Exported.model_validate_json((folder / FILE).read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise ServingError(
            str(folder / FILE),
            f"is not valid ({path or 'the file'}: {first['msg']})",
            "Deploy the run again with this version of latentac.",
        ) from None


def image_size(folder: Path) -> tuple[int, int]:
    """(height, width) of the pictures, in pixels, from the diffusers configs alone."""
    index = json.loads((folder / "model_index.json").read_text())
    denoiser = json.loads((folder / ("unet" if "unet" in index else "transformer") / "config.json").read_text())
    autoencoder = json.loads((folder / "vae" / "config.json").read_text())
    side = denoiser["sample_size"] * 2 ** (len(autoencoder["block_out_channels"]) - 1)
    return side, side

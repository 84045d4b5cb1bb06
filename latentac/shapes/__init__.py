"""The embedded world: a procedural, captioned picture set, and the tiny text-to-image pipeline pretrained on it."""

from pathlib import Path

from latentac.errors import ConfigError, Problem

PIPELINES = {"shapes-unet": Path(__file__).parent / "weights" / "unet"}


def builtin_pipeline(name: str) -> Path:
    """The folder of the pretrained pipeline `name`, in the layout of diffusers' StableDiffusionPipeline.

    Raises ConfigError for a name that is not in PIPELINES.
    """
    if name not in PIPELINES:
        raise ConfigError(
            [Problem("backbone.source", name, "no such built-in pipeline", f"Use one of {', '.join(PIPELINES)}")]
        )
    return PIPELINES[name]

"""The embedded world: a procedural, captioned image set, and the tiny text-to-image pipelines pretrained on it."""

from pathlib import Path

from latentac.system.errors import ConfigError, Problem

_WEIGHTS = Path(__file__).parent / "weights"
PIPELINES = {"shapes-unet": _WEIGHTS / "unet", "shapes-dit": _WEIGHTS / "dit"}


def builtin_pipeline(name: str) -> Path:
    """The folder of the pretrained pipeline `name`, in the layout of diffusers' StableDiffusionPipeline or
    StableDiffusion3Pipeline.

    Raises ConfigError for a name that is not in PIPELINES.
    """
    if name not in PIPELINES:
        raise ConfigError(
            [Problem("backbone.source", name, "no such built-in pipeline", f"Use one of {', '.join(PIPELINES)}")]
        )
    return PIPELINES[name]

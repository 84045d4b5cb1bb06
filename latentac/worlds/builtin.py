"""The models that latentac brings: pretrained pipelines of the embedded worlds, and a CLIP of one of them."""

from pathlib import Path

from latentac.system.errors import ConfigError, Problem

_WORLDS = Path(__file__).parent
PIPELINES = {
    "shapes-unet": _WORLDS / "shapes" / "weights" / "unet",
    "shapes-dit": _WORLDS / "shapes" / "weights" / "dit",
    "words-dit": _WORLDS / "words" / "weights" / "dit",
}
"""Name -> folder in the layout of diffusers' StableDiffusionPipeline or StableDiffusion3Pipeline."""
CLIPS = {"words-clip": _WORLDS / "words" / "weights" / "clip"}
"""Name -> folder in the layout of transformers' CLIPModel and CLIPProcessor."""
_PREFIX = "builtin:"


def is_builtin(source: str) -> bool:
    """Whether a source names one of these models."""
    return source.startswith(_PREFIX)


def builtin_pipeline(source: str) -> Path:
    """The folder of a pretrained pipeline. source: its name, with or without `builtin:`. Raises ConfigError."""
    return _found(PIPELINES, "backbone.source", source)


def builtin_clip(source: str) -> Path:
    """The folder of a CLIP. source: its name, with or without `builtin:`. Raises ConfigError."""
    return _found(CLIPS, "source", source)


def _found(folders: dict[str, Path], field: str, source: str) -> Path:
    name = source.removeprefix(_PREFIX)
    if name not in folders:
        known = ", ".join(f"{_PREFIX}{each}" for each in folders)
        raise ConfigError([Problem(field, source, "is not a built-in model", f"Use one of {known}")])
    return folders[name]

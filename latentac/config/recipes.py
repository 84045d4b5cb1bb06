"""Named, complete configurations. Everything a recipe does not say has the default of `latentac.config.schema`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentac.config.fields import merge
from latentac.config.model_recipes import MODEL_RECIPES
from latentac.system.names import as_name

_METHODS = [{"use": name} for name in ("value_gradient", "best_of_n", "resampling", "twisted", "svdd")]

_SHAPES_UNET: dict[str, Any] = {
    "recipe": "shapes-unet",
    "backbone": {"use": "unet", "source": "builtin:shapes-unet"},
    "kernel": {"use": "ddim"},
    "prompts": {"source": "builtin:shapes"},
    "rewards": [
        {"use": "shapes_verifier", "weight": 1.0},
        {"use": "jpeg_compressibility", "weight": 0.0},
    ],
    "policy": {"learning_rate": 1e-4},
    "algorithm": {"use": "ppo", "gae_lambda": 0.9, "clip": 0.0015, "value_gradient": 5.0},
    "critic": {"body": {"use": "frozen_taps", "num_queries": 0}},
    "steering": {"methods": _METHODS},
    "pretrain": {"num_images": 2048, "num_passes": 10},
    "gate": {"reward": "shapes_verifier"},
}

_SHAPES_DIT = merge(
    _SHAPES_UNET,
    {
        "recipe": "shapes-dit",
        "backbone": {"use": "dit", "source": "builtin:shapes-dit"},
        "kernel": {"use": "cps", "noise": 0.9},
        "algorithm": {"clip": 0.003, "gae_lambda": 1.0},
        "critic": {"replay_images": 4096},
        "train": {"num_iterations": 60, "updates_per_iteration": 20},
    },
)

# Trained on what one engine reads, judged by another one that training does not see.
_WORDS_DIT = merge(
    _SHAPES_DIT,
    {
        "recipe": "words-dit",
        "backbone": {"source": "builtin:words-dit", "image_size": [32, 96]},
        "prompts": {"source": "builtin:words"},
        "rewards": [
            {"use": "ocr", "name": "tesseract", "engine": "tesseract", "layout": "line"},
            {"use": "ocr", "name": "rapidocr", "engine": "rapidocr", "layout": "line", "weight": 0.0},
            {"use": "clip_score", "source": "builtin:words-clip", "weight": 0.0},
            {"use": "jpeg_compressibility", "weight": 0.0},
            {"use": "ink_share", "weight": 0.0},
        ],
        "pretrain": {"num_images": 1024},
        "train": {"num_iterations": 12},
        # Prompts that name no colour vary much more than those that do, so few of them decide nothing.
        "evaluation": {"num_diversity_prompts": 128},
        "steering": {"num_images": 64},
        "gate": {"reward": "rapidocr"},
    },
)

# The same path in seconds: it proves the machinery, not the method, so its gate asks for no gain.
_SMOKE: dict[str, Any] = {
    "kernel": {"num_steps": 5},
    "pretrain": {"num_images": 32, "num_held_out_images": 32, "num_passes": 2},
    "train": {"num_iterations": 3, "images_per_iteration": 32, "block_images": 8, "checkpoint_every": 1},
    "evaluation": {
        "num_images": 32,
        "num_gallery_prompts": 4,
        "num_bootstrap": 500,
        "num_diversity_prompts": 8,
        "images_per_prompt": 3,
    },
    "steering": {
        "num_images": 8,
        "methods": {
            "value_gradient": {"sweep": [5.0], "sweep_particles": []},
            "best_of_n": {"sweep_particles": [2]},
            "resampling": {"sweep_particles": [2]},
            "twisted": {"sweep_particles": []},
            "svdd": {"sweep_particles": [2]},
        },
    },
    "gate": {
        "min_gain": -1.0,
        "min_lower_bound": -1.0,
        "max_loss_fraction": 10.0,
        "max_incumbent_loss": 1.0,
        "min_diversity_kept": 0.1,
        "max_latency_ratio": 10.0,
    },
}

RECIPES: dict[str, dict[str, Any]] = {
    "shapes-unet": _SHAPES_UNET,
    "shapes-unet-smoke": merge(_SHAPES_UNET, {**_SMOKE, "recipe": "shapes-unet-smoke"}),
    "shapes-dit": _SHAPES_DIT,
    "shapes-dit-smoke": merge(_SHAPES_DIT, {**_SMOKE, "recipe": "shapes-dit-smoke"}),
    "words-dit": _WORDS_DIT,
    "words-dit-smoke": merge(_WORDS_DIT, {**_SMOKE, "recipe": "words-dit-smoke"}),
    **MODEL_RECIPES,
}


def default_project(recipe: str, config: str, named: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """The project of a run that names none: the configuration's name, so that no other model judges it.

    That is the name of the file `config`, or of the recipe, or what the file calls itself in `recipe`. named: the
    recipe and the file; fields: with the overrides too. An override that makes it another model, by its backbone or by
    the reward that it is for, is part of the name.
    """
    own = str(fields.get("recipe"))
    parts = [own if own != RECIPES[recipe]["recipe"] or not config else Path(config).stem]
    for section, name in (("backbone", "source"), ("gate", "reward")):
        value = _at(fields, section, name)
        if value != _at(named, section, name):
            parts.append(str(value).rstrip("/").rpartition("/")[2])
    return as_name("-".join(parts))


def _at(fields: Mapping[str, Any], section: str, name: str) -> Any:
    found = fields.get(section)
    return found.get(name) if isinstance(found, Mapping) else None

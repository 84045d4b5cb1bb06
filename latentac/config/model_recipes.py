"""Recipes for published models on GPUs. Values marked `paper` are those of arXiv 2605.27736; all others are ours.

The prompts and the reward are examples: `jpeg_compressibility` needs no download. Set your own.
"""

from typing import Any

from latentac.config.fields import merge

_METHODS = [
    {"use": "value_gradient", "sweep": [10.0], "sweep_particles": []},
    {"use": "best_of_n", "sweep_particles": [2, 4]},
    {"use": "resampling", "sweep_particles": [4]},
]

_MODEL: dict[str, Any] = {
    "prompts": {"source": "builtin:animals"},
    "rewards": [
        {"use": "jpeg_compressibility", "weight": 1.0},
        {"use": "colourfulness", "weight": 0.0},
    ],
    "policy": {
        "adaptation": "lora",
        "lora_rank": 32,
        "lora_alpha": 64,
        "learning_rate": 3e-4,
        "ema_decay": 0.99,
    },  # paper
    "algorithm": {"use": "ppo", "gae_lambda": 0.95},
    # Channel statistics take few numbers per state: taps with attention take 650 KB on Stable Diffusion 1.5.
    "critic": {
        "body": {"use": "frozen_taps", "num_queries": 0, "width": 512, "num_heads": 8},
        "learning_rate": 1e-3,
    },  # paper: width, heads, rate
    "pretrain": {"num_images": 512, "num_held_out_images": 64, "num_passes": 10},
    "evaluation": {"num_images": 128, "num_diversity_prompts": 16},
    "steering": {"methods": _METHODS, "num_images": 32},
    "gate": {"reward": "jpeg_compressibility", "min_gain": 0.0, "max_loss_fraction": 1.0},
    "serving": {"include_base": True, "ready_seconds": 900.0, "request_seconds": 900.0},
}

_SD15_LORA = merge(
    _MODEL,
    {
        "recipe": "sd15-lora",
        "backbone": {"use": "unet", "source": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
        "kernel": {"use": "ddim", "noise": 1.0, "num_steps": 20},  # paper; 50 steps for fidelity
        "algorithm": {"clip": 1e-5},  # paper
        "train": {
            "num_iterations": 50,
            "images_per_iteration": 256,  # paper
            "updates_per_iteration": 4,  # paper
            "block_images": 16,
            "checkpoint_every": 5,
        },
    },
)

_SD15_FULL = merge(
    _SD15_LORA, {"recipe": "sd15-full", "policy": {"adaptation": "full", "learning_rate": 1e-4}}
)  # paper

_SDXL_LORA = merge(
    _SD15_LORA,
    {
        "recipe": "sdxl-lora",
        "backbone": {"use": "sdxl", "source": "stabilityai/stable-diffusion-xl-base-1.0"},
        "train": {"images_per_iteration": 64, "block_images": 8},
    },
)

_SD35M_LORA = merge(
    _MODEL,
    {
        "recipe": "sd35m-lora",
        "backbone": {
            "use": "dit",
            "source": "stabilityai/stable-diffusion-3.5-medium",
            "image_size": [512, 512],  # its own configuration says 1024, at 4.5 times the cost
        },
        "kernel": {"use": "flow_sde", "noise": 0.7, "num_steps": 10},  # paper
        "algorithm": {"clip": 1e-4},  # paper
        "train": {
            "num_iterations": 50,
            "images_per_iteration": 128,  # paper
            "updates_per_iteration": 4,  # paper
            "block_images": 16,
            "checkpoint_every": 5,
        },
    },
)

_FLUX_LORA = merge(
    _SD35M_LORA,
    {
        "recipe": "flux-lora",
        "backbone": {
            "use": "flux",
            "source": "black-forest-labs/FLUX.1-dev",
            "gradient_checkpointing": True,  # 12 billion weights leave little room for activations
        },
        "train": {"images_per_iteration": 64, "block_images": 8},
    },
)

_ZIMAGE_LORA = merge(
    _FLUX_LORA,
    {
        "recipe": "zimage-lora",
        "backbone": {
            "use": "zimage",
            "source": "Tongyi-MAI/Z-Image-Turbo",
            "text_tokens": 128,  # at 512 pixels an image has 1,024
        },
        "kernel": {"num_steps": 8},  # as many as Turbo was distilled for
    },
)

MODEL_RECIPES: dict[str, dict[str, Any]] = {
    "sd15-lora": _SD15_LORA,
    "sd15-full": _SD15_FULL,
    "sdxl-lora": _SDXL_LORA,
    "sd35m-lora": _SD35M_LORA,
    "flux-lora": _FLUX_LORA,
    "zimage-lora": _ZIMAGE_LORA,
}

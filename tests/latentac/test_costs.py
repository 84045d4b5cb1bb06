"""The floating-point operations of a run: counted for one image, added up by step."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentac.backbones import load_backbone
from latentac.backbones.guided import guided
from latentac.config.schema import Config
from latentac.runs.configuration import recipe_fields
from latentac.runs.gpus import GPUS, SHARE
from latentac.runs.preparation.costs import Operations, count_operations, describe_costs, operations_by_step
from latentac.runs.resolution import resolve_all
from latentac.worlds.builtin import builtin_pipeline

CPU = torch.device("cpu")
BARE = {
    "algorithm.value_gradient": 0.0,
    "algorithm.prediction_kl": 0.0,
    "critic.replay_images": 0,
    "critic.num_passes": 2,
    "pretrain.num_images": 0,
    "policy.adaptation": "lora",
    "kernel.num_steps": 10,
    "train.num_iterations": 3,
    "train.images_per_iteration": 32,
    "train.block_images": 16,
    "steering.methods": "[]",
    "steering.num_images": 8,
}


def config(name: str = "unet", **settings: Any) -> Config:
    """A recipe with the cheapest choices. Keyword arguments name fields with __ for a dot."""
    given = BARE | {path.replace("__", "."): value for path, value in settings.items()}
    fields = recipe_fields(f"shapes-{name}-smoke", "", [f"{path}={value}" for path, value in given.items()])
    return resolve_all(fields).config


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_operations_are_counted_without_computing_them(name: str, scale: float) -> None:
    """They are those of a real forward pass with the same attention. Guidance doubles them, but for the text of no
    prompt, which is as long as it is."""
    settings = config(name, policy__guidance_scale=scale)
    backbone = load_backbone(settings.backbone, builtin_pipeline(f"shapes-{name}"), CPU)
    conditioning = backbone.encode(["a red circle"])
    found = count_operations(settings, guided(backbone, scale), conditioning)
    latents, sigma = torch.randn(1, *backbone.latent_shape), torch.full((1,), 0.5)
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        with FlopCounterMode(display=False) as forward:
            backbone.predict(latents, sigma, conditioning)
        with FlopCounterMode(display=False) as decoding:
            backbone.images(latents)
    assert found.decoding == decoding.get_total_flops() > 0
    assert found.num_stochastic in (9, 10)
    if scale == 1:
        assert found.forward == forward.get_total_flops() > 0
    else:
        assert 2 <= found.forward / forward.get_total_flops() < 2.5


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        ({}, 10 + 9 * 2),
        ({"policy__adaptation": "full"}, 10 + 9 * 3),
        ({"algorithm__value_gradient": 2.0}, 10 + 9 * 3),
        ({"algorithm__prediction_kl": 0.1}, 10 + 9 * 3),
        ({"backbone__gradient_checkpointing": True}, 10 + 9 * 3),
        ({"critic__replay_images": 64}, 10 + 9 * 2 + 2 * 10),
        ({"critic__body": "{use: lora}"}, 10 + 9 * 2 + 10 * (1 + 2 * 2)),
        ({"critic__body": "{use: copy}"}, 10 + 9 * 2 + 10 * (1 + 2 * 3)),
    ],
)
def test_an_image_of_training_costs_what_the_settings_ask_for(settings: dict[str, Any], forwards: int) -> None:
    """In forward passes of 10 steps, 9 of them stochastic; the decoder is counted once."""
    chosen = config(**settings)
    found = operations_by_step(chosen, Operations(1.0, 0.0, 9))
    assert found["train"] == 3 * 32 * forwards
    assert operations_by_step(chosen, Operations(0.0, 1.0, 9))["train"] == 3 * 32


def test_the_other_steps_cost_their_images() -> None:
    """Value pretraining its images and their noised states, evaluation its policies, steering its particles."""
    pretrain = {"num_images": 64, "num_held_out_images": 16, "num_passes": 3, "forward_noised": 0.5}
    steering = "[{use: best_of_n, sweep_particles: [4]}, {use: value_gradient, sweep: [10.0], sweep_particles: [2]}]"
    own: dict[str, Any] = {f"pretrain__{name}": value for name, value in pretrain.items()}
    chosen = config(**own, steering__methods=steering)
    found = operations_by_step(chosen, Operations(1.0, 0.0, 9))
    assert found["pretrain-value"] == 80 * 10 + 3 * 64 * 10 * 0.5
    settings = chosen.evaluation
    more = 2 * settings.num_diversity_prompts * settings.images_per_prompt
    assert found["evaluate"] == (2.25 * settings.num_images + more) * 10
    gradients = 5  # of 10 steps, from 0.3 to 0.8
    assert found["steer"] == 8 * (10 + 4 * 10 + (10 + gradients) + 2 * (10 + gradients))


def test_hours_and_cost_are_stated_for_a_named_gpu() -> None:
    """They follow from the operations, the speed and the price; without a GPU there are none."""
    chosen, one = config(), Operations(1e12, 0.0, 9)
    seconds = sum(operations_by_step(chosen, one).values()) / (SHARE * GPUS["h100"] * 1e12)
    lines = describe_costs(chosen, one, "h100", 3.6)
    assert f"time on one h100: about {seconds / 3600:.3g} h at 15% of its 989 TFLOP/s" in lines
    assert f"cost: about {seconds / 1000:.3g} at 3.6 per GPU-hour" in lines
    assert not any("time" in line or "cost" in line for line in describe_costs(chosen, one))

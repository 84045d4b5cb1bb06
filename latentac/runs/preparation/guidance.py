"""Whether the base needs classifier-free guidance: its reward with and without, on a few prompts."""

import logging
from collections.abc import Sequence
from typing import Any

from latentac.backbones import Denoiser
from latentac.backbones.guided import guided
from latentac.config.schema import Config
from latentac.rewards.configured import ConfiguredReward
from latentac.worlds.prompts import PromptSet, balanced

SCALE = 5.0
"""Guidance scale of the comparison: between the defaults of Stable Diffusion 1.5 (7.5) and 3.5 (3.5)."""
_PROMPTS = 8
_ERRORS = 3.0
_MOST_ON_CPU = 10**8  # weights: a larger model takes minutes per image there
_log = logging.getLogger(__name__)


def compare_guidance(
    config: Config, backbone: Denoiser, rewards: Sequence[ConfiguredReward], prompts: PromptSet
) -> dict[str, Any] | None:
    """Sample the same noise with and without guidance. Returns {reward, scale, images, without, with}, means over the
    images; None where the run trains with guidance already, or where a CPU would take minutes.

    Warns where guidance raises the main reward by more than three standard errors: training then starts from images
    that are worse than the model's own.
    """
    from latentac.evaluation.held_out import Sampling, sample
    from latentac.sampling.kernels import KERNELS
    from latentac.sampling.policy import Policy

    large = sum(each.numel() for each in backbone.module.parameters()) > _MOST_ON_CPU
    if config.policy.guidance_scale != 1 or (large and backbone.device.type == "cpu"):
        return None
    chosen = [prompts.train[index] for index in balanced(prompts.train, _PROMPTS, config.seed, "guidance")]
    main, kernel = rewards[config.main_reward], KERNELS.make(config.kernel, path="kernel")
    scores = []
    for scale in (1.0, SCALE):
        policy = Policy(guided(backbone, scale), kernel)
        arm = sample(policy, None, [main], chosen, Sampling.of(config))
        scores.append(arm.scores.rewards[:, 0].double())
    without, with_guidance = scores
    gain = with_guidance - without
    if float(gain.mean()) > _ERRORS * float(gain.std()) / len(gain) ** 0.5:
        _log.warning(
            "without classifier-free guidance the base's %s is %.3g, with scale %g it is %.3g: training starts from "
            "images that are worse than the model's own. Consider policy.guidance_scale=%g, at twice the cost",
            *(main.name, float(without.mean()), SCALE, float(with_guidance.mean()), SCALE),
        )
    means = {"without": float(without.mean()), "with": float(with_guidance.mean())}
    return {"reward": main.name, "scale": SCALE, "images": len(chosen), **means}

"""What each logged number means, and the name that it has in TensorBoard, MLflow and Weights & Biases."""

from collections.abc import Mapping
from typing import Any

GROUPS = ("reward", "evaluation", "policy", "critic", "time")
"""What a name begins with, in the order in which a person wants to see them."""

DEFINITIONS = {
    "reward_mean": "mean of the first trained reward over the iteration's images, in its own unit",
    "policy_loss": "surrogate objective, mean over transitions, averaged over the iteration's updates",
    "value_loss": "0.5 (V - clamp(R))^2 in squared standard deviations of each reward, mean over the last pass",
    "kl": "KL(policy of the rollouts || present policy) per denoising step in nats, mean over transitions and updates",
    "clip_share": "share of transitions whose gradient the trust region removed",
    "value_gradient_kl": "KL(policy moved by the value gradient || present policy) per denoising step in nats",
    "prediction_kl": "mean (prediction - the base's prediction)^2 over transitions and dimensions",
    "zero_std_share": "share of images in groups whose rewards are all equal, which were dropped",
    "ratio_deviation": "mean |ratio - 1|, in the unit of algorithm.log_prob_scale",
    "first_ratio_deviation": "ratio_deviation before the first update: 0 but for rounding, as nothing has changed yet",
    "gradient_below_eps": "share of gradient entries whose absolute value is below Adam's eps, which hardly moves them",
    "gradient_norm": "L2 norm of the policy's gradient before clipping",
    "seconds": "wall time of the iteration",
    "rollout_seconds": "wall time of the iteration's rollouts, with decoding and scoring",
    "rows_per_forward": "rows per forward pass of the network, where train.micro_images or the memory bounds them",
    "world_size": "number of workers in the iteration; an elastic job may have fewer than requested",
}
"""Scalars of the training history by name; an algorithm or a setting that has no such number leaves it out."""

STEPWISE = {
    "explained_variance": "1 - Var(R - V) / Var(R) of the main reward on the iteration's own rollouts",
    "rank_correlation": "Kendall's tau-b of V and R over pairs of rollouts of one prompt, if there are such pairs",
}
"""One number a denoising step, noise first."""

BY_REWARD = {
    "multipliers": "Lagrange multiplier of the reward's floor in the iteration, in the unit of its weight",
    "cache_hit_rate": "share of the reward's scores in the iteration that were taken from its cache",
}
"""One number per reward that has one."""

SPEED = {
    "images_per_second": "images of the iteration per second of wall time, of all workers together",
    "tflops": "floating-point operations of the iteration, counted from the model, in TFLOP/s of all workers together",
    "peak_share": "tflops divided by the data-sheet speed of the GPUs, where it is known",
    "straggler": "own time of the slowest worker divided by the mean; own time is without waiting for other workers",
    "moved_bytes": "bytes that each worker gave to collective operations, without those in the passes of FSDP2",
}
"""Numbers of `speed` in the training history."""

PHASES = {
    "rollout": "seconds of rollouts, decoding and scoring",
    "policy": "seconds of advantages and policy updates",
    "critic": "seconds of critic updates",
    "waiting": "part of these seconds that the worker spent in collective operations",
}
"""Seconds of each worker in `speed.phases` of the training history."""

GAIN = "evaluation/gain"
"""What a run is judged by: trained minus base on held-out prompts, by the reward of the gate."""

_GROUP_OF = {"reward_mean": "reward", "value_loss": "critic"} | dict.fromkeys(
    ("seconds", "rollout_seconds", "rows_per_forward", "world_size", "cache_hit_rate"), "time"
)


def of_iteration(entry: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of one iteration's entry of the history, the reward first."""
    found = {f"reward/{name}": mean for name, mean in entry["rewards"].items()}
    for name in DEFINITIONS:
        if name in entry:
            found[f"{_GROUP_OF.get(name, 'policy')}/{name}"] = entry[name]
    for name in BY_REWARD:
        found |= {f"{_GROUP_OF.get(name, 'policy')}/{name}/{reward}": n for reward, n in entry.get(name, {}).items()}
    speed = entry.get("speed", {})
    found |= {f"time/{name}": speed[name] for name in SPEED if name in speed}
    for name in PHASES:
        each = speed.get("phases", {}).get(name, ())
        found |= {f"time/{name}/worker_{rank:02d}": seconds for rank, seconds in enumerate(each)}
    for name in STEPWISE:
        found |= {f"critic/{name}/step_{step:02d}": value for step, value in enumerate(entry.get(name, ()))}
    return found


def of_evaluation(content: Mapping[str, Any], reward: str) -> dict[str, float]:
    """The scalars of evaluation.json: the gain by the gate's `reward`, then of each reward base, trained and gain."""
    gain = content["difference"][reward]
    found = {GAIN: gain["mean"], f"{GAIN}_low": gain["low"], f"{GAIN}_high": gain["high"]}
    for name in content["trained"]:
        for figure, rows in (("base", "base"), ("trained", "trained"), ("gain", "difference")):
            found[f"evaluation/{name}/{figure}"] = content[rows][name]["mean"]
    for measure, value in (("kept", "ratio"), ("ratio", "median")):
        for kind in ("diversity", "latency"):
            for arm, row in content[kind].get(measure, {}).items():
                found[f"evaluation/{kind}_to_{arm}"] = row[value]
    return found

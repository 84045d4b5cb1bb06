"""Fixed prompts, fixed seeds, intervals: the numbers that a run reports, and the pictures beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from latentac.config import Config
from latentac.critic import Critic
from latentac.distributed import map_blocks, noise_for
from latentac.policy import Policy
from latentac.progress import progress
from latentac.prompts import Prompt, balanced
from latentac.returns import explained_variance
from latentac.rewards import Reward
from latentac.rollout import rollout, score, steered_rollout
from latentac.steering import Steering
from latentac.types import Scores, Trajectory


@dataclass(frozen=True)
class Arm:
    """What one way of sampling gave. images: uint8 [N, H, W, 3]; scores: N rows; values: [N, K, M]."""

    images: np.ndarray
    scores: Scores
    values: Tensor


def sample(
    policy: Policy,
    critic: Critic | None,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    seed: int,
    num_steps: int,
    *,
    steering: Steering | None = None,
    label: str = "sampling",
    block_images: int = 32,
) -> Arm:
    """One picture a prompt. Image i has the same noise in every arm; its candidate 0 is the unsteered rollout."""
    device = policy.backbone.encode(prompts[:1]).tokens.device
    blocks = [range(start, min(start + block_images, len(prompts))) for start in range(0, len(prompts), block_images)]

    with progress(len(prompts), label, "images") as bar:

        def run(block: range) -> tuple[np.ndarray, Scores, Tensor]:
            texts = [prompts[slot] for slot in block]
            trajectory = _roll_out(policy, critic, texts, block, seed, num_steps, steering, device)
            images = policy.backbone.decode(trajectory.clean)
            scores = score(rewards, images, texts)
            bar.update(len(block))
            return images, scores, trajectory.values

        parts = map_blocks(run, blocks, device)
    return Arm(
        images=np.concatenate([images for images, _, _ in parts]),
        scores=Scores(torch.cat([scores.rewards for _, scores, _ in parts]), parts[0][1].names),
        values=torch.cat([values for _, _, values in parts]),
    )


def _roll_out(
    policy: Policy,
    critic: Critic | None,
    texts: Sequence[str],
    slots: range,
    seed: int,
    num_steps: int,
    steering: Steering | None,
    device: torch.device,
) -> Trajectory:
    conditioning = policy.backbone.encode(texts)
    candidates = steering.candidates if steering else 1
    keys = [("evaluation", slot, candidate) for slot in slots for candidate in range(candidates)]
    noise = noise_for(keys, seed, num_steps, policy.backbone.latent_shape).to(device)
    if steering is None or critic is None:
        return rollout(policy, critic, texts, conditioning, noise)
    return steered_rollout(policy, critic, texts, conditioning, noise.unflatten(0, (-1, candidates)), steering)


def interval(numbers: np.ndarray, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """{mean, low, high, n}: the mean of independent numbers [N] and its 95 % percentile bootstrap interval."""
    mean = float(numbers.mean())
    if np.ptp(numbers) == 0:
        return {"mean": mean, "low": mean, "high": mean, "n": len(numbers)}
    found = stats.bootstrap(
        (numbers,), np.mean, n_resamples=num_bootstrap, batch=100, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return {"mean": mean, "low": float(found.low), "high": float(found.high), "n": len(numbers)}


def intervals(scores: Scores, num_bootstrap: int, seed: int) -> dict[str, dict[str, Any]]:
    """`interval` of every reward."""
    return {name: interval(scores.column(name).numpy(), num_bootstrap, seed) for name in scores.names}


def compare(
    config: Config,
    base: Policy,
    trained: Policy,
    critic: Critic,
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Base against trained on held-out prompts, the categories in turn, the same noise for both.

    Returns evaluation.json {base, trained, difference: reward -> interval, units, categories, critic} and the gallery.
    The intervals resample images; that of the difference resamples pairs of images with the same prompt and noise.
    """
    settings, seed = config.evaluation, config.seed
    chosen = [prompts[index] for index in balanced(prompts, settings.num_images, seed, "evaluation")]
    texts = [prompt.text for prompt in chosen]
    steps = config.kernel.num_steps
    before = sample(base, None, rewards, texts, seed, steps, label="evaluate base")
    after = sample(trained, critic, rewards, texts, seed, steps, label="evaluate trained")
    main = config.reward_names.index(config.gate.reward)
    difference = Scores(after.scores.rewards - before.scores.rewards, before.scores.names)
    labels = np.array([prompt.category for prompt in chosen])
    content = {
        "base": intervals(before.scores, settings.num_bootstrap, seed),
        "trained": intervals(after.scores, settings.num_bootstrap, seed),
        "difference": intervals(difference, settings.num_bootstrap, seed),
        "units": {reward.name: reward.unit for reward in rewards},
        "categories": {
            category: {
                arm: float(scores.rewards[torch.from_numpy(labels == category), main].mean())
                for arm, scores in (("base", before.scores), ("trained", after.scores))
            }
            for category in sorted(set(labels.tolist()))
        },
        "critic": {
            "explained_variance": explained_variance(after.values[..., main], after.scores.rewards[:, main]).tolist()
        },
    }
    count = min(settings.num_gallery_prompts, len(texts))
    return content, gallery(config, texts[:count], {"base": before.images[:count], "trained": after.images[:count]})


def gallery(config: Config, texts: Sequence[str], arms: dict[str, np.ndarray]) -> dict[str, Any]:
    """Contact sheets by arm and their index: picture i of each sheet has prompt i and noise i of the run's seed."""
    columns = 4
    sheets: dict[str, Any] = {name: contact_sheet(images, columns) for name, images in arms.items()}
    size = next(iter(arms.values())).shape[1]
    index = {"prompts": list(texts), "seeds": [f"{config.seed}/{i}" for i in range(len(texts))]}
    return {**sheets, "index": {**index, "image_size": size, "columns": columns}}


def contact_sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Pictures uint8 [N, H, W, 3] in rows of `columns`, without margins."""
    count, height, width, _ = images.shape
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for index, picture in enumerate(images):
        sheet.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    return sheet

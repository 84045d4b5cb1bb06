"""Fixed prompts, fixed seeds, intervals: the numbers that a run reports, and the images beside them."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentac.config.schema import Config, Evaluation
from latentac.critic import Critic
from latentac.evaluation.measures import DEFINITIONS, difference, diversity, interval, intervals, median, ratio
from latentac.method.randomness import noise_for, uniforms_for
from latentac.method.records import Conditioning, Scores, Trajectory, join_trajectories
from latentac.method.returns import explained_variance
from latentac.rewards.configured import ConfiguredReward, any_outside
from latentac.sampling.devices import map_blocks, map_overlapped
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout, score, steered_rollout
from latentac.sampling.rows import Rows
from latentac.sampling.steering import Steering
from latentac.sampling.steering.run import SteeringRun
from latentac.system.progress import Progress, progress
from latentac.worlds.prompts import Prompt, PromptSet, balanced


@dataclass(frozen=True)
class Sampling:
    """How images are sampled for a comparison: equal prompts, seeds and steps have equal noise.

    block_images: so many go through the denoiser together, each with all its particles.
    """

    seed: int
    num_steps: int
    block_images: int

    @classmethod
    def of(cls, config: Config) -> "Sampling":
        """As the run's images are."""
        return cls(config.seed, config.kernel.num_steps, config.train.block_images)


@dataclass(frozen=True)
class Arm:
    """What one way of sampling gave. images: uint8 [N, H, W, 3]; scores: N rows; values: [N, K, M]."""

    images: np.ndarray
    scores: Scores
    values: Tensor

    def first(self, count: int) -> "Arm":
        """The first `count` images."""
        scores = Scores(self.scores.rewards[:count], self.scores.names)
        return Arm(self.images[:count], scores, self.values[:count])


def sample(
    policy: Policy,
    critic: Critic | None,
    rewards: Sequence[ConfiguredReward],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    steering: Steering | None = None,
    bar: Progress[Any] | None = None,
    units: int = 1,
) -> Arm:
    """One image per prompt. Image i has the same noise in every arm; its particle 0 is the unsteered rollout.

    bar: of the step that this is a part of; an image counts `units` of it.
    """
    device, size = policy.backbone.device, sampling.block_images
    blocks = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]

    def run(block: range) -> tuple[range, np.ndarray, Tensor]:
        conditioning = policy.backbone.encode([prompts[slot].text for slot in block])
        trajectory = _roll_out(policy, critic, conditioning, block, sampling, steering)
        return block, policy.backbone.decode(trajectory.clean), trajectory.values

    def scored(made: tuple[range, np.ndarray, Tensor]) -> tuple[np.ndarray, Scores, Tensor]:
        block, images, values = made
        scores = score(rewards, images, [prompts[slot] for slot in block])
        if bar is not None:
            bar.update(units * len(block))
        return images, scores, values

    parts = map_overlapped(run, scored, blocks, device, outside=any_outside(rewards))
    return Arm(
        images=np.concatenate([images for images, _, _ in parts]),
        scores=Scores(torch.cat([scores.rewards for _, scores, _ in parts]), parts[0][1].names),
        values=torch.cat([values for _, _, values in parts]),
    )


def _roll_out(
    policy: Policy,
    critic: Critic | None,
    conditioning: Conditioning,
    slots: range,
    sampling: Sampling,
    steering: Steering | None,
) -> Trajectory:
    device, seed, num_steps = policy.backbone.device, sampling.seed, sampling.num_steps
    particles = steering.particles if steering else 1
    keys = [("evaluation", slot, particle) for slot in slots for particle in range(particles)]
    noise = noise_for(keys, seed, num_steps, policy.backbone.latent_shape).to(device)
    if steering is None or critic is None:
        return rollout(policy, critic, conditioning, noise)
    uniforms = uniforms_for([("evaluation", slot) for slot in slots], seed, num_steps).to(device)
    parted = noise.unflatten(0, (-1, particles))
    # The gradient of a step runs through all its rows, so images are divided here and not within a step.
    limit = policy.rows.limit
    images = Rows(None if limit is None else max(1, limit // particles))

    def steered(part: range) -> Trajectory:
        rows = torch.arange(part.start, part.stop, device=device)
        run = SteeringRun(steering, uniforms[rows])
        return steered_rollout(policy, critic, conditioning.rows(rows), parted[rows], run)

    return join_trajectories(images.run(len(slots), steered))


def compare(
    settings: Evaluation,
    sampling: Sampling,
    policies: Mapping[str, Policy],
    critic: Critic,
    rewards: Sequence[ConfiguredReward],
    prompts: PromptSet,
    *,
    main_reward: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policies `base`, `trained` and, where there is one, `incumbent` on held-out prompts, the categories in turn,
    the same noise for each; and `trained` on a quarter as many training prompts.

    Returns evaluation.json and the gallery with scores.json (see `image_scores`). evaluation.json: {<arm>: reward ->
    interval, difference (trained - base), incumbent_difference (trained - incumbent) and held_out_gap: reward ->
    interval, units, categories, critic, and `contrasts`}. Intervals resample images; those of a difference of two
    policies resample pairs of images with the same prompt and noise. main_reward: the one that categories and critic
    are measured by.
    """
    seed, held_out = sampling.seed, prompts.held_out
    chosen = [held_out[index] for index in balanced(held_out, settings.num_images, seed, "evaluation")]
    texts = [prompt.text for prompt in chosen]
    seen = [prompts.train[i] for i in balanced(prompts.train, settings.num_images // 4, seed, "evaluation")]
    more = (settings.images_per_prompt - 1) * len(texts[: settings.num_diversity_prompts])
    with progress(len(policies) * (len(texts) + more) + len(seen), "evaluate", "images") as bar:
        arms = {}
        for number, (name, policy) in enumerate(policies.items(), 1):
            bar.begin(f"policy {number} of {len(policies)}: {name}")
            watching = critic if name == "trained" else None
            arms[name] = sample(policy, watching, rewards, chosen, sampling, bar=bar)
        bar.begin("trained, on training prompts")
        fitted = sample(policies["trained"], None, rewards, seen, sampling, bar=bar)
        bar.begin("diversity and latency")
        images = {name: arm.images for name, arm in arms.items()}
        measured = contrasts(settings, sampling, policies, texts, images, bar)
    trained = arms["trained"]
    main = trained.scores.names.index(main_reward)
    differences = {
        key: Scores(trained.scores.rewards - arms[name].scores.rewards, trained.scores.names)
        for name, key in (("base", "difference"), ("incumbent", "incumbent_difference"))
        if name in arms
    }
    labels = np.array([prompt.category for prompt in chosen])
    content = {
        **{name: intervals(arm.scores, settings.num_bootstrap, seed) for name, arm in arms.items()},
        **{key: intervals(scores, settings.num_bootstrap, seed) for key, scores in differences.items()},
        "held_out_gap": {
            name: difference(
                fitted.scores.column(name).numpy(), trained.scores.column(name).numpy(), settings.num_bootstrap, seed
            )
            for name in trained.scores.names
        },
        "units": {reward.name: reward.unit for reward in rewards},
        "categories": {
            category: {
                name: float(arm.scores.rewards[torch.from_numpy(labels == category), main].mean())
                for name, arm in arms.items()
            }
            for category in sorted(set(labels.tolist()))
        },
        "critic": {
            "explained_variance": explained_variance(
                trained.values[..., main], trained.scores.rewards[:, main]
            ).tolist()
        },
        **measured,
    }
    count = min(settings.num_gallery_prompts, len(texts))
    shown = gallery(seed, texts[:count], {name: arm.first(count) for name, arm in arms.items()})
    shape = policies["trained"].backbone.latent_shape
    return content, {**shown, "scores": image_scores(sampling, texts, arms, shape)}


def image_scores(
    sampling: Sampling, texts: Sequence[str], arms: Mapping[str, Arm], latent_shape: Sequence[int]
) -> dict[str, Any]:
    """scores.json: what each image scored, so that two runs can be compared image by image.

    {"prompts": texts, "noise": what it was drawn from: two runs with equal ones have the same noise for image i,
    "rewards": {<arm>: {<reward>: a number per image}}}.
    """
    noise = {"seed": sampling.seed, "num_steps": sampling.num_steps, "latent_shape": list(latent_shape)}
    return {"prompts": list(texts), "noise": noise, "rewards": {name: _columns(arm) for name, arm in arms.items()}}


def _columns(arm: Arm) -> dict[str, list[float]]:
    return {name: arm.scores.column(name).tolist() for name in arm.scores.names}


def contrasts(
    settings: Evaluation,
    sampling: Sampling,
    policies: Mapping[str, Policy],
    texts: Sequence[str],
    images: Mapping[str, np.ndarray],
    bar: Progress[Any] | None = None,
) -> dict[str, Any]:
    """{diversity, latency, definitions} of the policies, from a few more images of the first prompts.

    images: of each policy, those that `sample` gave for `texts`; they are the first image of each prompt.
    diversity: {<arm>: interval, difference and kept: of trained to each other arm, prompts resampled in pairs};
    latency: {<arm>: median, ratio: of trained to each other arm, block_images}.
    """
    texts = texts[: settings.num_diversity_prompts]
    more, seconds, block = _more_images(settings.images_per_prompt, sampling, policies, texts, bar)
    resampling = (settings.num_bootstrap, sampling.seed)
    spread = {name: diversity(np.concatenate([images[name][: len(texts), None], more[name]], 1)) for name in policies}
    others = [name for name in policies if name != "trained"]
    trained = spread["trained"]
    return {
        "diversity": {
            **{name: interval(numbers, *resampling) for name, numbers in spread.items()},
            "difference": {name: interval(trained - spread[name], *resampling) for name in others},
            "kept": {name: ratio(trained, spread[name], *resampling) for name in others},
        },
        "latency": {
            **{name: median(numbers, *resampling) for name, numbers in seconds.items()},
            "ratio": {name: median(seconds["trained"] / seconds[name], *resampling) for name in others},
            "block_images": block,
        },
        "definitions": DEFINITIONS,
    }


def _more_images(
    images_per_prompt: int,
    sampling: Sampling,
    policies: Mapping[str, Policy],
    texts: Sequence[str],
    bar: Progress[Any] | None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """The further images of each prompt, uint8 [P, D - 1, H, W, 3] per policy, the seconds per image of each block of
    them [blocks], and a block's number of images.

    All policies do a block one after another, in turns the first first or last, so that a busy machine slows all. On a
    CPU a block is one thread's work: its processor time leaves out what else runs there.
    """
    draws = range(1, images_per_prompt)
    size = min(sampling.block_images, max(1, len(texts) // 8))  # eight of each draw, to be compared in pairs
    blocks = [
        (number, draw, range(start, min(start + size, len(texts))))
        for number, (draw, start) in enumerate(itertools.product(draws, range(0, len(texts), size)))
    ]
    device = next(iter(policies.values())).backbone.device
    clock = time.thread_time if device.type == "cpu" else time.perf_counter

    def run(block: tuple[int, int, range]) -> dict[str, tuple[np.ndarray, float]]:
        number, draw, slots = block
        prompts = [texts[slot] for slot in slots]
        found = {}
        for name in list(policies)[:: 1 if number % 2 else -1]:
            policy, started = policies[name], clock()
            keys = [("evaluation", slot, draw) for slot in slots]
            noise = noise_for(keys, sampling.seed, sampling.num_steps, policy.backbone.latent_shape).to(device)
            trajectory = rollout(policy, None, policy.backbone.encode(prompts), noise)
            decoded = policy.backbone.decode(trajectory.clean)  # in the CPU's memory, so the device has finished
            found[name] = decoded, (clock() - started) / len(slots)
            if bar is not None:
                bar.update(len(slots))
        return found

    parts = map_blocks(run, blocks, device)
    images, seconds = {}, {}
    for name in policies:
        flat = np.concatenate([part[name][0] for part in parts])
        images[name] = flat.reshape(len(draws), len(texts), *flat.shape[1:]).swapaxes(0, 1)
        seconds[name] = np.array([part[name][1] for part in parts])
    return images, seconds, size


def gallery(seed: int, texts: Sequence[str], arms: Mapping[str, Arm]) -> dict[str, Any]:
    """Contact sheets by arm and their index: image i of each sheet has prompt i and noise i of the run's seed.

    The index has what each image scored, {<arm>: {<reward>: a number per image}}.
    """
    columns = 4
    sheets: dict[str, Any] = {name: contact_sheet(arm.images, columns) for name, arm in arms.items()}
    height, width = next(iter(arms.values())).images.shape[1:3]
    index = {"prompts": list(texts), "seeds": [f"{seed}/{i}" for i in range(len(texts))]}
    scores = {name: _columns(arm) for name, arm in arms.items()}
    return {**sheets, "index": {**index, "image_size": [height, width], "columns": columns, "rewards": scores}}


def contact_sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Images uint8 [N, H, W, 3] in rows of `columns`, without margins."""
    count, height, width, _ = images.shape
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for index, pixels in enumerate(images):
        sheet.paste(Image.fromarray(pixels), (index % columns * width, index // columns * height))
    return sheet

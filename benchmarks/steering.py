"""What steering gives for its evaluations, on base and trained weights, against best-of-N by the true reward.

    python -m benchmarks.steering [--recipe shapes-unet] [--run FOLDER] [--prompts 384]

Every way to steer makes N particles per image, and one of them is chosen twice: by the critic and by the true reward.
All ways have the same held-out prompts and noise. One process, one thread; what was measured is in build/steering and
is not measured again unless sources, settings or weights have changed.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import figures, report
from benchmarks.aggregate import dump
from benchmarks.claims import MULTIPLES, verdicts
from benchmarks.plan import FULL, ROOT, require_clean_tree
from benchmarks.unit import measured, sources
from latentac.backbones import load_backbone
from latentac.backbones.guided import guided
from latentac.config.schema import Config
from latentac.critic import Critic
from latentac.evaluation.measures import diversity, interval, median
from latentac.method.randomness import noise_for, uniforms_for
from latentac.method.records import Trajectory
from latentac.runs import steps
from latentac.runs.configuration import recipe_fields
from latentac.runs.preparation.prepare import environment
from latentac.runs.resolution import resolve_all
from latentac.runs.workspace import default_store
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.sampling.rollout import rollout, score
from latentac.sampling.steering import STEERING, Steering, evaluations
from latentac.sampling.steering.run import SteeringRun
from latentac.sampling.true_reward import TrueReward
from latentac.store import open_store
from latentac.system.progress import progress
from latentac.worlds.builtin import builtin_pipeline
from latentac.worlds.prompts import Prompt, balanced, load_prompts

GUIDANCE_SCALE = 2.0
FOLDER = ROOT / "build" / "steering"
CHOICES = ("critic", "reward")
_PROMPTS = 384
_DIVERSE = 32  # of the first so many prompts a second image is made, for diversity
_ROWS = 64  # rollouts at once, whatever the number of particles
_BOOTSTRAP = 2000
_TURNS = 12

Record = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to make particles. truth: the values are the true reward's; scale: of classifier-free guidance; most: the
    largest of MULTIPLES; nested: fewer particles are the first of many, so one rollout measures every number."""

    label: str
    method: str
    truth: bool = False
    scale: float = 1.0
    most: int = 16
    nested: bool = False


WAYS: dict[str, Way] = {
    "best_of_n": Way("best of N", "best_of_n", nested=True),
    "resampling": Way("resampling", "resampling"),
    "value_gradient": Way("value gradient", "value_gradient"),
    "twisted": Way("twisted", "twisted", most=8),
    "svdd": Way("SVDD", "svdd", most=8),
    "fk_true": Way("resampling by the true reward of the guess", "resampling", truth=True, most=4),
    "best_of_n_cfg": Way("best of N, CFG", "best_of_n", scale=GUIDANCE_SCALE, most=8, nested=True),
    "resampling_cfg": Way("resampling, CFG", "resampling", scale=GUIDANCE_SCALE, most=8),
    "value_gradient_cfg": Way("value gradient, CFG", "value_gradient", scale=GUIDANCE_SCALE, most=8),
}


class World:
    """The weights `base` or `trained` of a recipe, and the critic that goes with them."""

    def __init__(self, weights: str, config: Config, folder: Path, num_prompts: int) -> None:
        self.weights, self.config, self.num_prompts = weights, config, num_prompts
        builtin = builtin_pipeline(config.backbone.source)
        source = builtin if weights == "base" else folder / "train" / "policy"
        self.backbone = load_backbone(config.backbone, source, torch.device("cpu"))
        self.kernel = KERNELS.make(config.kernel)
        step = "pretrain-value" if weights == "base" else "train"
        self.critic = Critic.load(folder / step / "critic", self.backbone)
        self.rewards = measured(config, first=config.reward_names)
        self.steering_weights = torch.tensor([reward.weight for reward in config.rewards])
        prompts = load_prompts(config.prompts.source).held_out
        shown = [prompts[index] for index in balanced(prompts, num_prompts, config.seed, "evaluation")]
        self.places = [(slot, 0) for slot in range(num_prompts)]
        self.places += [(slot, 1) for slot in range(min(_DIVERSE, num_prompts))]
        self.prompts = [shown[slot] for slot, _ in self.places]

    def steering(self, way: Way, particles: int, **own: Any) -> Steering:
        """The configured method of that name; `own`: settings instead of its."""
        method = next(one for one in self.config.steering.methods if one.name == way.method)
        method = method.with_own({**method.own, **own})
        settings: Any = STEERING.settings(method)
        made: Steering = STEERING.make(method, settings.strength * self.steering_weights, particles)
        return made

    def nfe(self, way: Way, particles: int) -> int:
        return evaluations(self.steering(way, particles), self.config.kernel.num_steps, way.scale != 1)

    def counts(self, way: Way) -> list[int]:
        """Particles that come nearest to the MULTIPLES of K evaluations."""
        fewest = 2 if way.method in {"resampling", "twisted", "svdd"} else 1  # one alone is never resampled
        wanted = [multiple * self.config.kernel.num_steps for multiple in MULTIPLES if multiple <= way.most]
        return sorted({max(fewest, round(nfe / self.nfe(way, 1))) for nfe in wanted})


@dataclass(frozen=True)
class Made:
    """N particles of each of B images. values: [B, N, M], standardised, of the last denoised state; rewards:
    [B, N, R] and images: uint8 [B, N, H, W, 3] of what came out; seconds: a particle, by part."""

    values: Tensor
    rewards: Tensor
    images: np.ndarray
    seconds: Mapping[str, float]


def make(world: World, way: Way, particles: int) -> Made:
    size, parts = max(1, _ROWS // particles), []
    blocks = [range(start, min(start + size, len(world.prompts))) for start in range(0, len(world.prompts), size)]
    with progress(len(world.prompts), f"{world.weights}, {way.label}, {particles}", "images") as bar:
        for block in blocks:
            parts.append(_make_block(world, way, particles, block))
            bar.update(len(block))
    rollouts = len(world.prompts) * particles
    return Made(
        values=torch.cat([part.values for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
        images=np.concatenate([part.images for part in parts]),
        seconds={name: sum(part.seconds[name] for part in parts) / rollouts for name in parts[0].seconds},
    )


def _make_block(world: World, way: Way, particles: int, block: range) -> Made:
    prompts = [world.prompts[index] for index in block for _ in range(particles)]
    clocks = [time.process_time()]
    trajectory = _sample(world, way, particles, block, prompts)
    clocks.append(time.process_time())
    images = world.backbone.decode(trajectory.clean)
    clocks.append(time.process_time())
    main = world.config.main_reward
    score(world.rewards[main : main + 1], images, prompts)
    clocks.append(time.process_time())
    shape = len(block), particles
    seconds = dict(zip(("sampling", "decoding", "scoring"), np.diff(clocks).tolist(), strict=True))
    return Made(
        values=world.critic.standardise(trajectory.values[:, -1]).unflatten(0, shape),
        rewards=score(world.rewards, images, prompts).rewards.unflatten(0, shape),
        images=images.reshape(*shape, *images.shape[1:]),
        seconds=seconds,
    )


def _sample(world: World, way: Way, particles: int, block: range, prompts: Sequence[Prompt]) -> Trajectory:
    texts = [prompt.text for prompt in prompts]
    config, steps = world.config, world.config.kernel.num_steps
    policy = Policy(guided(world.backbone, way.scale), world.kernel)
    keys = [("bench-steering", *world.places[index]) for index in block]
    noise = noise_for(
        [(*key, particle) for key in keys for particle in range(particles)],
        config.seed,
        steps,
        world.backbone.latent_shape,
    )
    rewards = world.rewards[: len(config.rewards)]
    method, uniforms = world.steering(way, particles), uniforms_for(keys, config.seed, steps)
    return rollout(
        policy,
        TrueReward(world.backbone, rewards, prompts, world.critic) if way.truth else world.critic,
        world.backbone.encode(texts),
        noise,
        steering=SteeringRun(method, uniforms) if method else None,
    )


def points(world: World, name: str, particles: int) -> list[Record]:
    """What `make` gave, chosen by each of CHOICES, for this number of particles or, where nested, for every smaller
    one too: {particles, choice, nfe, rewards: [prompts][R], diversity, seconds}."""
    way = WAYS[name]
    made = make(world, way, particles)
    found = []
    for count in range(1, particles + 1) if way.nested else [particles]:
        steering = world.steering(way, count)
        truth = world.critic.standardise(made.rewards[..., : len(world.config.rewards)])
        by = {"critic": made.values, "reward": truth}
        for choice in CHOICES if count > 1 else CHOICES[:1]:
            chosen = steering.select(by[choice][:, :count])
            rows = torch.arange(len(chosen))
            chosen_images = made.images[rows, chosen]
            extra = len(chosen) - world.num_prompts
            pairs = np.stack([chosen_images[:extra], chosen_images[world.num_prompts :]], 1)
            judged = count if choice == "reward" else 0
            found.append(
                {
                    "way": name,
                    "particles": count,
                    "choice": choice if count > 1 else "none",
                    "nfe": world.nfe(way, count),
                    "rewards": made.rewards[rows, chosen][: world.num_prompts].tolist(),
                    "diversity": diversity(pairs).tolist(),
                    "seconds": count * made.seconds["sampling"]
                    + max(1, judged) * made.seconds["decoding"]
                    + judged * made.seconds["scoring"],
                }
            )
    return found


def cost(world: World, images: int = _ROWS) -> Record:
    """Seconds of a rollout of `images` rows, plain, with resampling of 4 and with the value gradient, both at every
    step, in turns; and the median ratios to plain, which asks no critic."""
    whole = {"start": 0.0, "stop": 1.0}
    steering = {
        "plain": None,
        "resampling": world.steering(WAYS["resampling"], 4, **whole),
        "value_gradient": world.steering(WAYS["value_gradient"], 1, **whole),
    }
    steps, texts = world.config.kernel.num_steps, [prompt.text for prompt in world.prompts[:images]]
    policy = Policy(world.backbone, world.kernel)
    noise = noise_for([(row,) for row in range(len(texts))], 0, steps, world.backbone.latent_shape)
    conditioning = world.backbone.encode(texts)
    seconds: dict[str, list[float]] = {name: [] for name in steering}
    for turn in range(_TURNS + 1):
        for name in list(steering)[:: 1 if turn % 2 else -1]:
            method = steering[name]
            uniforms = torch.full((len(texts) // (method.particles if method else 1), steps), 0.5)
            critic = world.critic if method else None
            began = time.process_time()
            rollout(policy, critic, conditioning, noise, steering=SteeringRun(method, uniforms) if method else None)
            seconds[name].append(time.process_time() - began)
    warm = {name: np.array(each[1:]) for name, each in seconds.items()}
    return {
        "rows": len(texts),
        "seconds": {name: float(np.median(each)) for name, each in warm.items()},
        **{name: median(each / warm["plain"], _BOOTSTRAP, 0) for name, each in warm.items() if name != "plain"},
    }


def compared(rows: Sequence[Record], names: Sequence[str], config: Config) -> list[Record]:
    """`points` with intervals over prompts, and the main reward minus that of best-of-N by the true reward, prompt by
    prompt, at the nearest number of evaluations that best-of-N has."""
    main = config.main_reward
    control = {
        row["nfe"]: np.array(row["rewards"])[:, main]
        for row in rows
        if row["way"] == "best_of_n" and row["choice"] in {"reward", "none"}
    }
    found = []
    for row in rows:
        if WAYS[row["way"]].truth and row["choice"] == "critic":
            continue  # there the values are the reward: both choices are one
        rewards = np.array(row["rewards"])
        nearest = min(control, key=lambda nfe: abs(nfe - row["nfe"]))
        numbers = {name: interval(rewards[:, column], _BOOTSTRAP, 0) for column, name in enumerate(names)}
        found.append(
            {
                **row,
                "label": label(row),
                "critic": _by_critic(row),
                "rewards": numbers,
                "diversity": interval(np.array(row["diversity"]), _BOOTSTRAP, 0),
                "control_nfe": nearest,
                "minus_control": interval(rewards[:, main] - control[nearest], _BOOTSTRAP, 0),
                "minus_plain": interval(rewards[:, main] - control[min(control)], _BOOTSTRAP, 0),
            }
        )
    return [row for row in found if not WAYS[row["way"]].nested or row["particles"] in MULTIPLES]


def _by_critic(point: Record) -> bool:
    """Whether a critic steered, or chose at least."""
    way = WAYS[point["way"]]
    return not way.truth and (way.method != "best_of_n" or point["choice"] == "critic")


def label(point: Record) -> str:
    """`resampling x4, reward's choice`."""
    own = f"{WAYS[point['way']].label} x{point['particles']}"
    return own if point["choice"] == "none" else f"{own}, {point['choice']}'s choice"


def trained(config: Config, run: str, folder: Path) -> tuple[Path, Record]:
    """The folder with `pretrain-value/critic`, `train/critic` and `train/policy`, and what they are.

    run: `<output>/<id>` of a run that has trained; without one the recipe is trained here, once, by one worker.
    """
    place = Path(run) if run else folder / f"{config.recipe}-{config.hash[:8]}"
    name, output = place.name, str(place.parent)
    if not run:
        steps.prepare(name, "", output, config.recipe, overrides=["train.num_workers=1"])
        steps.pretrain_value(name, "", output)
        steps.train(name, "", output)
    store = open_store(default_store(output))
    manifests = [store.fetch(f"{name}/{step}", place / step) for step in ("pretrain-value", "train")]
    return place, {manifest.step: [manifest.commit, manifest.digest] for manifest in manifests}


def measure(recipe: str, run: str, num_prompts: int, folder: Path) -> Record:
    """The record of a recipe: settings, cost and points on both weights."""
    config = resolve_all(recipe_fields(recipe)).config
    place, artifacts = trained(config, run, folder)
    stamp = {"sources": sources(), "artifacts": artifacts, "prompts": num_prompts}
    stamp |= {"steering": config.steering.model_dump(), "scale": GUIDANCE_SCALE}
    costs, found = {}, []
    for weights in ("base", "trained"):
        world = World(weights, config, place, num_prompts)
        once = partial(_once, folder / f"{recipe}-{weights}", {**stamp, "weights": weights})
        costs[weights] = once("cost", partial(cost, world))
        rows = []
        for name, way in WAYS.items():
            for count in world.counts(way)[-1:] if way.nested else world.counts(way):
                rows += once(f"{name}-{count}", partial(points, world, name, count))
        names = [reward.name for reward in world.rewards]
        found += [{"weights": weights, **row} for row in compared(rows, names, config)]
    where = environment()
    return {
        "experiment": "steering",
        "recipe": recipe,
        "command": _command(recipe, num_prompts),
        "commits": [where["commit"]],
        "machines": [where["machine"]],
        "artifacts": artifacts,
        "seed": config.seed,
        "prompts": num_prompts,
        "steps": config.kernel.num_steps,
        "reward": config.reward_names[config.main_reward],
        "settings": config.steering.model_dump(),
        "guidance_scale": GUIDANCE_SCALE,
        "cost": costs,
        "points": found,
    }


def _command(recipe: str, num_prompts: int) -> str:
    options = "" if recipe == "shapes-unet" else f" RECIPE={recipe}"
    return f"make bench-steering{options}" + ("" if num_prompts == _PROMPTS else f" PROMPTS={num_prompts}")


def _once(folder: Path, stamp: Record, name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives, from the file that it was written to before where that has the same stamp."""
    path, digest = folder / f"{name}.json", hashlib.sha256(json.dumps([stamp, name]).encode()).hexdigest()
    if path.exists():
        known = json.loads(path.read_text())
        if known["stamp"] == digest:
            return known["result"]
    result = work()
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps({"stamp": digest, "result": result}) + "\n")
    part.replace(path)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="shapes-unet")
    parser.add_argument("--run", default="", help="<output>/<id> of a run that has trained; else it is trained here")
    parser.add_argument("--prompts", type=int, default=_PROMPTS, help="held-out prompts, one image each")
    parser.add_argument("--output", type=Path, default=FULL.results, help="folder of steering-<recipe>.json and .svg")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where what is measured is kept")
    options = parser.parse_args(arguments)
    require_clean_tree(options.output)
    torch.set_num_threads(1)
    found = measure(options.recipe, options.run, options.prompts, options.folder)
    options.output.mkdir(parents=True, exist_ok=True)
    name = f"steering-{options.recipe}"
    (options.output / f"{name}.json").write_text(dump(found))
    figures.draw({name: found}, options.output)
    _say("\n".join(report.steering(found, every=True)))
    _say("\n".join(verdicts("steering", found)))
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())

"""What the evidence compares: arms, seeds and backbones, and what each arm may spend.

Every arm of a comparison scores the same number of images to learn from and does the same number of actor updates. An
arm that pretrains its critic pays for the images of that. Held-out images only measure, and cost nobody anything.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentac.config.recipes import RECIPES
from latentac.config.schema import Config
from latentac.rewards import REWARDS
from latentac.runs.configuration import recipe_fields
from latentac.runs.resolution import resolve_all
from latentac.store import commit
from latentac.system.errors import ResourceError

ROOT = Path(__file__).resolve().parents[1]
RESULT, FAILURE = "result.json", "failed.json"
"""What a unit leaves in its folder: its numbers, or why there are none."""

PROTOCOL = 1
"""Raise it when what a unit measures changes: results of another protocol are not mixed in."""

Settings = Mapping[str, Any]
"""Path of a configuration's field -> value."""

_TUNED_DIT: dict[str, Settings] = {"ddpo": {"policy.learning_rate": 2e-4}}
TUNED: dict[str, dict[str, Settings]] = {
    "shapes-unet": {"ddpo": {"algorithm.clip": 0.0008}},
    "shapes-dit": _TUNED_DIT,
    "words-dit": _TUNED_DIT,
}
"""Recipe -> arm -> the settings found best for it, where they are not the recipe's; README.md has the trials. Those of
`words-dit` were found on the shapes, for every arm."""

_ON_SHAPES = ("shapes_verifier", "jpeg_compressibility", "colourfulness", "shapes_clip")
MEASURED: Mapping[str, tuple[str, ...]] = {"builtin:shapes": tuple(name for name in _ON_SHAPES if name in REWARDS)}
"""Source of the prompts -> rewards that held-out images are scored by besides the recipe's own, trained on or not."""


@dataclass(frozen=True)
class Scale:
    """How much an arm spends, and how much is measured.

    pretraining: images that an arm with value pretraining pays for it; pretrained, plain: iterations of an arm with
    and without; updates: recipe -> those of the actor in all; evaluated: held-out images before and after; grouped:
    held-out prompts of which four images each are made; seeds: experiment -> recipe -> number of seeds. folder: where
    units work and leave their results; results: where the aggregated ones go; readme: the document with the section
    that is generated.
    """

    name: str
    images_per_iteration: int
    pretraining: int
    pretrained: int
    plain: int
    updates: Mapping[str, int]
    evaluated: int
    grouped: int
    seeds: Mapping[str, Mapping[str, int]]
    folder: Path
    results: Path
    readme: Path

    @property
    def command(self) -> str:
        return "make evidence" if self.name == "full" else f"make evidence-{self.name}"


FULL = Scale(
    name="full",
    images_per_iteration=256,
    pretraining=1024,
    pretrained=16,
    plain=20,
    updates={"shapes-unet": 80, "shapes-dit": 320, "words-dit": 320},
    evaluated=1024,
    grouped=64,
    seeds={
        "main": {"shapes-unet": 5, "shapes-dit": 5},
        "ablations": {"shapes-dit": 3},
        "hacking": {"shapes-dit": 3},
        "combination": {"shapes-dit": 3},
        "critic": {"shapes-unet": 3, "shapes-dit": 3},
        "words": {"words-dit": 5},
    },
    folder=ROOT / "build" / "evidence",
    results=Path(__file__).resolve().parent / "results",
    readme=Path(__file__).resolve().parent / "results" / "README.md",
)
QUICK = Scale(
    name="quick",
    images_per_iteration=256,
    pretraining=256,
    pretrained=4,
    plain=5,
    updates={"shapes-unet": 20},
    evaluated=256,
    grouped=16,
    seeds={"main": {"shapes-unet": 3}},
    folder=ROOT / "build" / "evidence-quick",
    results=ROOT / "build" / "evidence-quick" / "results",
    readme=ROOT / "build" / "evidence-quick" / "README.md",
)
SCALES = {scale.name: scale for scale in (FULL, QUICK)}


def require_clean_tree(output: Path) -> None:
    """Committed results must name the code that made them. Ends the program where `output` is among them and the tree
    has changes that are not committed, or is not a git checkout."""
    if output.resolve().is_relative_to(FULL.results) and (commit() == "unknown" or commit().endswith("-dirty")):
        remedy = "Commit the changes, or write elsewhere with --output"
        error = ResourceError(str(output), f"is for results of one commit, and this tree is {commit()}", remedy)
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


@dataclass(frozen=True)
class Arm:
    """label: for tables and figures; settings: what makes it this arm; pretrained: whether its critic is pretrained;
    trains: without, it ends after that; passes: the critic is fitted anew with each of these numbers of passes, on the
    same rollouts, for too few do not converge and too many overfit; nothing for what the recipe does."""

    label: str
    settings: Settings
    pretrained: bool = True
    trains: bool = True
    passes: tuple[int, ...] = ()


def _rewards(**weights: float) -> Settings:
    return {"rewards": [{"use": name, "weight": weight} for name, weight in weights.items()]}


def _clip_with(clip: Settings, jpeg: Settings) -> Settings:
    """Training on `shapes_clip`; settings of it and of `jpeg_compressibility`, which has weight 0 otherwise."""
    watched = {"use": "jpeg_compressibility", "weight": 0.0, **jpeg}
    return {"rewards": [{"use": "shapes_clip", **clip}, {"use": "shapes_verifier", "weight": 0.0}, watched]}


_THREE = _rewards(shapes_clip=1.0, shapes_verifier=1.0, jpeg_compressibility=1.0)

_PLAIN: Settings = {"algorithm.gae_lambda": 0.9, "critic.replay_images": 0}
"""What the ablations start from: what they showed to help came into a recipe after them. Where no critic is trained on,
as in DDPO or value pretraining alone, it decides nothing, and keeps what was recorded then."""
_BASELINES: Settings = {"critic.replay_images": 0}
"""Arms whose algorithm has no critic: its settings, and with them the recipe's, fall away with it."""
_BODY: Settings = {"critic.body.num_queries": 0}
"""What the recipes say of their critic's body, for another body, to which it does not apply by itself."""

ARMS: dict[str, Arm] = {
    "ours": Arm("ours", {"algorithm.use": "ppo", "critic.body.use": "frozen_taps"}),
    "ddpo": Arm("DDPO", {"algorithm.use": "ddpo", **_BASELINES}, pretrained=False),
    "grpo": Arm(
        "GRPO, groups of 4", {"algorithm.use": "grpo", "algorithm.group_size": 4, **_BASELINES}, pretrained=False
    ),
    # Half the width and the passes: convolutions at the image's own size cost many times what the others do.
    "pixel": Arm(
        "pixel critic",
        {"critic.body.use": "pixel", **_BODY, "critic.body.width": 32, "critic.hidden": 64, "pretrain.num_passes": 5},
    ),
    "latent_cnn": Arm("stand-alone latent critic", {"critic.body.use": "latent_cnn", **_BODY}),
    "plain": Arm("start: lambda 0.9, no replay", _PLAIN),
    "replay": Arm("with replay", {**_PLAIN, "critic.replay_images": 4096}),
    "lambda_1": Arm("lambda 1", {**_PLAIN, "algorithm.gae_lambda": 1.0}),
    "lambda_095": Arm("lambda 0.95", {**_PLAIN, "algorithm.gae_lambda": 0.95}),
    "unguided": Arm(
        "without value gradient: the critic is only a baseline", {**_PLAIN, "algorithm.value_gradient": 0.0}
    ),
    "no_time": Arm("without time conditioning", {**_PLAIN, "critic.body.time_conditioning": False}),
    "no_pretraining": Arm("without value pretraining", _PLAIN, pretrained=False),
    "lora": Arm("critic body: LoRA copy", {**_PLAIN, "critic.body.use": "lora", **_BODY}),
    "copy": Arm("critic body: full copy", {**_PLAIN, "critic.body.use": "copy", **_BODY}),
    "three_rewards": Arm("three rewards", {**_PLAIN, **_THREE}),
    "shared_head": Arm("three rewards, one shared head", {**_PLAIN, **_THREE, "critic.shared_head": True}),
    "clip_alone": Arm(
        "shapes_clip alone", {**_PLAIN, **_rewards(shapes_clip=1.0, shapes_verifier=0.0, jpeg_compressibility=0.0)}
    ),
    "weighted_sum": Arm(
        "weighted sum of shapes_clip and jpeg_compressibility", {**_PLAIN, **_clip_with({}, {"weight": 1.0})}
    ),
    "clipped": Arm("shapes_clip, clipped at 0.9", {**_PLAIN, **_clip_with({"bounds": [-1.0, 0.9]}, {})}),
    "floor": Arm(
        "shapes_clip, with a floor of -1.04 for jpeg_compressibility", {**_PLAIN, **_clip_with({}, {"floor": -1.04})}
    ),
    "joint": Arm("ours, on `tesseract` and `clip_score`, one head each", {"rewards.clip_score.weight": 1.0}),
    "pretrained": Arm("pretrained critic", _PLAIN, trains=False),
    "ten_times": Arm("ten times the rollouts, to convergence", _PLAIN, trains=False, passes=(2, 4, 8, 16)),
}


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared by seed with one of them. `paired`: arm -> the arm that it is compared with, where that is
    not `reference`. `judge`: a reward that no arm is trained on, and that shows what was learned besides pleasing the
    trained one."""

    reference: str
    arms: tuple[str, ...]
    paired: Mapping[str, str]
    judge: str = ""

    def reference_of(self, arm: str) -> str:
        return self.paired.get(arm, self.reference)


EXPERIMENTS: dict[str, Experiment] = {
    "main": Experiment("ours", ("ours", "ddpo", "grpo", "pixel", "latent_cnn"), {}),
    "ablations": Experiment(
        "plain",
        (
            *("plain", "lambda_1", "lambda_095", "replay", "ours", "unguided", "no_time", "no_pretraining"),
            *(("three_rewards", "shared_head") if "shapes_clip" in REWARDS else ()),
            *("lora", "copy"),
        ),
        {"three_rewards": "three_rewards", "shared_head": "three_rewards"},
    ),
    "hacking": Experiment("three_rewards", ("three_rewards", "clip_alone") if "shapes_clip" in REWARDS else (), {}),
    "combination": Experiment(
        "floor", ("floor", "weighted_sum", "clipped", "clip_alone") if "shapes_clip" in REWARDS else (), {}
    ),
    "critic": Experiment("pretrained", ("pretrained", "ten_times"), {}),
    "words": Experiment("ours", ("ours", "ddpo", "grpo", "joint"), {}, judge="rapidocr"),
}


_UNDECISIVE: dict[str, Any] = {
    **dict.fromkeys(("project", "gate", "steering", "serving", "tracking", "card"), True),
    "prompts": {"on_truncation"},
    "rewards": {
        "__all__": {"timeout_seconds", "retries", "processes", "max_restarts", "cached_scores", "scores_folder"}
    },
}
"""Fields of a configuration that no number of a unit depends on."""


@dataclass(frozen=True)
class Unit:
    """One arm with one seed on one backbone: what one process runs. Units of two experiments with one configuration
    are the same."""

    experiment: str
    arm: str
    recipe: str
    seed: int
    overrides: tuple[str, ...]

    @functools.cached_property
    def config(self) -> Config:
        return resolve_all(recipe_fields(self.recipe, "", [f"seed={self.seed}", *self.overrides])).config

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of all that decides the result, but for the sources."""
        settings = self.config.model_dump(exclude=_UNDECISIVE)
        decisive = [PROTOCOL, self.trains, ARMS[self.arm].passes, settings]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def trains(self) -> bool:
        return ARMS[self.arm].trains

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.arm}-{self.seed}-{self.hash[:8]}"

    @property
    def images(self) -> int:
        """Images that are scored to learn from."""
        train = self.config.train
        return self.images_before + (train.num_iterations * train.images_per_iteration if self.trains else 0)

    @property
    def images_before(self) -> int:
        """Those of value pretraining."""
        return self.config.pretrain.num_images

    @property
    def updates(self) -> int:
        """Optimizer steps of the actor."""
        train = self.config.train
        return train.num_iterations * train.updates_per_iteration if self.trains else 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        content = json.loads(text)
        return cls(**{**content, "overrides": tuple(content["overrides"])})


def units(scale: Scale, only: Sequence[str] = (), recipes: Sequence[str] = ()) -> list[Unit]:
    """The plan, seed after seed, so that it can stop anywhere and leave the arms with equally many. Restricted to the
    experiments `only` and to `recipes` where any are named."""
    found = [
        unit
        for name, experiment in EXPERIMENTS.items()
        for recipe, count in scale.seeds.get(name, {}).items()
        if recipe in RECIPES and (not only or name in only) and (not recipes or recipe in recipes)
        for seed in range(count)
        for unit in _units(scale, name, experiment, recipe, seed)
    ]
    return sorted(found, key=lambda unit: unit.seed)


def _units(scale: Scale, name: str, experiment: Experiment, recipe: str, seed: int) -> Iterator[Unit]:
    for arm in experiment.arms:
        settings = {**_spent(scale, recipe, arm), **ARMS[arm].settings, **TUNED.get(recipe, {}).get(arm, {})}
        yield Unit(name, arm, recipe, seed, tuple(f"{path}={json.dumps(value)}" for path, value in settings.items()))


def _spent(scale: Scale, recipe: str, arm: str) -> Settings:
    pretrained = ARMS[arm].pretrained
    iterations = scale.pretrained if pretrained else scale.plain
    settings = {
        "pretrain.num_images": scale.pretraining if pretrained else 0,
        "train.num_iterations": iterations,
        "train.updates_per_iteration": scale.updates[recipe] // iterations,
        "train.images_per_iteration": scale.images_per_iteration,
        "train.num_workers": 1,
        "train.checkpoint_every": 2,
        "evaluation.num_images": scale.evaluated,
        "evaluation.num_diversity_prompts": scale.grouped,
        "evaluation.images_per_prompt": 4,
        "algorithm.clip": RECIPES[recipe]["algorithm"]["clip"],
    }
    if not ARMS[arm].trains:
        settings["pretrain.num_held_out_images"] = scale.evaluated
    if arm == "ten_times":
        settings["pretrain.num_images"] = 10 * scale.pretraining
    return settings

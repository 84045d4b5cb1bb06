"""One unit of the evidence in one process: `python -m benchmarks.unit FOLDER`, which holds its unit.json.

It writes checkpoints into the folder and at the end result.json, atomically. Killed at any moment and started again, it
comes to bitwise the same numbers; only the seconds differ.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plan import ARMS, FAILURE, MEASURED, RESULT, ROOT, Unit
from latentac.backbones import load_backbone
from latentac.config.schema import Config
from latentac.config.schema import Reward as RewardSettings
from latentac.critic import Critic
from latentac.evaluation.held_out import Arm, Sampling, contact_sheet, sample
from latentac.evaluation.measures import diversity, interval, intervals, ratio
from latentac.method.records import Scores
from latentac.method.returns import explained_variance, rank_correlation
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.runs.preparation.prepare import environment
from latentac.sampling.devices import pick_device
from latentac.sampling.kernels import KERNELS
from latentac.sampling.policy import Policy
from latentac.system.errors import Diverged, LatentacError
from latentac.system.lifetime import die_with_parent, run_lock
from latentac.training import value_pretraining as pretraining
from latentac.training.checkpoint import read_state, write_state
from latentac.training.critic_learning import Replay
from latentac.training.distributed import Mesh
from latentac.training.trainer import Trainer, new_trainer
from latentac.worlds.builtin import builtin_pipeline
from latentac.worlds.prompts import Prompt, balanced, load_prompts

_CURVE_SHARE = 4  # of the held-out images one in so many is enough for a point of the curve
_CURVE_POINTS = 8
_IMAGES = 8  # in the row that is kept to look at, before and after
_RECORD = "unit-progress.json"  # in a checkpoint, beside what the trainer writes
_SOURCES = tuple(
    f"{folder}/**/*"
    for folder in ("backbones", "critic", "evaluation", "method", "rewards", "sampling", "training", "worlds")
)

Record = dict[str, Any]


def sources() -> str:
    """sha256 of the sources and weights that numbers depend on."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in (ROOT / "latentac").glob(pattern)}):
        if path.is_file() and path.suffix in {".py", ".json", ".safetensors", ".txt"}:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class HeldOut:
    """Held-out prompts and noise: of a seed the same in every arm and at every iteration, the categories in turn."""

    def __init__(self, config: Config) -> None:
        self.config = config
        prompts = load_prompts(config.prompts.source).held_out
        chosen = balanced(prompts, config.evaluation.num_images, config.seed, "evidence")
        self.shown = [prompts[index] for index in chosen]
        self.rewards = measured(config, first=MEASURED.get(config.prompts.source, ()))

    def sample(self, policy: Policy, critic: Critic | None, count: int) -> Arm:
        """An image of each of the first `count` prompts."""
        return self._sample(policy, critic, self.shown[:count])

    def groups(self, policy: Policy, critic: Critic | None) -> Arm:
        """`images_per_prompt` images of each of the first `num_diversity_prompts` prompts, one after another."""
        settings = self.config.evaluation
        shown = self.shown[: settings.num_diversity_prompts]
        return self._sample(policy, critic, [one for one in shown for _ in range(settings.images_per_prompt)])

    def spread(self, arm: Arm) -> np.ndarray:
        """Diversity of each prompt of `groups`."""
        count = self.config.evaluation.images_per_prompt
        return diversity(arm.images.reshape(-1, count, *arm.images.shape[1:]))

    def _sample(self, policy: Policy, critic: Critic | None, prompts: Sequence[Prompt]) -> Arm:
        return sample(policy, critic, self.rewards, prompts, Sampling.of(self.config))


class Run:
    """The unit at work: where it stands (`progress`), and everything that it needs to go on."""

    def __init__(self, unit: Unit, folder: Path) -> None:
        self.unit, self.folder, self.config = unit, folder, unit.config
        self.device = pick_device(self.config.backbone.device)
        self.prompts = load_prompts(self.config.prompts.source)
        self.rewards = load_rewards(self.config.rewards)
        self.held_out = HeldOut(self.config)
        self.stamp = {"hash": unit.hash, "sources": sources()}
        self.progress: Record = {"curve": [], "seconds": {}, "discarded_images": 0}
        self._clock = time.process_time if self.device.type == "cpu" else time.perf_counter

    def finish(self) -> Record:
        """Do all that is left to do; the unit's result."""
        return self._train() if self.unit.trains else self._pretrain_only()

    @property
    def _curve_images(self) -> int:
        return max(8, self.config.evaluation.num_images // _CURVE_SHARE)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the body to `part`: the processor's, so that what else runs here does not count, or on a
        GPU those of the wall."""
        began = self._clock()
        yield
        self.progress["seconds"][part] = self.progress["seconds"].get(part, 0.0) + self._clock() - began

    def _critic(self, policy: Policy) -> Critic:
        return pretraining.new_critic(self.config, policy).to(self.device)

    def _pretrain(self, policy: Policy, critic: Critic) -> Replay | None:
        with self.timed("pretraining"):
            passes, scored = pretraining.pretrain(self.config, policy, critic, self.rewards, self.prompts)
        self.progress["passes"] = [
            {name.removeprefix("held_out_"): entry[name] for name in entry if name != "pass"} for entry in passes
        ]
        return scored

    def _pretrain_only(self) -> Record:
        """The critic that value pretraining leaves, and the best that any pass of any fit reached at each step."""
        policy = base_policy(self.config, self.device)
        critic, fits = self._critic(policy), {}
        with self.timed("pretraining"):
            own, other = pretraining.draws(self.config)
            states = pretraining.collect(policy, critic, self.rewards, self.prompts.train, own)
            held_out = pretraining.collect(policy, critic, self.rewards, self.prompts.held_out, other)
            weights = [reward.weight for reward in self.rewards]
            for passes in ARMS[self.unit.arm].passes or (self.config.pretrain.num_passes,):
                settings = self.config.pretrain.model_copy(update={"num_passes": passes})
                fitted = self._critic(policy)
                history = pretraining.fit(
                    settings, policy, fitted, states, held_out, seed=self.config.seed, weights=weights
                )
                fits[passes] = [entry["held_out_explained_variance"] for entry in history]
                _say(f"{passes}/{passes}  explained variance {np.mean(fits[passes][-1]):.3f}")
        best = np.concatenate(list(fits.values())).max(0).tolist()
        return self._result({"critic": {"explained_variance": fits[passes][-1], "best": best, "passes": fits}})

    def _train(self) -> Record:
        trainer = self._start()
        total = self.config.train.num_iterations
        every = max(1, total // _CURVE_POINTS)
        while not trainer.finished:
            try:
                with self.timed("training"):
                    entry = trainer.iterate()
            except Diverged as error:
                trainer = self._go_back(trainer, error)
                continue
            if trainer.iteration % every == 0:
                self._measure(trainer)
            if trainer.finished or trainer.iteration % self.config.train.checkpoint_every == 0:
                self._checkpoint(trainer)
            _say(f"{trainer.iteration}/{total}  reward {entry['reward_mean']:.3f}  kl {entry['kl']:.4f}")
        trainer.publish_weights()
        return self._result(self._evaluate(trainer))

    def _start(self) -> Trainer:
        """At the last checkpoint; else measure the base and pretrain."""
        checkpoint = self._newest()
        policy = base_policy(self.config, self.device)
        if checkpoint is not None:
            trainer = self._trainer(policy, self._critic(policy), None)
            self.progress = json.loads((checkpoint / _RECORD).read_text())["unit"]
            trainer.load_state(*read_state(checkpoint))
            return trainer
        with self.timed("evaluation"):
            base = self.held_out.sample(policy, None, self.config.evaluation.num_images)
            self.progress["base"] = _summary(base.scores, self.config)
            self.progress["base_rewards"] = base.scores.rewards.tolist()
            self.progress["base_diversity"] = self.held_out.spread(self.held_out.groups(policy, None)).tolist()
            self._point(0, base.scores, None)
            contact_sheet(base.images[:_IMAGES], _IMAGES).save(self.folder / "base.png")
        critic = self._critic(policy)
        scored = self._pretrain(policy, critic) if self.config.pretrain.num_images else None
        trainer = self._trainer(policy, critic, scored)
        self._checkpoint(trainer)
        return trainer

    def _trainer(self, policy: Policy, critic: Critic, scored: Replay | None) -> Trainer:
        mesh = Mesh.single(self.device)
        return new_trainer(self.config, policy, critic, self.rewards, self.prompts.train, mesh=mesh, scored=scored)

    def _go_back(self, trainer: Trainer, error: Diverged) -> Trainer:
        """As the product does: to the last checkpoint at a lower rate, once. What was scored in vain is reported."""
        if trainer.recoveries:
            raise error
        reached = trainer.iteration + 1
        fresh = self._start()
        fresh.recoveries.append({"where": error.where, "problem": error.problem, "from_iteration": fresh.iteration})
        self.progress["discarded_images"] += (reached - fresh.iteration) * self.config.train.images_per_iteration
        return fresh

    def _measure(self, trainer: Trainer) -> None:
        with self.timed("evaluation"):
            arm = self.held_out.sample(trainer.policy, None, self._curve_images)
        since = self.progress["curve"][-1]["iteration"]
        rewards = [entry["reward_mean"] for entry in trainer.history[since:]]
        self._point(trainer.iteration, arm.scores, sum(rewards) / len(rewards))

    def _point(self, iteration: int, scores: Scores, training_reward: float | None) -> None:
        """A point of the curve: what was spent so far, and the mean of each reward on the same held-out prompts."""
        images = self.unit.images_before + iteration * self.config.train.images_per_iteration if iteration else 0
        seconds = self.progress["seconds"]
        means = {name: float(scores.column(name)[: self._curve_images].mean()) for name in scores.names}
        spent = {"images": images, "seconds": seconds.get("pretraining", 0.0) + seconds.get("training", 0.0)}
        point = {"iteration": iteration, **spent, "training_reward": training_reward, "rewards": means}
        self.progress["curve"].append(point)

    def _evaluate(self, trainer: Trainer) -> Record:
        """The end: every reward, what the critic knows of held-out prompts, diversity, and how training went."""
        settings, seed = self.config.evaluation, self.config.seed
        policy, critic = trainer.policy, trainer.critic if trainer.learner is not None else None
        with self.timed("evaluation"):
            final = self.held_out.sample(policy, critic, settings.num_images)
            groups = self.held_out.groups(policy, critic)
        contact_sheet(final.images[:_IMAGES], _IMAGES).save(self.folder / "trained.png")
        gain = Scores(final.scores.rewards - torch.tensor(self.progress["base_rewards"]), final.scores.names)
        spread, before = self.held_out.spread(groups), np.array(self.progress["base_diversity"])
        base, summary = self.progress["base"], _summary(final.scores, self.config)
        trained = [reward.name for reward in self.config.rewards if reward.weight > 0]
        relative = [(summary[name]["mean"] - base[name]["mean"]) / max(base[name]["std"], 1e-6) for name in trained]
        return {
            "reward": self.config.reward_names[self.config.main_reward],
            "trained_on": trained,
            "base": base,
            "final": summary,
            "gain": intervals(gain, settings.num_bootstrap, seed),
            "drift": {name: abs(summary[name]["mean"] - base[name]["mean"]) for name in summary},
            "score": sum(relative) / len(relative),
            "diversity": interval(spread, settings.num_bootstrap, seed),
            "diversity_kept": ratio(spread, before, settings.num_bootstrap, seed),
            "curve": self.progress["curve"],
            "critic": self._judge(critic, final, groups) if critic is not None else None,
            **{name: _mean(trainer.history, name) for name in ("kl", "clip_share", "zero_std_share")},
            "recoveries": trainer.recoveries,
            "discarded_images": self.progress["discarded_images"],
            "history": trainer.history,
        }

    def _judge(self, critic: Critic, final: Arm, groups: Arm) -> Record:
        """Explained variance of the main reward over prompts, and rank correlation within prompts, at each step."""
        main, name = self.config.main_reward, self.config.reward_names[self.config.main_reward]
        count = self.config.evaluation.images_per_prompt
        group = torch.arange(len(groups.images)) // count
        passes = self.progress.get("passes", [])
        return {
            "explained_variance": explained_variance(final.values[..., main].cpu(), final.scores.column(name)).tolist(),
            "rank_correlation": rank_correlation(
                groups.values[..., main].cpu(), groups.scores.column(name), group
            ).tolist(),
            "pretrained": passes[-1]["explained_variance"] if passes else None,
        }

    def _result(self, measured: Record) -> Record:
        unit = self.unit
        return {
            "experiment": unit.experiment,
            "arm": unit.arm,
            "recipe": unit.recipe,
            "seed": unit.seed,
            **self.stamp,
            "overrides": list(unit.overrides),
            "images": unit.images,
            "updates": unit.updates,
            **measured,
            "seconds": self.progress["seconds"],
            **environment(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": self.config.model_dump(),
        }

    def _checkpoint(self, trainer: Trainer) -> None:
        """A whole folder under a name that sorts, and only then the older ones away."""
        target = self.folder / f"checkpoint-{trainer.iteration:06d}"
        part = self.folder / f".{target.name}"
        for left in (part, target):
            shutil.rmtree(left, ignore_errors=True)
        write_state(part, *trainer.state())
        _write(part / _RECORD, {**self.stamp, "unit": self.progress})
        part.rename(target)
        for older in sorted(self.folder.glob("checkpoint-*"))[:-1]:
            shutil.rmtree(older)

    def _newest(self) -> Path | None:
        """The newest checkpoint, if it is of this configuration and these sources."""
        found = sorted(self.folder.glob("checkpoint-*"))
        if not found:
            return None
        progress = json.loads((found[-1] / _RECORD).read_text())
        return found[-1] if all(progress[name] == value for name, value in self.stamp.items()) else None


def run_unit(unit: Unit, folder: Path) -> Record:
    """Run `unit` to its end in `folder`, from where it stopped; the record that is in result.json then."""
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder / "lock"):
        for left in (RESULT, FAILURE):
            (folder / left).unlink(missing_ok=True)
        try:
            record = Run(unit, folder).finish()
        except LatentacError as error:
            _write(folder / FAILURE, {"hash": unit.hash, "arm": unit.arm, "seed": unit.seed, "problem": str(error)})
            raise
        _write(folder / RESULT, record)
        for checkpoint in folder.glob("*checkpoint-*"):
            shutil.rmtree(checkpoint)
    return record


def measured(config: Config, first: Sequence[str]) -> list[ConfiguredReward]:
    """The run's rewards and those of MEASURED, each once, those named in `first` first."""
    known = {reward.name: reward for reward in config.rewards}
    names = dict.fromkeys([*first, *config.reward_names, *MEASURED.get(config.prompts.source, ())])
    return load_rewards(known.get(name) or RewardSettings(use=name, weight=0.0) for name in names)


def base_policy(config: Config, device: torch.device) -> Policy:
    """The untrained policy."""
    name = config.backbone.source.removeprefix("builtin:")
    folder = builtin_pipeline(name) if name != config.backbone.source else Path(name)
    kernel = KERNELS.make(config.kernel)
    return Policy(load_backbone(config.backbone, folder, device), kernel)


def main(folder: str) -> int:
    die_with_parent()
    torch.set_num_threads(1)  # there are as many units at once as cores
    try:
        run_unit(Unit.from_json((Path(folder) / "unit.json").read_text()), Path(folder))
    except LatentacError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _summary(scores: Scores, config: Config) -> Record:
    """Of each reward mean, its 95 % bootstrap interval over images, n, and the images' standard deviation."""
    found = intervals(scores, config.evaluation.num_bootstrap, config.seed)
    return {name: {**entry, "std": float(scores.column(name).std(correction=0))} for name, entry in found.items()}


def _mean(history: list[dict[str, Any]], name: str) -> float | None:
    """None where the arm has no such number."""
    found = [entry[name] for entry in history if name in entry]
    return sum(found) / len(found) if found else None


def _write(path: Path, content: Record) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, allow_nan=False) + "\n")
    part.replace(path)


def _say(line: str) -> None:
    """The last line of the log is what the scheduler shows."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""A new version and the one that serves, asked the same prompts from the same seeds: how sure, how fast, how good."""

import io
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from latentac.components.cluster.settings import Deploy
from latentac.config.schema import Reward as RewardSettings
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.runs.workspace import Workspace
from latentac.serving.client import Client
from latentac.serving.deployment import decode
from latentac.system.errors import LatentacError, ServingError
from latentac.worlds.prompts import Prompt

_ONE_SIDED_95 = 1.645


@dataclass
class Answers:
    """What one server gave: seconds of each answer; images: PNG bytes, None where it failed; failures: its words."""

    seconds: list[float] = field(default_factory=list)
    images: list[bytes | None] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def error_fraction(self) -> float:
        return len(self.failures) / len(self.images)

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def shadow_requests(space: Workspace, count: int) -> list[dict[str, Any]]:
    """`count` held-out prompts, spread evenly over the set, each with a seed that depends on the run's alone."""
    prompts = space.presentable
    chosen = [prompts[slot * len(prompts) // count % len(prompts)] for slot in range(count)]
    return [{"prompt": prompt.text, "seed": space.config.seed + slot, "count": 1} for slot, prompt in enumerate(chosen)]


def ask(servers: Sequence[Client], requests: Sequence[dict[str, Any]], size: tuple[int, int]) -> list[Answers]:
    """The answers of each server. They are asked in turn, so that whatever slows the cluster slows them all."""
    answers = [Answers() for _ in servers]
    for request in requests:
        for server, given in zip(servers, answers, strict=True):
            began = time.monotonic()
            try:
                given.images.append(decode(server.endpoint, server.predict(request), size))
                given.seconds.append(time.monotonic() - began)
            except ServingError as error:
                given.images.append(None)
                given.failures.append(str(error))
    return answers


def compare(
    space: Workspace, requests: Sequence[dict[str, Any]], green: Answers, blue: Answers | None = None
) -> dict[str, Any]:
    """The measured numbers, for deployment.json. None where something could not be measured; `notes` say why.

    reward_loss: blue minus green over the prompts that both answered, in the reward's unit, and `reward_loss_low`,
    the lower end of its one-sided 95 % interval (paired, normal).
    """
    name, notes = space.config.gate.reward, []
    record: dict[str, Any] = {"prompts": len(requests), "reward": name, "green": _numbers(green)}
    record |= {"blue": None, "latency_ratio": None, "reward_loss": None, "reward_loss_low": None}
    if blue is None:
        notes.append("no version served before, so nothing was compared")
    else:
        record["blue"] = _numbers(blue)
        if green.median_seconds and blue.median_seconds:
            record["latency_ratio"] = green.median_seconds / blue.median_seconds
        else:
            notes.append("latency was not compared: one of the two answered nothing")
    rewards, problem = _rewards(name, space.config.rewards, requests, [green, *([blue] if blue else [])])
    if problem:
        notes.append(f"the reward was not measured: {problem}")
    for side, scores in zip(("green", "blue"), rewards, strict=False):
        known = [score for score in scores if score is not None]
        record[side]["reward"] = statistics.fmean(known) if known else None
    if len(rewards) == 2:
        losses = [b - g for g, b in zip(*rewards, strict=True) if g is not None and b is not None]
        record |= _loss(losses)
    return {**record, "notes": notes}


def reasons_against(record: dict[str, Any], deploy: Deploy) -> list[str]:
    """Why the new version shall not serve; empty if it shall. A number that is not finite speaks against it."""
    green, reasons = record["green"], []
    if not green["error_fraction"] <= deploy.max_error_fraction:
        bound = f"at most {deploy.max_error_fraction:g} allowed"
        reasons.append(f"a fraction of {green['error_fraction']:g} of the shadow prompts failed, {bound}")
    ratio, low = record["latency_ratio"], record["reward_loss_low"]
    if ratio is not None and not ratio <= deploy.max_latency_ratio:
        reasons.append(
            f"it takes {ratio:.2f} times as long as the one that serves, {deploy.max_latency_ratio:g} allowed"
        )
    if low is not None and not low <= deploy.max_reward_loss:
        loss = f"{record['reward']} falls by {record['reward_loss']:.3g}, with 95 % confidence by {low:.3g} or more"
        reasons.append(f"{loss}, {deploy.max_reward_loss:g} allowed")
    return reasons


def _numbers(answers: Answers) -> dict[str, Any]:
    return {
        "error_fraction": answers.error_fraction,
        "median_seconds": answers.median_seconds,
        "reward": None,
        "failures": answers.failures[:3],
    }


def _loss(losses: Sequence[float]) -> dict[str, float | None]:
    if not losses:
        return {"reward_loss": None, "reward_loss_low": None}
    mean = statistics.fmean(losses)
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return {"reward_loss": mean, "reward_loss_low": mean - _ONE_SIDED_95 * error}


def _rewards(
    name: str, rewards: Sequence[RewardSettings], requests: Sequence[dict[str, Any]], sides: Sequence[Answers]
) -> tuple[list[list[float | None]], str]:
    """Each side's score of each prompt, None where there is no image; no sides and the reason if none can be had."""
    try:
        (reward,) = load_rewards(one for one in rewards if one.name == name)
        return [[_score(reward, image, request) for image, request in _pairs(side, requests)] for side in sides], ""
    except LatentacError as error:  # this step's container image lacks what it needs, or it cannot score these images
        return [], str(error)


def _pairs(side: Answers, requests: Sequence[dict[str, Any]]) -> list[tuple[bytes | None, dict[str, Any]]]:
    return list(zip(side.images, requests, strict=True))


def _score(reward: ConfiguredReward, image: bytes | None, request: dict[str, Any]) -> float | None:
    if image is None:
        return None
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        pixels = np.asarray(opened.convert("RGB"), np.uint8)
    return float(reward(pixels[None], [Prompt(request["prompt"], "all")])[0])

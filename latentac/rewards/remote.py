"""A reward that another process computes, behind HTTP: for a reward with other packages, or on another machine."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from latentac.config.sections import NonNegative
from latentac.rewards.connection import ServerSettings, connect, png
from latentac.rewards.parallel import each_in_parallel
from latentac.rewards.service import SCORE
from latentac.system.errors import RewardError

_LARGEST = float(np.finfo(np.float32).max)


class Remote:
    """A reward behind HTTP: `POST url/v1/score`. `docs/remote-rewards.md` has the contract."""

    outside = True

    class Settings(ServerSettings):
        """Where the server is, and how long it may take. A failed request is repeated here, not by `retries`."""

        url: str
        """Address of the server, without `/v1/score`. It has no user and no password: see `token_file`."""
        batch_size: Annotated[int, Field(gt=0, le=256)] = 16
        """Most images per request."""
        ready_seconds: NonNegative = 60.0
        """How long to wait for the server when the reward is built."""

    def __init__(self, settings: "Remote.Settings") -> None:
        self._settings, self._service = settings, connect(settings)
        health = self._service.ready(settings.ready_seconds)
        self.unit = str(health.get("unit", ""))[:200]

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """float32 [B] for `images` uint8 [B, H, W, 3]. Raises RewardError."""
        size, rewards = self._settings.batch_size, np.zeros(len(prompts), np.float32)
        more = [{} for _ in prompts] if metadata is None else metadata

        def work(part: slice) -> None:
            rewards[part] = self._scores(images[part], prompts[part], more[part])

        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        each_in_parallel(parts, work, self._settings.connections, "remote reward")
        return rewards

    def _scores(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Sequence[float]:
        """The scores of one request, one finite number per image."""
        body = {"images": [png(image) for image in images], "prompts": list(prompts), "metadata": list(metadata)}
        answer = self._service.ask(SCORE, json.dumps(body).encode())
        scores = answer.get("scores") if isinstance(answer, dict) else None
        where, remedy = self._service.url + SCORE, "Correct the server: see docs/remote-rewards.md"
        if not isinstance(scores, list):
            raise RewardError(where, "answered no list `scores`", remedy)
        if len(scores) != len(prompts):
            raise RewardError(where, f"answered {len(scores)} scores for {len(prompts)} images", remedy)
        for prompt, score in zip(prompts, scores, strict=True):
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if not (number and abs(score) <= _LARGEST):
                problem = f"{where} answered {repr(score)[:80]}, which is not a finite number"
                raise RewardError(f"prompt {prompt!r}", problem, remedy)
        return scores

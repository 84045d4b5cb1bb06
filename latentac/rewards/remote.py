"""A reward that another process computes, behind HTTP: for a reward with other packages, or on another machine."""

import base64
import io
import json
import ssl
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from latentac.config import extensions
from latentac.config.sections import NonNegative, Seconds
from latentac.rewards.service import SCORE, Patience, Service
from latentac.system.errors import ConfigError, Problem, RewardError, describe
from latentac.system.reading import read_given

_RUN_LENGTHS = 3  # zlib's Z_RLE: of images faster than the others, and smaller than its own lowest level
_LARGEST = float(np.finfo(np.float32).max)


class Remote:
    """A reward behind HTTP: `POST url/v1/score`. `docs/remote-rewards.md` has the contract."""

    outside = True

    class Settings(extensions.Settings):
        """Where the server is, and how long it may take. A failed request is repeated here, not by `retries`."""

        url: str
        """Address of the server, without `/v1/score`. It has no user and no password: see `token_file`."""
        batch_size: Annotated[int, Field(gt=0, le=256)] = 16
        """Most images per request."""
        connections: Annotated[int, Field(gt=0, le=64)] = 4
        """Most requests at the same time, in each process."""
        connect_seconds: Seconds = 10.0
        """Time limit of one connection, name lookup and TLS included."""
        answer_seconds: Seconds = 120.0
        """Time limit of one answer. A server that takes longer ends the run, without a further attempt."""
        attempts: Annotated[int, Field(ge=1, le=100)] = 8
        """Most attempts per request. Broken connections and the status 429, 502, 503 and 504 are tried again."""
        retry_seconds: NonNegative = 120.0
        """No attempt begins later than this after the first one."""
        ready_seconds: NonNegative = 60.0
        """How long to wait for the server when the reward is built."""
        token_file: str = ""
        """File with the token for `Authorization: Bearer`, where the steps run. Default: no token."""
        ca_file: str = ""
        """File with the certificate authorities of an https server. Default: those of certifi."""

        @field_validator("url")
        @classmethod
        def _is_an_address(cls, url: str) -> str:
            try:
                parts = urlsplit(url)
                usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                usable = False
            if not usable or not url.isprintable() or " " in url:
                raise ValueError("is no address like http://host:port")
            if "@" in parts.netloc or parts.query or parts.fragment:
                raise ValueError("has more than an address: a user, a query, or a fragment. A token is in token_file")
            return url.rstrip("/")

    def __init__(self, settings: "Remote.Settings") -> None:
        times = settings.connect_seconds, settings.answer_seconds
        patience = Patience(*times, settings.attempts, settings.retry_seconds)
        token = _token(settings.token_file) if settings.token_file else ""
        if settings.ca_file:
            _check_authorities(settings.ca_file)
        self._settings = settings
        self._service = Service(settings.url, patience, settings.connections, token=token, authorities=settings.ca_file)
        health = self._service.ready(settings.ready_seconds)
        self.unit = str(health.get("unit", ""))[:200]

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> np.ndarray:
        """float32 [B] for `images` uint8 [B, H, W, 3]. Raises RewardError."""
        size, rewards = self._settings.batch_size, np.zeros(len(prompts), np.float32)
        more = [{} for _ in prompts] if metadata is None else metadata
        parts = deque(slice(start, start + size) for start in range(0, len(prompts), size))
        failed: list[Exception] = []

        def work() -> None:
            while not failed:
                try:
                    part = parts.popleft()
                except IndexError:
                    return
                try:
                    rewards[part] = self._scores(images[part], prompts[part], more[part])
                except Exception as error:  # noqa: BLE001 - raised below, in the thread that asked
                    failed.append(error)

        others = [
            threading.Thread(target=work, name="remote reward", daemon=True)
            for _ in range(min(len(parts), self._settings.connections) - 1)
        ]
        for thread in others:
            thread.start()
        work()
        for thread in others:
            thread.join()
        if failed:
            raise failed[0]
        return rewards

    def _scores(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Sequence[float]:
        """The scores of one request, one finite number per image."""
        body = {"images": [_png(image) for image in images], "prompts": list(prompts), "metadata": list(metadata)}
        answer = self._service.score(json.dumps(body).encode())
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


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1, compress_type=_RUN_LENGTHS)
    return base64.b64encode(file.getvalue()).decode()


def _check_authorities(name: str) -> None:
    """Raises ConfigError."""
    try:
        ssl.create_default_context(cafile=name)
    except OSError as error:  # SSLError is one
        problem = f"holds no certificates: {error.strerror or describe(error)}"
        raise ConfigError([Problem("ca_file", name, problem, "Name a PEM file with the authorities")]) from None


def _token(name: str) -> str:
    """Raises ConfigError."""
    try:
        token = read_given(Path(name), encoding="ascii").strip()
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not ASCII"
        remedy = "Name a file that holds the token alone"
        raise ConfigError([Problem("token_file", name, f"cannot be read: {reason}", remedy)]) from None
    if not token or not token.isprintable() or " " in token:
        problem = "holds no token: characters without spaces"
        raise ConfigError([Problem("token_file", name, problem, "Name a file that holds the token alone")])
    return token

"""One process that serves one reward: the other end of the reward `remote`, `docs/remote-rewards.md`.

Imports FastAPI's parts of the endpoint, not its model: torch comes with a reward that needs it.
"""

import asyncio
import base64
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import uvicorn
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from latentac.config.schema import Reward
from latentac.config.sections import Section
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.rewards.service import HEALTH, SCORE
from latentac.serving import connections
from latentac.serving.access import Access, access
from latentac.serving.admission import Admission
from latentac.serving.bodies import body_of, json_of
from latentac.serving.refusals import Refused, refusal
from latentac.serving.request import validated
from latentac.serving.server import GRACE_SECONDS, address_of, bind, listen
from latentac.system.errors import ConfigError, LatentacError, Problem, describe
from latentac.worlds.prompts import Prompt

MOST_BYTES = 64 * 2**20
"""Of the body of a request, uncompressed."""
MOST_IMAGES = 256
MOST_PIXELS = 64 * 2**20
"""Of the images of a request together."""
MOST_REQUESTS = 16
"""That are read or answered at once. A further one waits, with its body unread."""
QUEUE_SECONDS = 20.0
"""How long it waits; then it gets 503, and may come again."""
_MOST_VALUES = 200_000
_RETRY_AFTER_SECONDS = 1
_log = logging.getLogger(__name__)


class Asked(Section):
    """What is to be scored. The descriptions are the remedies that a caller reads."""

    images: Annotated[
        list[str], Field(min_length=1, max_length=MOST_IMAGES, description="Send 1 to 256 PNGs in base64")
    ]
    prompts: Annotated[list[str], Field(description="Send one text per image.")]
    metadata: Annotated[
        list[dict[str, Any]] | None, Field(description="Send one object per image, or leave it out.")
    ] = None


class Scoring:
    """The routes over one reward. Scores are computed in threads, one per core, so health is answered meanwhile."""

    def __init__(self, reward: ConfiguredReward) -> None:
        self._reward, self._places = reward, asyncio.Semaphore(MOST_REQUESTS)
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="score")

    def application(self, allowed: Access) -> Starlette:
        app = Starlette(
            routes=[Route(SCORE, self.score, methods=["POST"]), Route(HEALTH, self.health, methods=["GET"])],
            exception_handlers={Refused: _refused, ConfigError: _wrong, HTTPException: _no_route, Exception: _failed},
        )
        app.add_middleware(Admission, access=allowed)
        return app

    async def health(self, request: Request) -> Response:
        """Which reward this is. Whoever can ask has a server that has loaded it."""
        return JSONResponse({"reward": self._reward.name, "unit": self._reward.unit, "ready": True})

    async def score(self, request: Request) -> Response:
        """One number per image."""
        try:
            async with asyncio.timeout(QUEUE_SECONDS):
                await self._places.acquire()
        except TimeoutError:
            problem = Problem("server", MOST_REQUESTS, "requests are being answered already", "Ask again later.")
            return refusal(503, [problem], {"Retry-After": str(_RETRY_AFTER_SECONDS)}, openai=True)
        try:
            body = await body_of(request, MOST_BYTES)
            scores = await asyncio.get_running_loop().run_in_executor(self._threads, self._scores, body)
        except ConfigError:
            raise
        except LatentacError as error:
            _log.warning("%s", error)  # the reward's own failure, which the caller gets, too
            return refusal(500, [Problem(error.where, None, error.problem, error.remedy)], openai=True)
        finally:
            self._places.release()
        return JSONResponse({"scores": scores})

    def _scores(self, body: bytes) -> list[float]:
        asked = validated(Asked, json_of(body, _MOST_VALUES))
        more: list[dict[str, Any]] = asked.metadata if asked.metadata is not None else [{} for _ in asked.images]
        for name, found in (("prompts", asked.prompts), ("metadata", more)):
            if len(found) != len(asked.images):
                problem = f"has not the length of images, {len(asked.images)}"
                raise ConfigError([Problem(name, len(found), problem, "Send one per image.")])
        prompts = [Prompt(text, "all", each) for text, each in zip(asked.prompts, more, strict=True)]
        return [float(one) for one in self._reward(_decoded(asked.images), prompts)]


def serve_reward(
    settings: Reward,
    port: int,
    *,
    host: str,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    token_file: Path | None = None,
) -> None:
    """Serve one reward until SIGTERM or Ctrl-C; what has been asked by then is answered. Prints its address on stdout.

    Raises ResourceError if the port is taken, ConfigError for what cannot be allowed, and what building the reward
    raises. It listens when the reward is built.
    """
    with bind(host, port) as listener:
        allowed = access(host, hosts, origins, token_file)
        (reward,) = load_rewards([settings])
        config = uvicorn.Config(
            Scoring(reward).application(allowed), log_config=None, timeout_graceful_shutdown=GRACE_SECONDS
        )
        connections.bound(config)
        server = uvicorn.Server(config)
        for number in (signal.SIGINT, signal.SIGTERM):  # also one that comes before uvicorn sets its own
            signal.signal(number, server.handle_exit)
        listen(listener)
        print(f"Serving reward {reward.name} at {address_of(listener)} (Ctrl-C stops it)", file=sys.stdout, flush=True)

        async def serve() -> None:
            watching = asyncio.ensure_future(connections.watch(server))
            try:
                await server.serve(sockets=[listener])
            finally:
                watching.cancel()

        asyncio.run(serve())


def _decoded(images: list[str]) -> np.ndarray:
    """uint8 [B, H, W, 3]. Raises ConfigError."""
    found: list[np.ndarray] = []
    for place, text in enumerate(images):
        try:
            found.append(_pixels(text, MOST_PIXELS // len(images)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            remedy = "Send PNGs of one size, RGB with 8 bits, in base64."
            raise ConfigError([Problem(f"images.{place}", None, describe(error, 200), remedy)]) from None
        if found[-1].shape != found[0].shape:
            problem = f"has not the size of the first image, {found[0].shape[1]} x {found[0].shape[0]}"
            raise ConfigError([Problem(f"images.{place}", None, problem, "Send images of one size.")])
    return np.stack(found)


def _pixels(text: str, most: int) -> np.ndarray:
    """uint8 [H, W, 3]; the size is checked before anything is decompressed."""
    content = base64.b64decode(text, validate=True)
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        if image.width * image.height > most:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {most}")
        if image.mode != "RGB":
            raise ValueError(f"its mode is {image.mode}, not RGB")
        return np.asarray(image)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)  # noqa: S101 - Starlette calls it for these
    return refusal(error.status, [error.problem], openai=True)


async def _wrong(request: Request, error: Exception) -> Response:
    assert isinstance(error, ConfigError)  # noqa: S101 - Starlette calls it for these
    return refusal(422, error.problems, openai=True)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - Starlette calls it for these
    problem = Problem("address", request.url.path[:80], error.detail.lower(), f"Use POST {SCORE} or GET {HEALTH}.")
    return refusal(error.status_code, [problem], error.headers, openai=True)


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(500, [Problem("server", None, describe(error), "Look at the server's log.")], openai=True)

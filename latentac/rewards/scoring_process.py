"""A process of a pool (`latentac.rewards.pool`): it builds one reward and answers requests until its parent is gone."""

import faulthandler
import json
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from latentac.config.schema import Reward as RewardSettings
from latentac.rewards.configured import ConfiguredReward, build_reward
from latentac.rewards.failing import Left, Own
from latentac.rewards.score_cache import code_digest
from latentac.system.errors import LatentacError, RewardError, describe
from latentac.system.lifetime import die_with_parent
from latentac.system.reading import parse_json
from latentac.worlds.prompts import Prompt


class _Announced(ConfiguredReward):
    """Tells the parent when a call begins and ends. The parent kills this process when the time of a call is over, so
    calls run in the main thread, without a limit here."""

    def __init__(self, settings: RewardSettings, reward: Any, connection: Connection) -> None:
        super().__init__(settings, reward)
        self._connection = connection

    def _bounded(self, work: Callable[[], Any], what: str, texts: Sequence[str]) -> Any:
        _send(self._connection, {"begun": True})
        try:
            return work()
        except RewardError as error:
            raise Own(error) from error
        except Exception:
            raise
        except BaseException as error:
            raise Left(describe(error)) from error
        finally:
            _send(self._connection, {"begun": False})


def main(descriptor: int) -> None:
    """Serve the socket `descriptor`."""
    die_with_parent()
    faulthandler.enable()
    connection = Connection(descriptor)
    try:
        reward = _built(connection)
        while reward is not None:
            _answer(connection, reward)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has ended, or has no more to ask
        return


def _built(connection: Connection) -> ConfiguredReward | None:
    """The reward of the first message, or None where it cannot be built."""
    asked = parse_json(connection.recv_bytes())
    try:
        settings = RewardSettings.model_validate(asked["settings"])
        reward = _Announced(settings, build_reward(settings, asked["index"]), connection)
    except LatentacError as error:
        _send(connection, {"error": error.to_dict()})
        return None
    _send(connection, {})
    return reward


def _answer(connection: Connection, reward: ConfiguredReward) -> None:
    asked = parse_json(connection.recv_bytes())
    data = connection.recv_bytes() if asked["ask"] == "score" else b""
    try:
        answer, found = _found(reward, asked, data)
    except LatentacError as error:
        answer, found = {"error": error.to_dict()}, b""
    _send(connection, answer | {"data": bool(found)})
    if found:
        connection.send_bytes(found)


def _found(reward: ConfiguredReward, asked: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The answer and its array. Raises LatentacError."""
    match asked["ask"]:
        case "score":
            images = np.frombuffer(data, np.dtype(asked["dtype"])).reshape(asked["shape"])
            scores = reward(images, [Prompt(*fields) for fields in asked["prompts"]])
            return {}, scores.tobytes()
        case "facts":
            return {"unit": reward.unit, "code": code_digest(reward.reward)}, b""
        case "elsewhere":
            return {"elsewhere": reward.elsewhere}, b""
        case "fetch":
            reward.fetch()
            return {}, b""
    known = reward.known()
    if known is None:
        return {"known": None}, b""
    images, prompts, rewards = known
    return {"known": [prompts, rewards.tolist()], "shape": images.shape, "dtype": str(images.dtype)}, images.tobytes()


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message, default=str, ensure_ascii=False).encode(errors="replace"))

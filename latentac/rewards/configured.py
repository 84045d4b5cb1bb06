"""A reward as the configuration has it: with its name and weight, and with every failure reported as its own."""

import copy
import inspect
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np

from latentac.config.extensions import prefixed
from latentac.config.schema import Reward as RewardSettings
from latentac.rewards import REWARDS
from latentac.rewards.failing import REMEDY, Left, Own, place
from latentac.rewards.pool import Pool
from latentac.rewards.score_cache import ScoreCache, code_digest
from latentac.system.calls import in_flight, watched
from latentac.system.errors import ConfigError, LatentacError, RewardError, describe
from latentac.worlds.prompts import Prompt

_FIRST_WAIT = 1.0
_LONGEST_WAIT = 30.0
_log = logging.getLogger(__name__)


class ConfiguredReward:
    """name, weight, bounds: the configuration's; unit: the class's, or "". Calls may come from any thread.

    outside: whether something else than this process computes it, so that rollouts can go on meanwhile.
    cache: of scores, where the configuration asks for one.
    """

    outside = False

    def __init__(self, settings: RewardSettings, reward: Any) -> None:
        self.name, self.weight, self.bounds = settings.name, settings.weight, settings.bounds
        self.reward = reward
        self.unit = str(getattr(reward, "unit", ""))
        self.outside = self.outside or bool(getattr(reward, "outside", False))
        self.cache = ScoreCache(settings, self._code()) if settings.cached_scores else None
        self._timeout, self._retries = settings.timeout_seconds, settings.retries
        self._transient = tuple(getattr(reward, "transient_errors", ()))
        self._takes_metadata = "metadata" in _parameters(reward)

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """float32 [B] for `images`, uint8 [B, H, W, 3], of `prompts`. Raises RewardError for whatever goes wrong."""
        if not prompts:
            return np.zeros(0, np.float32)
        if self.cache is not None:
            return self.cache.scores(images, prompts, self._scored)
        return self._scored(images, prompts)

    def _code(self) -> str:
        """The digest of the class's code."""
        return code_digest(self.reward)

    def _scored(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        try:
            return self._attempts(images, prompts)
        except RewardError:
            raise
        except Exception as error:
            culprit = self._culprit(images, prompts, error)
            raise self._failed(culprit, _described(error)) from error

    @property
    def elsewhere(self) -> bool:
        """Whether `fetch` would have to download something."""
        return bool(getattr(self.reward, "elsewhere", False))

    def fetch(self) -> None:
        """Whatever the reward needs from elsewhere, without a time limit. Raises ConfigError, RewardError."""
        if not hasattr(self.reward, "fetch"):
            return
        try:
            self.reward.fetch()
        except ConfigError as error:
            raise ConfigError(prefixed(error.problems, f"rewards.{self.name}")) from error
        except LatentacError as error:
            raise RewardError(f"reward {self.name}, {error.where}", error.problem, error.remedy) from error
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward {self.name}", f"fetch() failed: {_described(error)}", REMEDY) from error

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray] | None:
        """The class's known images, or None if it has none. Raises RewardError."""
        if not hasattr(self.reward, "known"):
            return None
        try:
            images, prompts, answers = self._bounded(self.reward.known, "known()", [])
            return np.asarray(images), [str(prompt) for prompt in prompts], np.asarray(answers, np.float32).reshape(-1)
        except RewardError:
            raise
        except Own as own:
            raise RewardError(f"reward {self.name}, known()", own.error.problem, own.error.remedy) from own.error
        except Exception as error:
            raise RewardError(f"reward {self.name}", f"known() failed: {_described(error)}", REMEDY) from error

    def _attempts(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """The rewards, after as many attempts as transient errors need. Raises what the last attempt raised."""
        for attempt in range(self._retries + 1):
            try:
                return self._checked(self._within_time(images, prompts), prompts)
            except Exception as error:
                if attempt == self._retries or not _is_transient(error, self._transient):
                    raise
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1.0)
                _log.warning("reward %s: %s; next attempt in %.1f s", self.name, _described(error), wait)
                time.sleep(wait)
        raise AssertionError("the loop returns or raises")

    def _within_time(self, images: np.ndarray, prompts: Sequence[Prompt]) -> Any:
        """What the reward returns. Raises what it raises, and RewardError with its name."""
        shown = images.view()
        shown.flags.writeable = False
        texts = [prompt.text for prompt in prompts]
        # Copies, as what a reward does to its arguments is nobody else's affair.
        more = {"metadata": copy.deepcopy([prompt.metadata for prompt in prompts])} if self._takes_metadata else {}

        try:
            return self._bounded(lambda: self.reward(shown, list(texts), **more), place(prompts), texts)
        except Own as own:  # the class knows what was wrong, and not its own name
            error = own.error
            where = error.where if error.where.startswith("prompt") else f"prompt {texts[0]!r}, {error.where}"
            raise RewardError(f"reward {self.name}, {where}", error.problem, error.remedy) from error

    def _bounded(self, work: Callable[[], Any], what: str, texts: Sequence[str]) -> Any:
        """What `work` returns or raises, in a thread of its own, which is abandoned when its time is over.

        what: for the message then; texts: of the prompts, for the file of the call. Raises RewardError for the time,
        Own for a RewardError of the class, Left for what is no Exception.
        """
        found: list[Any] = []
        failed: list[BaseException] = []

        def call() -> None:
            try:
                with in_flight(self.name, texts, self._timeout):
                    found.append(work())
            except BaseException as error:  # noqa: BLE001 - SystemExit of a reward is its failure too
                failed.append(error)

        thread = threading.Thread(target=call, name=f"reward {self.name}", daemon=True)
        with watched(self._timeout):
            thread.start()
            thread.join(self._timeout)
        if thread.is_alive():
            problem = f"did not answer within {self._timeout:g} s (rewards.{self.name}.timeout_seconds)"
            raise RewardError(f"reward {self.name}, {what}", problem, REMEDY)
        if failed and isinstance(failed[0], RewardError):
            raise Own(failed[0])
        if failed:
            raise failed[0] if isinstance(failed[0], Exception) else Left(describe(failed[0]))
        return found[0]

    def _checked(self, answer: Any, prompts: Sequence[Prompt]) -> np.ndarray:
        """`answer` as float32 [B]. Raises RewardError for another shape or type, and for NaN and infinity."""
        answer = [_plain(item) for item in answer] if isinstance(answer, list | tuple) else _plain(answer)
        if np.ma.is_masked(answer):
            raise self._failed(prompts, "returned a masked array, which has no reward for some images")
        try:
            column = np.asarray(answer)
        except ValueError as error:
            raise self._failed(prompts, f"returned no array: {error}") from None
        if column.shape not in ((len(prompts),), (len(prompts), 1)):
            problem = f"returned shape {list(column.shape)} for {len(prompts)} images, not [{len(prompts)}]"
            raise self._failed(prompts, problem)
        if column.dtype.kind not in "fiub":
            raise self._failed(prompts, f"returned values of type {column.dtype}, not numbers")
        with np.errstate(over="ignore"):
            column = column.reshape(-1).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad):
            problem = f"returned {column[bad[0]]} ({len(bad)} of {len(column)} images)"
            raise self._failed([prompts[int(index)] for index in bad], problem)
        return column

    def _culprit(self, images: np.ndarray, prompts: Sequence[Prompt], error: BaseException) -> Sequence[Prompt]:
        """The first prompt on which the same kind of error comes back alone; all of them if it does on none."""
        until = time.monotonic() + self._timeout
        for index in range(len(prompts)) if len(prompts) > 1 else ():
            if time.monotonic() > until:
                break
            one = slice(index, index + 1)
            try:
                self._within_time(images[one], prompts[one])
            except Exception as found:  # noqa: BLE001 - of the same kind, or another one: the first is reported
                if type(found) is type(error):
                    return prompts[one]
        return prompts

    def _failed(self, prompts: Sequence[Prompt], problem: str) -> RewardError:
        return RewardError(f"reward {self.name}, {place(prompts)}", problem, REMEDY)


class PooledReward(ConfiguredReward):
    """A configured reward whose class is built and called in other processes, and never in this one."""

    outside = True

    def __init__(self, settings: RewardSettings, index: int) -> None:
        """index: in the configuration's list. Raises what `load_rewards` raises."""
        self._pool = Pool(settings, index)
        super().__init__(settings, self._pool)

    @property
    def elsewhere(self) -> bool:
        return bool(self._pool.ask({"ask": "elsewhere"}, "elsewhere")[0]["elsewhere"])

    def fetch(self) -> None:
        self._pool.ask({"ask": "fetch"}, "fetch()")

    def known(self) -> tuple[np.ndarray, list[str], np.ndarray] | None:
        answer, data = self._pool.ask({"ask": "known"}, "known()")
        if answer["known"] is None:
            return None
        prompts, rewards = answer["known"]
        images = np.frombuffer(data, np.dtype(answer["dtype"])).reshape(answer["shape"])
        return images, prompts, np.asarray(rewards, np.float32)

    def _code(self) -> str:
        return self._pool.code

    def _scored(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """The images are divided evenly among the processes, in order."""
        bounds = np.linspace(0, len(prompts), min(self._pool.size, len(prompts)) + 1).astype(int)
        parts = [slice(start, end) for start, end in pairwise(bounds.tolist())]
        if len(parts) == 1:
            return self._part(images, prompts)
        with ThreadPoolExecutor(len(parts)) as threads:
            scores = threads.map(self._part, (images[part] for part in parts), (prompts[part] for part in parts))
            return np.concatenate(list(scores))

    def _part(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        asked = {
            "ask": "score",
            "shape": images.shape,
            "dtype": str(images.dtype),
            "prompts": [[prompt.text, prompt.category, dict(prompt.metadata)] for prompt in prompts],
        }
        _, data = self._pool.ask(asked, place(prompts), np.ascontiguousarray(images).tobytes())
        return np.frombuffer(data, np.float32).copy()


def _plain(answer: Any) -> Any:
    """A tensor of torch, on any device and in any dtype, as an array; anything else as it is."""
    if not hasattr(answer, "detach"):
        return answer
    answer = answer.detach().cpu().resolve_conj().resolve_neg()
    return (answer.float() if answer.is_floating_point() else answer).numpy()


def load_rewards(settings: Iterable[RewardSettings]) -> list[ConfiguredReward]:
    """The configured rewards, in order. Raises ConfigError for a name or a setting, RewardError for a constructor."""
    return [
        PooledReward(one, index) if one.processes else ConfiguredReward(one, build_reward(one, index))
        for index, one in enumerate(settings)
    ]


def any_outside(rewards: Iterable[ConfiguredReward]) -> bool:
    """Whether scoring waits for other processes, at least for one of `rewards`."""
    return any(reward.outside for reward in rewards)


def build_reward(settings: RewardSettings, index: int) -> Any:
    """An instance of the class that entry `index` of the configuration's list names. Raises as `load_rewards`."""
    try:
        return REWARDS.make(settings, path=f"rewards.{index}")
    except ConfigError:
        raise
    except LatentacError as error:
        problem = f"cannot be built: {error.where}: {error.problem}"
        raise RewardError(f"reward {settings.name}", problem, error.remedy) from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {settings.name}", f"cannot be built: {_described(error)}", REMEDY) from error


def _is_transient(error: BaseException, transient: Sequence[Any]) -> bool:
    kinds = tuple(kind for kind in transient if isinstance(kind, type))
    statuses = {status for status in transient if isinstance(status, int)}
    if isinstance(error, kinds):
        return True
    holders = (error, getattr(error, "response", None))
    found = {getattr(holder, name, None) for holder in holders for name in ("status", "status_code", "code")}
    return bool(statuses & {status for status in found if isinstance(status, int)})


def _parameters(reward: Any) -> Mapping[str, Any]:
    try:
        return inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a callable of C has none
        return {}


def _described(error: BaseException) -> str:
    return str(error) if isinstance(error, Left) else describe(error)

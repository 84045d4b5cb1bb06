"""Scores that are kept: found again by image, prompt, metadata, and reward; bounded; never an error."""

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentac.config.schema import Reward
from latentac.rewards.configured import ConfiguredReward
from latentac.system.errors import RewardError
from latentac.worlds.prompts import Prompt

IMAGES = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
PROMPTS = [Prompt(text, "all", {"place": place}) for place, text in enumerate("abcd")]


class Counting:
    """The first number of an image, and a third of it; counts the images that it was shown."""

    def __init__(self, value: float | None = None) -> None:
        self.shown, self.value, self._lock = 0, value, threading.Lock()

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Any:
        with self._lock:
            self.shown += len(images)
        found = images[:, 0, 0, 0] / np.float32(3)
        return found if self.value is None else found * self.value


def cached(reward: Counting, most: int = 100, **fields: Any) -> ConfiguredReward:
    settings = {"use": "x:X", "name": "mine", "cached_scores": most, **fields}
    return ConfiguredReward(Reward.model_validate(settings), reward)


def counts(reward: ConfiguredReward) -> tuple[int, int]:
    assert reward.cache is not None
    return reward.cache.take_counts()


def test_a_score_is_asked_for_once() -> None:
    """Also in another order, and beside images that are new."""
    counting = Counting()
    reward = cached(counting)
    first = reward(IMAGES[:2], PROMPTS[:2])
    again = reward(IMAGES[[3, 1, 0]], [PROMPTS[3], PROMPTS[1], PROMPTS[0]])
    assert again.dtype == np.float32
    assert again[[2, 1]].tolist() == first.tolist()
    assert (counting.shown, counts(reward), counts(reward)) == (3, (5, 2), (0, 0))
    assert (
        again.tolist()
        == ConfiguredReward(Reward(use="x:X", name="mine"), Counting())(
            IMAGES[[3, 1, 0]], [PROMPTS[3], PROMPTS[1], PROMPTS[0]]
        ).tolist()
    )


@pytest.mark.parametrize(
    ("image", "prompt"),
    [
        (IMAGES[:1] + 1, PROMPTS[0]),
        (IMAGES[:1].reshape(1, 4, 1, 3), PROMPTS[0]),
        (IMAGES[:1], Prompt("b", "all", {"place": 0})),
        (IMAGES[:1], Prompt("a", "all", {"place": 1})),
        (IMAGES[:1], Prompt("a")),
    ],
    ids=["image", "shape", "text", "metadata", "no metadata"],
)
def test_whatever_is_different_is_scored(image: np.ndarray, prompt: Prompt) -> None:
    """Each of what a score depends on."""
    counting = Counting()
    reward = cached(counting)
    reward(IMAGES[:1], PROMPTS[:1])
    reward(image, [prompt])
    assert counting.shown == 2


def test_the_number_kept_is_bounded() -> None:
    """Those that were asked for last stay."""
    counting = Counting()
    reward = cached(counting, most=2)
    reward(IMAGES[:2], PROMPTS[:2])
    reward(IMAGES[:1], PROMPTS[:1])  # is now the last
    reward(IMAGES[2:3], PROMPTS[2:3])
    assert counting.shown == 3
    reward(IMAGES[:1], PROMPTS[:1])
    assert counting.shown == 3
    reward(IMAGES[1:2], PROMPTS[1:2])
    assert counting.shown == 4


def test_an_error_is_not_kept(tmp_path: Path) -> None:
    """Neither is a number that is none."""
    counting = Counting(float("nan"))
    reward = cached(counting, scores_folder=str(tmp_path))
    with pytest.raises(RewardError, match="returned nan"):
        reward(IMAGES, PROMPTS)
    counting.value, counting.shown = None, 0
    assert np.isfinite(reward(IMAGES, PROMPTS)).all()
    assert counting.shown == 4


def test_a_folder_is_shared(tmp_path: Path) -> None:
    """By equal rewards alone: of the same class, code and settings. The name does not matter."""
    first = cached(Counting(), scores_folder=str(tmp_path / "new"))
    expected = first(IMAGES, PROMPTS)
    for most, fields, shown in ((1, {"name": "other"}, 0), (9, {"radius": 3}, 4), (9, {"use": "x:Y"}, 4)):
        counting = Counting()
        reward = cached(counting, most, scores_folder=str(tmp_path / "new"), **fields)
        assert reward(IMAGES, PROMPTS).tolist() == expected.tolist()
        assert counting.shown == shown


def test_threads_share_a_cache(tmp_path: Path) -> None:
    """As those that roll out do."""
    counting = Counting()
    reward = cached(counting, scores_folder=str(tmp_path))
    expected = reward(IMAGES, PROMPTS).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert all(found.tolist() == expected for found in threads.map(lambda _: reward(IMAGES, PROMPTS), range(50)))
    assert counting.shown == 4


@pytest.mark.parametrize("what", ["garbage", "folder", "table", "values"])
def test_a_file_that_is_none_is_left_alone(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scores are then asked for, and kept in memory."""
    file = tmp_path / "scores.sqlite"
    if what == "garbage":
        file.write_bytes(b"no database" * 1000)
    elif what == "folder":
        file.mkdir()
    elif what == "table":
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE scores (other TEXT)")
    else:
        cached(Counting(), scores_folder=str(tmp_path))(IMAGES, PROMPTS)
        with sqlite3.connect(file) as database:
            database.execute("UPDATE scores SET score = 'inf' WHERE rowid % 2")
            database.execute("UPDATE scores SET score = 9e999 WHERE rowid % 2 = 0")
    counting = Counting()
    reward = cached(counting, scores_folder=str(tmp_path))
    first = reward(IMAGES, PROMPTS)
    assert reward(IMAGES, PROMPTS).tolist() == first.tolist() == (IMAGES[:, 0, 0, 0] / np.float32(3)).tolist()
    assert counting.shown == 4
    assert ("scores are no longer kept" in caplog.text) == (what != "values")


def test_a_child_says_which_code_it_has(tmp_path: Path) -> None:
    """A reward in other processes has the same key as in the worker."""
    from latentac.rewards.configured import load_rewards

    settings = {"use": "jpeg_compressibility", "cached_scores": 9, "scores_folder": str(tmp_path)}
    for processes, hits in ((0, 0), (1, 4), (0, 4)):
        (reward,) = load_rewards([Reward.model_validate({**settings, "processes": processes})])
        reward(IMAGES, PROMPTS)
        assert counts(reward) == (4, hits)

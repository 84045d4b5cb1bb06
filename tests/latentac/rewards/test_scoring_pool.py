"""Rewards in processes of their own: the same numbers and errors as in the worker, and no crash that ends more than
one process."""

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentac.config.schema import Reward
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.system.errors import ConfigError, RewardError
from latentac.worlds.prompts import Prompt

USE = "tests.latentac.rewards.scoring:Scoring"
IMAGES = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
PROMPTS = [Prompt(f"prompt {place}", "all", {"more": place / 8, "tags": ["ä", None]}) for place in range(5)]
EXPECTED = [0.0, 48.125, 96.25, 144.375, 192.5]


def pooled(processes: int = 2, **fields: Any) -> ConfiguredReward:
    (reward,) = load_rewards([Reward.model_validate({"use": USE, "name": "mine", "processes": processes, **fields})])
    return reward


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def pids(reward: ConfiguredReward, count: int = 5) -> set[int]:
    """Of the processes that score `count` images."""
    return {int(pid) for pid in reward(IMAGES[:count], [Prompt("!pid")] * count)}


def gone(processes: set[int], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, processes))


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_the_numbers_are_those_of_the_worker(processes: int) -> None:
    """In order, with the metadata of each image, for every number of processes and of images."""
    reward = pooled(processes)
    assert reward.unit == "grey levels"
    for count in range(6):
        found = reward(IMAGES[:count], PROMPTS[:count])
        assert found.dtype == np.float32
        assert found.tolist() == EXPECTED[:count] == pooled(0)(IMAGES[:count], PROMPTS[:count]).tolist()


def test_a_batch_is_divided_among_the_processes() -> None:
    """Which score at the same time, and are not the worker."""
    reward = pooled(2, seconds=0.5)
    first = pids(reward, 4)
    assert len(first) == 2
    assert os.getpid() not in first
    began = time.monotonic()
    reward(IMAGES[:4], PROMPTS[:4])
    assert time.monotonic() - began < 1.8
    assert pids(reward, 4) == first


def test_fetch_known_and_elsewhere_are_asked_there(tmp_path: Path) -> None:
    """As `prepare` asks them."""
    reward = pooled(1, once=str(tmp_path))
    images, prompts, rewards = reward.known() or pytest.fail("knows nothing")
    assert (images.shape, str(images.dtype)) == ((1, 2, 2, 3), "uint8")
    assert (prompts, rewards.tolist()) == (["seven"], [7.0])
    assert not reward.elsewhere
    reward.fetch()
    assert (tmp_path / "fetched").exists()
    failing = pooled(1, how="fetch")
    assert failing.elsewhere
    with pytest.raises(RewardError, match=r"reward mine: fetch\(\) failed: OSError: no such server"):
        failing.fetch()
    (plain,) = load_rewards([Reward(use="colourfulness", processes=1)])
    assert plain.known() is not None
    plain.fetch()


def error_of(work: Callable[[], object]) -> str:
    with pytest.raises(RewardError) as caught:
        work()
    return str(caught.value)


@pytest.mark.parametrize("how", ["raise", "memory", "leave", "nan", "short", "text", "object"])
def test_a_failure_is_told_in_the_same_words(how: str) -> None:
    """Whatever is wrong with one image: its prompt, and what was found. The processes go on."""
    prompts = [*PROMPTS[:2], Prompt(f"!{how}"), *PROMPTS[3:]]
    reward = pooled(1)
    told = error_of(lambda: reward(IMAGES, prompts))
    assert told == error_of(lambda: pooled(0)(IMAGES, prompts))
    assert told.startswith("reward mine, prompt '")
    before = pids(reward, 1)
    assert reward(IMAGES, PROMPTS).tolist() == EXPECTED
    assert pids(reward, 1) == before


def test_a_transient_error_is_tried_again(tmp_path: Path) -> None:
    """Only as often as `retries`, and in the process."""
    assert pooled(1, how="transient", once=str(tmp_path), retries=1)(IMAGES, PROMPTS).tolist() == EXPECTED
    assert "ConnectionError: busy" in error_of(lambda: pooled(1, how="transient", retries=0)(IMAGES, PROMPTS))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("segfault", "was killed by SIGSEGV"),
        ("null", "was killed by SIGSEGV"),
        ("exit", "ended with exit code 3"),
        ("killed", "was killed by SIGKILL"),
    ],
)
def test_a_crash_ends_one_process(how: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told with name and signal, and its images are scored by a new process."""
    reward = pooled(1, how=how, once=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert reward(IMAGES, PROMPTS).tolist() == EXPECTED
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"reward mine, prompt 'prompt 0' and 4 more: its process {words}; a new process takes over")


def test_images_that_always_crash_are_given_to_three_processes() -> None:
    """Then the run ends with an error of the reward. Other images are still scored."""
    reward = pooled(2)
    told = error_of(lambda: reward(IMAGES[:1], [Prompt("!segfault")]))
    assert told.startswith("reward mine, prompt '!segfault': its process was killed by SIGSEGV, as were 2 before it")
    assert reward(IMAGES, PROMPTS).tolist() == EXPECTED


def test_restarts_have_a_bound() -> None:
    """Over all calls."""
    reward = pooled(1, max_restarts=3)
    error_of(lambda: reward(IMAGES[:1], [Prompt("!exit")]))
    told = error_of(lambda: reward(IMAGES[:1], [Prompt("!exit")]))
    assert "ended with exit code 3, and 3 were started again (rewards.mine.max_restarts)" in told
    told = error_of(lambda: pooled(1, max_restarts=0)(IMAGES[:1], [Prompt("!exit")]))
    assert "and 0 were started again" in told


@pytest.mark.parametrize("how", ["hang", "lock"])
def test_a_call_that_hangs_is_killed(how: str) -> None:
    """At the time limit, also where it lets no other thread run. The next call has a new process."""
    reward = pooled(1, timeout_seconds=1.0)
    before = pids(reward)
    began = time.monotonic()
    told = error_of(lambda: reward(IMAGES[:1], [Prompt(f"!{how}")]))
    assert time.monotonic() - began < 3
    assert told.startswith(f"reward mine, prompt '!{how}': did not answer within 1 s (rewards.mine.timeout_seconds)")
    assert gone(before)
    assert reward(IMAGES, PROMPTS).tolist() == EXPECTED


def test_what_cannot_be_built_is_told() -> None:
    """A wrong setting, a constructor that raises, and one that crashes."""
    with pytest.raises(ConfigError, match=r"rewards.0.hwo = 1: .* has no such setting"):
        pooled(1, hwo=1)
    assert "reward mine: cannot be built: ValueError: this image" in error_of(lambda: pooled(1, built="raise"))
    told = error_of(lambda: pooled(1, built="segfault"))
    assert told.startswith("reward mine, its constructor: its process was killed by SIGSEGV, as were 2 before it")


def test_metadata_that_is_not_json_is_refused() -> None:
    """Of prompts that did not come from a file."""
    told = error_of(lambda: pooled(1)(IMAGES[:1], [Prompt("a", "all", {"more": {1, 2}})]))
    assert "its prompts or metadata cannot go to a process: TypeError" in told


def test_a_class_of_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process can import, the others can, too."""
    (tmp_path / "ours_scored.py").write_text(
        "class Ours:\n    def __call__(self, images, prompts):\n        return [len(text) for text in prompts]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (reward,) = load_rewards([Reward(use="ours_scored:Ours", processes=2)])
    assert reward(IMAGES, PROMPTS).tolist() == [8.0] * 5
    assert "ours_scored" not in sys.modules


def test_many_threads_share_the_processes() -> None:
    """And a process that a thread has started stays when the thread ends."""
    reward = pooled(2)

    def one(place: int) -> bool:
        images = np.full((3, 2, 2, 3), place, np.uint8)
        return reward(images, [Prompt("a")] * 3).tolist() == [place] * 3

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(64)))
    first = pids(reward)
    thread = threading.Thread(target=reward, args=(IMAGES, PROMPTS))
    thread.start()
    thread.join()
    assert pids(reward) == first


def test_processes_end_with_the_reward() -> None:
    """When nobody has it any more."""
    reward = pooled(2)
    started = pids(reward)
    del reward
    gc.collect()
    assert gone(started)


PROGRAM = """
import sys, threading, numpy as np
from latentac.config.schema import Reward
from latentac.rewards.configured import load_rewards
from latentac.worlds.prompts import Prompt
(reward,) = load_rewards([Reward.model_validate({"use": "%s", "processes": 2})])
pids = reward(np.zeros((4, 2, 2, 3), np.uint8), [Prompt("!pid")] * 4)
busy = threading.Thread(target=reward, args=(np.zeros((1, 2, 2, 3), np.uint8), [Prompt("!lock")]))
busy.start()
print(*{int(pid) for pid in pids}, flush=True)
busy.join()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_worker(number: signal.Signals) -> None:
    """However it ends, idle ones and one that never lets another thread run."""
    command = [sys.executable, "-c", PROGRAM % USE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
        assert worker.stdout is not None
        started = {int(pid) for pid in worker.stdout.readline().split()}
        assert len(started) == 2
        time.sleep(0.5)
        assert all(map(alive, started))
        worker.send_signal(number)
        if number == signal.SIGINT:  # Python waits for the thread of the call
            time.sleep(0.5)
            worker.kill()
        worker.wait(30)
        assert gone(started)

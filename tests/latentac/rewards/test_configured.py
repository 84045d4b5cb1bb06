"""A reward under its configured name: what it may return, and how every failure of it is reported."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentac.config import extensions
from latentac.config.schema import Reward
from latentac.rewards.configured import ConfiguredReward, load_rewards
from latentac.system.calls import FOLDER, crash_in_call, in_flight
from latentac.system.errors import ConfigError, ResourceError, RewardError
from latentac.worlds.prompts import Prompt

IMAGES = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
PROMPTS = [Prompt(text, "all", {"place": place}) for place, text in enumerate(("a", "b", "c"))]
HERE = "tests.latentac.rewards.test_configured"


def configured(function: Callable[..., Any], **fields: Any) -> ConfiguredReward:
    """A function as the reward `mine`."""
    return ConfiguredReward(Reward.model_validate({"use": "x:Mine", "name": "mine", **fields}), function)


class Level:
    """The mean of a channel."""

    class Settings(extensions.Settings):
        """channel: 0 to 2."""

        channel: int = 0

    def __init__(self, settings: "Level.Settings") -> None:
        self.channel = settings.channel

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        means: np.ndarray = images[..., self.channel].mean((1, 2))
        return means


@pytest.mark.parametrize(
    "answer",
    [
        np.array([1, 2, 3]),
        np.array([1.0, 2.0, 3.0], np.float16),
        np.array([[1.0], [2.0], [3.0]]),
        np.array([1, 2, 3], np.uint8),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True),
        torch.tensor([1, 2, 3]),
        [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, dtype=torch.bfloat16), 3],
        torch.tensor([1j, 2j, 3j]).conj().imag.neg(),
        [1, 2.0, 3],
        [np.float64(1), 2, 3],
        (1, 2, 3),
    ],
    ids=lambda answer: f"{type(answer).__name__} {getattr(answer, 'dtype', '')}",
)
def test_any_numbers_will_do(answer: Any) -> None:
    """Arrays, tensors and lists, of any dtype, [B] or [B, 1]."""
    found = configured(lambda images, prompts: answer)(IMAGES, PROMPTS)
    assert found.dtype == np.float32
    assert found.tolist() == [1.0, 2.0, 3.0]


def test_booleans_are_0_and_1() -> None:
    """As a detector answers."""
    assert configured(lambda images, prompts: torch.tensor([True, False, True]))(IMAGES, PROMPTS).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (np.zeros(2), r"returned shape \[2\] for 3 images, not \[3\]"),
        (np.zeros((3, 2)), r"returned shape \[3, 2\]"),
        (0.5, r"returned shape \[\]"),
        (None, r"returned shape \[\]"),
        (["a", "b", "c"], "not numbers"),
        (np.zeros(3, complex), "not numbers"),
        ([1.0, [2.0], 3.0], "returned no array"),
        (np.ma.array([1.0, 2.0, 3.0], mask=[True, False, False]), "masked array"),
        ([0.0, float("nan"), 0.0], r"prompt 'b': returned nan \(1 of 3 images\)"),
        ([0.0, 0.0, 1e300], r"prompt 'c': returned inf"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(answer: Any, words: str) -> None:
    """The reward, a prompt, and what it returned."""
    with pytest.raises(RewardError, match=words) as caught:
        configured(lambda images, prompts: answer)(IMAGES, PROMPTS)
    assert caught.value.where.startswith("reward mine, prompt '")


@pytest.mark.parametrize("answer", [[np.nan] * 3, [np.inf] * 3, [0.0], [[0.0, 1.0]] * 3, None])
def test_each_call_is_checked(answer: Any) -> None:
    """One that was right before may be wrong now."""
    answers = [[1.0, 2.0, 3.0], answer]
    reward = configured(lambda images, prompts: answers.pop(0))
    assert reward(IMAGES, PROMPTS).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(RewardError, match="reward mine, prompt 'a' and 2 more: returned"):
        reward(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "failure", [KeyError("no such caption"), SystemExit(3), MemoryError(), GeneratorExit("x"), KeyboardInterrupt()]
)
def test_an_exception_is_the_rewards_failure(failure: BaseException) -> None:
    """Of whatever kind, SystemExit included: name, prompt and the exception's text."""

    def reward(images: np.ndarray, prompts: list[str]) -> list[float]:
        if "b" in prompts:
            raise failure
        return [0.0] * len(prompts)

    with pytest.raises(RewardError) as caught:
        configured(reward)(IMAGES, PROMPTS)
    message = str(caught.value)
    assert message.startswith(f"reward mine, prompt 'b': {type(failure).__name__}")
    assert all(str(part) in message for part in failure.args)


class Unreadable(Exception):
    """Its text is not a text, and it cannot be sent to another process."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.lock = error, threading.Lock()

    def __str__(self) -> str:
        raise self.error


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Unreadable(ValueError("no text")), "Unreadable"),
        (Unreadable(SystemExit(0)), "Unreadable"),
        (ValueError("a\x1b[31mred\nline"), r"ValueError: a \[31mred line"),
    ],
)
def test_an_exceptions_text_is_made_one_line(failure: Exception, words: str) -> None:
    """Whatever it is: a message on a terminal must not be what an exception makes of it."""

    def reward(images: np.ndarray, prompts: list[str]) -> list[float]:
        raise failure

    with pytest.raises(RewardError, match=words) as caught:
        configured(reward)(IMAGES, PROMPTS)
    assert "\x1b" not in str(caught.value)


class Ending:
    """Ends the process, or never comes back, in `known()`."""

    class Settings(extensions.Settings):
        """how: what happens where."""

        how: str = "exit"

    def __init__(self, settings: "Ending.Settings") -> None:
        self.how = settings.how
        if self.how == "built":
            sys.exit(0)

    def __call__(self, images: np.ndarray, prompts: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    def known(self) -> Any:
        if self.how == "exit":
            sys.exit(0)
        time.sleep(60)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("built", "reward Ending: cannot be built: SystemExit: 0"),
        ("exit", r"reward Ending: known\(\) failed: SystemExit: 0"),
        ("hang", r"reward Ending, known\(\): did not answer within 0.2 s"),
    ],
)
def test_no_part_of_a_reward_ends_or_holds_the_process(how: str, words: str) -> None:
    """`sys.exit(0)` would look like success."""
    settings = Reward.model_validate({"use": f"{HERE}:Ending", "how": how, "timeout_seconds": 0.2})
    with pytest.raises(RewardError, match=words):
        load_rewards([settings])[0].known()


class Weighted(Level):
    """Has a setting that the configuration has for every reward."""

    class Settings(Level.Settings):
        """The configuration's own name."""

        weight: float = 3.0


def test_settings_of_a_class_are_not_those_of_every_reward() -> None:
    """Its default would take the place of what the user wrote."""
    with pytest.raises(ConfigError, match=r"its Settings declare weight, which the configuration has for every"):
        load_rewards([Reward.model_validate({"use": f"{HERE}:Weighted", "weight": 0.5})])


def test_images_are_read_only_and_metadata_comes_where_it_is_wanted() -> None:
    """A reward cannot change what the next one sees."""

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, int]]) -> list[int]:
        images[:] = 0
        return [one["place"] for one in metadata]

    with pytest.raises(RewardError, match="ValueError: assignment destination is read-only"):
        configured(reward)(IMAGES, PROMPTS)
    assert IMAGES.flags.writeable
    found = configured(lambda images, prompts, metadata: [one["place"] for one in metadata])(IMAGES, PROMPTS)
    assert found.tolist() == [0, 1, 2]


def test_what_a_reward_does_to_its_prompts_and_metadata_is_nobody_elses_affair() -> None:
    """The next call sees them as they were, and a failure is still told with its prompt."""
    prompts = [Prompt("a", "all", {"place": [1]}), Prompt("b", "all", {"place": [2]})]

    def reward(images: np.ndarray, texts: list[str], metadata: list[dict[str, list[int]]]) -> list[int]:
        found = [one.pop("place").pop() for one in metadata]
        texts.clear()
        if len(images) > 1:
            raise RewardError("caption", "cannot be parsed", "Shorten it")
        return found

    for _ in range(2):
        assert configured(reward)(IMAGES[:1], prompts[:1]).tolist() == [1]
    with pytest.raises(RewardError, match="reward mine, prompt 'a', caption: cannot be parsed"):
        configured(reward)(IMAGES[:2], prompts)


def test_a_reward_may_use_processes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that forks, and another program; the death of one of them is not that of the run's process."""
    monkeypatch.setenv(FOLDER, str(tmp_path))

    def reward(images: np.ndarray, prompts: list[str]) -> list[float]:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            found = pool.map(len, prompts)
        ended = subprocess.run([sys.executable, "-c", "import os; os.abort()"], check=False).returncode
        assert len(list(tmp_path.iterdir())) == 1
        return [float(one) + ended for one in found]

    assert configured(reward)(IMAGES, PROMPTS).tolist() == [1.0 - signal.SIGABRT] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_slow_call_is_reported_by_name() -> None:
    """After `timeout_seconds`, whatever it waits for; nothing waits for it to end."""
    forever = threading.Event()
    reward = configured(lambda images, prompts: forever.wait(), timeout_seconds=0.2)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"reward mine, prompt 'a' and 2 more: did not answer within 0\.2 s"):
        reward(IMAGES, PROMPTS)
    assert time.monotonic() - began < 5
    forever.set()


class Unavailable(Exception):
    """As `requests` and `urllib` have it, with the status of an HTTP answer."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class Service:
    """Fails as often as it is told, then answers."""

    transient_errors = (503, ConnectionError)

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.calls = list(failures), 0

    def __call__(self, images: np.ndarray, prompts: list[str]) -> list[float]:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return [1.0] * len(prompts)


def test_transient_errors_are_tried_again_with_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the class declares, by type or by HTTP status, and no others."""
    monkeypatch.setattr("latentac.rewards.configured._FIRST_WAIT", 0.01)
    service = Service(Unavailable(503), ConnectionResetError("peer"))
    assert configured(service, retries=2)(IMAGES, PROMPTS).tolist() == [1, 1, 1]
    assert service.calls == 3
    for failures, retries in ((3 * [Unavailable(503)], 2), ([Unavailable(401)], 5)):
        with pytest.raises(RewardError, match=rf"Unavailable: HTTP {failures[0].status}"):
            configured(Service(*failures), retries=retries)(IMAGES, PROMPTS)


def test_two_instances_of_one_class_work_side_by_side() -> None:
    """Each with its own name and settings."""
    red, green = load_rewards(
        [
            Reward.model_validate({"use": f"{HERE}:Level", "name": n, "channel": c})
            for n, c in (("red", 0), ("green", 1))
        ]
    )
    assert (red.name, green.name, red.unit) == ("red", "green", "")
    assert (green(IMAGES, PROMPTS) - red(IMAGES, PROMPTS)).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"rewards\.0\.chanel = 1: .* no such setting\. Did you mean \"channel\""):
        load_rewards([Reward.model_validate({"use": f"{HERE}:Level", "chanel": 1})])


def test_a_class_that_cannot_be_built_is_reported_by_name() -> None:
    """Its constructor's exception, as that reward's failure."""
    for how, words in (
        ("type", "TypeError: no weights here"),
        ("reward", r"weights\.bin: is missing"),
        ("package", "package clip: is not installed"),
    ):
        settings = Reward.model_validate({"use": f"{HERE}:Unbuildable", "name": "service", "how": how})
        with pytest.raises(RewardError, match=f"reward service: cannot be built: {words}"):
            load_rewards([settings])


class Unbuildable:
    """Fails when it is built, as latentac's own errors too."""

    class Settings(extensions.Settings):
        """how: by which exception."""

        how: str

    def __init__(self, settings: "Unbuildable.Settings") -> None:
        if settings.how == "reward":
            raise RewardError("weights.bin", "is missing", "Fetch it")
        if settings.how == "package":
            raise ResourceError("package clip", "is not installed", "Install it")
        raise TypeError("no weights here")


def test_a_call_in_flight_leaves_a_note_for_whoever_finds_the_process_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as the call lasts: reward, first prompt, how many more."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with in_flight("mine", ["a", "b"], 60.0):
        (file,) = tmp_path.iterdir()
        assert file.name.startswith(f"{os.getpid()}-")
        assert json.loads(file.read_text())["reward"] == "mine"
        error = crash_in_call(tmp_path, "was killed by SIGSEGV", os.getpid())
        assert str(error).startswith(
            "reward mine, prompt 'a' and 1 more: the process that called it was killed by SIGSEGV"
        )
        assert crash_in_call(tmp_path, "ended", os.getpid() + 1) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", '{"reward": "\\ud800", "prompt": "a"}', '{"count": "x"}'])
def test_a_note_that_says_nonsense_is_none(tmp_path: Path, content: str) -> None:
    """The process may have died while it wrote it, and the reward may write there too."""
    (tmp_path / f"{os.getpid()}-1.json").write_text(content)
    assert crash_in_call(tmp_path, "ended", os.getpid()) is None


def test_the_names_of_threads_and_the_module_search_path_are_left_alone() -> None:
    """A call runs in a thread of its own, and changes nothing of the caller's."""
    seen: list[str] = []
    before = list(sys.path)

    def reward(images: np.ndarray, prompts: list[str]) -> list[float]:
        seen.append(threading.current_thread().name)
        return [0.0] * len(prompts)

    configured(reward)(IMAGES, PROMPTS)
    assert seen == ["reward mine"]
    assert sys.path == before

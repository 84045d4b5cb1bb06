"""What a worker tells its launcher through the store, and what of it is final."""

from pathlib import Path

import pytest

from latentac.runs import failures
from latentac.store import Store, open_store
from latentac.system.errors import (
    ConfigError,
    LatentacError,
    Problem,
    RewardError,
    StoreUnavailable,
    TrainingError,
    restore,
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv(failures.ATTEMPT, "attempt-1")
    monkeypatch.setenv("MASTER_ADDR", "worker-0")
    return open_store(f"file://{tmp_path}")


def meet(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """A new start of the workers: they meet at a port of its own."""
    monkeypatch.setenv("MASTER_PORT", str(port))


def test_expected_error_is_final_at_once(store: Store) -> None:
    """It comes back as it was raised; another one after it, from a peer, does not take its place."""
    failures.report(store, "r", RewardError("rewards.x", "gave NaN", "Look at it"), 3)
    failures.report(store, "r", TrainingError("later", "later", "later"), 3)

    error = failures.read(store, "r", "attempt-1")
    assert isinstance(error, RewardError)
    assert error.where == "rewards.x"


def test_other_attempt_is_no_news(store: Store) -> None:
    """A run that is resumed is not ended by what ended it before."""
    failures.report(store, "r", RewardError("rewards.x", "gave NaN", "Look at it"), 3)
    assert failures.read(store, "r", "attempt-2") is None
    assert failures.read(store, "another", "attempt-1") is None


def test_unexpected_error_is_final_at_its_third_start(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of one start count once; the error names the iteration and what was raised."""
    for port in (1, 1, 2):
        meet(monkeypatch, port)
        failures.report(store, "r", RuntimeError("shape mismatch"), 5)
        assert failures.read(store, "r", "attempt-1") is None
    meet(monkeypatch, 3)
    failures.report(store, "r", RuntimeError("shape mismatch"), 5)

    error = failures.read(store, "r", "attempt-1")
    assert isinstance(error, TrainingError)
    assert "iteration 5" in str(error)
    assert "shape mismatch" in str(error)


def test_progress_between_two_errors_starts_the_count_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the same failure at the same iteration says that another start would be in vain."""
    for port, iteration in enumerate((5, 5, 6, 6, 5, 5)):
        meet(monkeypatch, port)
        failures.report(store, "r", RuntimeError("once in a while"), iteration)
    assert failures.read(store, "r", "attempt-1") is None


def test_store_that_did_not_answer_may_answer_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error whose exit code says `try again later` is counted too; the third one is raised as it is."""
    for port in (1, 2, 3):
        meet(monkeypatch, port)
        assert failures.read(store, "r", "attempt-1") is None
        failures.report(store, "r", StoreUnavailable("s3", "no answer", "Wait"), 1)
    assert isinstance(failures.read(store, "r", "attempt-1"), StoreUnavailable)


@pytest.mark.parametrize(
    "error",
    [
        TrainingError("iteration 3", "the update is not finite", "Lower the rate"),
        ConfigError([Problem("seed", -1, "is negative", "Use 0."), Problem("recipe", "x", "is unknown", "Use y.")]),
    ],
)
def test_error_is_the_same_in_another_process(error: LatentacError) -> None:
    """Class, message and exit code survive the way through JSON."""
    again = restore(error.to_dict())
    assert (type(again), str(again), again.exit_code) == (type(error), str(error), error.exit_code)


@pytest.mark.parametrize(
    "left",
    [
        [],
        {"error": {"kind": "Evil", "where": "a", "problem": "b", "remedy": "c"}},
        {"error": {"kind": ["StoreError"], "where": "a", "problem": "b", "remedy": "c"}},
        {"error": {"kind": "ConfigError", "where": "a", "problem": "b", "remedy": "c"}},
        {"error": {"kind": "StoreError"}},
        {"error": {"problems": []}},
        {"error": {"problems": [{"x": 1}]}},
        {"error": {"problems": 5}},
        {"error": "x"},
        {"starts": 5},
        {"starts": [[]]},
        {"starts": None},
    ],
)
def test_what_no_worker_has_left_is_no_traceback(
    store: Store, monkeypatch: pytest.MonkeyPatch, left: dict[str, object]
) -> None:
    """Who may write to the store may write anything there: it is not news, or an error that says so."""
    meet(monkeypatch, 1)
    record = {"attempt": "attempt-1", "where": "RuntimeError in iteration 5", "starts": ["a"], "error": None}
    store.write_json("failures/r.json", {**record, **left} if isinstance(left, dict) else left)
    assert isinstance(failures.read(store, "r", "attempt-1"), LatentacError | None)
    failures.report(store, "r", RuntimeError("x"), 5)

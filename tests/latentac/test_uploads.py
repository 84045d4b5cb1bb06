"""Uploads in the background: one runs, one waits, and a store that does not answer has a bound."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from latentac.runs.workers import uploads
from latentac.runs.workers.uploads import Upload, Uploads
from latentac.system.errors import StoreAccessError, StoreUnavailable
from tests.latentac.test_store import eventually


def made(max_seconds: float = 60.0) -> Uploads:
    return Uploads("s3://there", max_seconds, setting="train.max_seconds_without_store", kept="It is kept in /here")


class Line:
    """What uploads do, each only when it may. `most`: how many were at it at once."""

    def __init__(self) -> None:
        self.may, self.done = threading.Semaphore(0), list[int]()
        self.now = self.most = 0

    def upload(self, number: int) -> Upload:
        def action() -> None:
            self.now += 1
            self.most = max(self.most, self.now)
            assert self.may.acquire(timeout=20)
            self.now -= 1
            self.done.append(number)

        return Upload(f"number {number}", action, number)


def test_one_runs_one_waits_and_the_newest_takes_its_place() -> None:
    """However many are submitted meanwhile: nothing piles up, and the last one arrives."""
    line, found = Line(), made()
    found.submit(line.upload(1))
    eventually(lambda: line.now == 1)
    for number in range(2, 9):
        began = time.monotonic()
        found.submit(line.upload(number))
        assert time.monotonic() - began < 1
        assert [upload.iteration for upload in found.pending()] == [1, number]
    line.may.release(9)
    assert found.settle()
    assert line.done == [1, 8]
    assert line.most == 1


def silent(until: Callable[[], bool], tries: list[float]) -> Callable[[], None]:
    def action() -> None:
        tries.append(time.monotonic())
        if not until():
            raise StoreUnavailable("s3://there", "no answer", "Wait")

    return action


def test_a_store_that_comes_back_gets_the_newest_and_there_are_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    """One when it stops answering, one when it answers again; in between it is asked with growing pauses."""
    back, tries, found = threading.Event(), list[float](), made()
    done: list[int] = []

    def upload(action: Callable[[], None], number: int) -> None:
        action()
        done.append(number)

    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 3):
            action = silent(back.is_set, tries)
            found.submit(Upload(f"number {number}", partial(upload, action, number), number))
        eventually(lambda: len(tries) >= 3)
        found.check()
        back.set()
        assert found.settle()
    assert done[-1] == 3
    first, last = [record.getMessage() for record in caplog.records]
    assert "s3://there: no answer" in first
    assert "at most 60 s (train.max_seconds_without_store). It is kept in /here" in first
    assert "the store answers again, after " in last
    assert "number 3 is uploaded" in last


def test_beyond_the_bound_it_ends_with_an_error_to_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For whoever goes on working, and for whoever waits: both learn it after the bound, and not before."""
    monkeypatch.setattr(uploads, "_LONGEST_PAUSE_SECONDS", 0.2)
    found, tries, began = made(max_seconds=2.0), list[float](), time.monotonic()
    found.submit(Upload("it", silent(lambda: False, tries), 1))
    with pytest.raises(StoreUnavailable) as caught:
        found.settle()
    assert 2.0 <= time.monotonic() - began < 4.0
    assert len(tries) > 3
    assert caught.value.exit_code == 75
    for words in ("s3://there", "has not answered for 2 s", "train.max_seconds_without_store = 2", "kept in /here"):
        assert words in str(caught.value)
    with pytest.raises(StoreUnavailable):
        found.check()


def test_an_error_that_waiting_cannot_solve_is_raised_at_once() -> None:
    """In the thread of the owner, with the upload still named as not done."""

    def refused() -> None:
        raise StoreAccessError("s3://there", "it refuses access", "Check the keys")

    found = made()
    found.submit(Upload("it", refused, 1))
    with pytest.raises(StoreAccessError, match="refuses access"):
        found.settle()
    assert [upload.what for upload in found.end(10.0)] == ["it"]


def test_the_end_waits_a_bounded_time() -> None:
    """For an upload that moves; one that does not end is named. Nor does a deadline of `settle` wait longer."""
    line, found = Line(), made()
    found.submit(line.upload(1))
    eventually(lambda: line.now == 1)
    found.submit(line.upload(2))
    began = time.monotonic()
    assert not found.settle(lambda: began + 0.5)
    assert [upload.iteration for upload in found.end(0.5)] == [1, 2]
    assert 1.0 <= time.monotonic() - began < 3.0
    line.may.release(2)
    eventually(lambda: line.done == [1])
    time.sleep(0.1)
    assert line.done == [1], "after its end nothing new is begun"


def test_a_long_wait_says_what_it_is_for(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once."""
    monkeypatch.setattr(uploads, "_QUIET_SECONDS", 0.2)
    line, found = Line(), made()
    found.submit(line.upload(1))
    threading.Timer(1.0, line.may.release).start()
    with caplog.at_level(logging.WARNING):
        assert found.settle()
    assert [record.getMessage() for record in caplog.records] == ["waiting until the store has number 1"]

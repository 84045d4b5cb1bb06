"""Progress: lines a log can keep, a bar where somebody looks, nothing from the other workers."""

import io
import os
import pty
from collections.abc import Iterator
from typing import Any

import pytest

from latentac.system.progress import TERMINAL, _Lines, duration, progress, rate


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A pseudo-terminal that `LATENTAC_PROGRESS` names: what is drawn can be read from the first descriptor."""
    main, device = pty.openpty()
    monkeypatch.setenv(TERMINAL, os.ttyname(device))
    yield main, device
    for descriptor in (main, device):
        try:
            os.close(descriptor)
        except OSError:  # the test closed it
            continue


def test_log_gets_a_line_every_ten_seconds_and_not_more() -> None:
    """40 units of 2 s each give a line for every fifth, each with count, share and time left."""
    out, now = io.StringIO(), [0.0]
    lines = _Lines(40, "train", "iterations", out, clock=lambda: now[0])
    for unit in range(40):
        now[0] += 2.0
        lines.set_postfix_str(f"reward {unit}")
        lines.update(1)

    shown = out.getvalue().splitlines()
    assert len(shown) == 8
    assert shown[0] == "train  5/40 [12%]  1m10s left  2.0 s/iteration  reward 4"
    assert shown[-1] == "train  40/40 [100%]  0s left  2.0 s/iteration  reward 39"


def test_log_of_work_without_a_known_end_counts() -> None:
    """An iterator has no length: the line tells what is done and for how long."""
    out, now = io.StringIO(), [0.0]
    lines = _Lines(None, "read", "files", out, clock=lambda: now[0])
    now[0] = 95.0
    lines.update(3)

    assert out.getvalue() == "read  3 files  1m35s  31.7 s/file\n"


def test_what_was_done_before_a_resume_does_not_count_for_the_time_left() -> None:
    """30 of 40 iterations are done already; 2 s each leaves 10 s after five more, not two seconds."""
    out, now = io.StringIO(), [0.0]
    lines = _Lines(40, "train", "iterations", out, done=30, clock=lambda: now[0])
    for _ in range(5):
        now[0] += 2.0
        lines.update(1)

    assert out.getvalue() == "train  35/40 [88%]  10s left  2.0 s/iteration\n"


def test_iterations_that_must_be_done_again_lengthen_the_time_left() -> None:
    """After 6 of 10, training goes back to 4: what the lost ones took still counts for the rate."""
    out, now = io.StringIO(), [0.0]
    lines = _Lines(10, "train", "iterations", out, clock=lambda: now[0])
    for unit in range(7):
        if unit == 6:
            lines.go_back(2)
        now[0] += 3.0
        lines.update(1)

    assert out.getvalue().splitlines()[-1] == "train  4/10 [40%]  18s left  3.0 s/iteration"
    now[0] += 30.0
    lines.update(0)
    assert out.getvalue().splitlines()[-1].startswith("train  5/10 [50%]  36s left")


def test_parts_of_one_work_are_named_and_share_one_time_left() -> None:
    """An arm that costs four evaluations per image moves the bar four times as far."""
    out, now = io.StringIO(), [0.0]
    lines = _Lines(50, "steer", "evaluations", out, clock=lambda: now[0])
    for number, size in enumerate((10, 40), 1):
        lines.set_description_str(f"steer, arm {number} of 2")
        for _ in range(10):
            now[0] += size / 10
            lines.update(size // 10)

    shown = out.getvalue().splitlines()
    assert shown[0] == "steer, arm 1 of 2  10/50 [20%]  40s left  1.0 evaluations/s"
    assert shown[1].startswith("steer, arm 2 of 2  22/50 [44%]  28s left")


@pytest.mark.parametrize(
    ("per_second", "text"),
    [
        (0.3125, "3.2 s/iteration"),
        (1 / 250, "250 s/iteration"),
        (1.0, "1.0 iterations/s"),
        (41.2, "41 iterations/s"),
        (None, ""),
    ],
)
def test_a_rate_reads_as_seconds_where_one_takes_longer(per_second: float | None, text: str) -> None:
    """`s/iteration` above a second, `iterations/s` below, nothing before anything is known."""
    assert rate(per_second, "iterations") == text


def test_the_bar_knows_what_was_done_before_it(terminal: tuple[int, int]) -> None:
    """The share counts what an earlier process did, the time left does not; going back keeps it so."""
    with progress(40, "train", "iterations", done=30) as bar:
        bar.begin("part 1 of 2")
        drawn: Any = bar._display
        drawn._bar.start_t -= 10.0
        drawn._bar.mininterval = 0
        bar.update(5)
        line = str(drawn._bar)
        assert "35/40 iterations [00:10<00:10] 2.0 s/iteration" in line
        assert line.startswith("train, part 1 of 2:  88%")
        bar.go_back(5)
        assert "30/40 iterations [00:10<00:20] 2.0 s/iteration" in str(drawn._bar)


def test_bar_is_drawn_on_the_terminal_that_the_driver_names(
    terminal: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    """stderr is a pipe, and stays clean: the bar goes to the device."""
    assert list(progress(range(3), "train", "iterations")) == [0, 1, 2]

    drawn = os.read(terminal[0], 10_000).decode()
    assert drawn.startswith("\rtrain:   0%")
    assert "0/3" in drawn
    assert capfd.readouterr() == ("", "")


def test_only_rank_0_draws(terminal: tuple[int, int], capfd: pytest.CaptureFixture[str]) -> None:
    """A disabled progress hands the items through and shows nothing anywhere."""
    os.set_blocking(terminal[0], False)
    assert list(progress("ab", "train", disabled=True)) == ["a", "b"]
    with progress(5, "train", disabled=True) as bar:
        bar.update(2)
        bar.note("half")

    with pytest.raises(BlockingIOError):
        os.read(terminal[0], 1)
    assert capfd.readouterr() == ("", "")


def test_work_goes_on_when_the_terminal_is_closed(terminal: tuple[int, int]) -> None:
    """Somebody closes the window of a run that ignores hang-ups: the bar ends, the work does not."""
    with progress(5, "train") as bar:
        for descriptor in terminal:
            os.close(descriptor)
        for _ in range(5):
            bar._display._bar.mininterval = 0  # type: ignore[union-attr]
            bar.update()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (80, "1m20s"), (7500, "2h05m")])
def test_duration_reads_as_a_person_says_it(seconds: float, text: str) -> None:
    """Two units at most."""
    assert duration(seconds) == text

"""Progress: lines a log can keep, a bar where somebody looks, nothing from the other workers."""

import io
import os
import pty
from collections.abc import Iterator

import pytest

from latentac.progress import TERMINAL, _Lines, duration, progress


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
    assert shown[0] == "train  5/40 [12%]  1m10s left  reward 4"
    assert shown[-1] == "train  40/40 [100%]  0s left  reward 39"


def test_log_of_work_without_a_known_end_counts() -> None:
    """An iterator has no length: the line tells what is done and for how long."""
    out, now = io.StringIO(), [0.0]
    lines = _Lines(None, "read", "files", out, clock=lambda: now[0])
    now[0] = 95.0
    lines.update(3)

    assert out.getvalue() == "read  3 files  1m35s\n"


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

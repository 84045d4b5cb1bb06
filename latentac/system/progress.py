"""Progress of long work: a bar where a person looks, a plain line now and then where a log is kept.

A step of the embedded pipeline writes into a pipe that its driver reads line by line, where a redrawn bar would become
a thousand lines. So the driver names its terminal in `LATENTAC_PROGRESS`, and the bar goes straight to that device.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Generic, Self, TextIO, TypeVar, overload

from latentac.system.terminal import printable, raw

TERMINAL = "LATENTAC_PROGRESS"
"""Environment variable: path of a terminal device to draw on (the driver's `os.ttyname(2)`)."""

_LINE_SECONDS = 10.0

Item = TypeVar("Item")


@overload
def progress(
    work: int, description: str, unit: str = "units", *, done: int = 0, disabled: bool = False
) -> "Progress[int]": ...
@overload
def progress(
    work: Iterable[Item], description: str, unit: str = "units", *, done: int = 0, disabled: bool = False
) -> "Progress[Item]": ...
def progress(
    work: Iterable[Any] | int, description: str, unit: str = "units", *, done: int = 0, disabled: bool = False
) -> "Progress[Any]":
    """Follow `work`: something to iterate over, or a number of units, which the caller reports with `update`.

    Draws on the terminal that `LATENTAC_PROGRESS` names, else on stderr if that is a terminal; else prints at most one
    line every 10 seconds to stderr. unit: in the plural. done: units of `work` that an earlier process did; they count
    for the share, not for the rate and the time left. `disabled` is for all workers but rank 0: nothing is shown.
    """
    items = range(work) if isinstance(work, int) else work
    return Progress(items, description, unit, done=done, disabled=disabled)


class Progress(Generic[Item]):
    """A progress display. Iterate over it, or use it as a context manager and call `update`."""

    def __init__(
        self, items: Iterable[Item], description: str, unit: str, *, done: int = 0, disabled: bool = False
    ) -> None:
        self._items, self._description = items, printable(description)
        self._lock = threading.Lock()  # blocks are worked at by several threads
        total = len(items) if isinstance(items, Sized) else None
        self._display = None if disabled else _display(total, self._description, unit, done)

    def update(self, count: int = 1) -> None:
        """`count` more units are done."""
        if self._display is not None:
            with self._lock:
                self._display.update(count)

    def go_back(self, count: int) -> None:
        """`count` units that were done have to be done again. The time that they took still counts for the rate."""
        if self._display is not None:
            with self._lock:
                self._display.go_back(count)

    def begin(self, part: str) -> None:
        """Show that `part` of the work (`arm 7 of 17: resampling 4`) begins; the time left is that of the whole."""
        if self._display is not None:
            self._display.set_description_str(printable(f"{self._description}, {part}" if part else self._description))

    def note(self, text: str) -> None:
        """Show `text` (a few figures) behind the bar."""
        if self._display is not None:
            self._display.set_postfix_str(printable(text))

    def close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Lines:
    """The plain form: at most one line every `every` seconds, none for work shorter than that."""

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str,
        file: TextIO,
        *,
        done: int = 0,
        every: float = _LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._description, self._unit, self._file = total, description, unit, file
        self._every, self._clock = every, clock
        self._done, self._worked, self._note = done, 0, ""
        self._begin = self._printed = clock()

    def update(self, count: int) -> None:
        self._done += count
        self._worked += count
        now = self._clock()
        if now - self._printed >= self._every:
            self._printed = now
            print(self._line(now - self._begin), file=self._file, flush=True)

    def go_back(self, count: int) -> None:
        self._done -= count

    def set_description_str(self, text: str) -> None:
        self._description = text

    def set_postfix_str(self, text: str) -> None:
        self._note = text

    def close(self) -> None:
        pass

    def _line(self, seconds: float) -> str:
        if self._total:
            left = duration(seconds / self._worked * (self._total - self._done)) if self._worked else "?"
            share = f"{self._done}/{self._total} [{self._done / self._total:.0%}]  {left} left"
        else:
            share = f"{self._done} {self._unit}  {duration(seconds)}"
        pace = rate(self._worked / seconds if seconds else None, self._unit)
        return "  ".join(part for part in (self._description, share, pace, self._note) if part)


class _Bar:
    """The drawn form. Owns the file it draws on if it opened it."""

    def __init__(self, total: int | None, description: str, unit: str, file: TextIO, done: int = 0) -> None:
        from tqdm import tqdm  # only here: the plain form must not cost the import

        class Bar(tqdm):
            """tqdm with our rate: its own says `s/ iterations`."""

            @property
            def format_dict(self) -> dict[str, Any]:
                found = dict(super().format_dict)
                # The average over all that this process did; tqdm's moving one jumps where parts differ in cost.
                worked, seconds = found["n"] - found["initial"], found["elapsed"]
                found["rate"] = worked / seconds if worked > 0 and seconds > 0 else None
                return {**found, "pace": rate(found["rate"], unit)}

        self._file = file
        width = os.get_terminal_size(file.fileno()).columns  # 0 where the terminal does not know its size
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} " + unit + " [{elapsed}<{remaining}{postfix}] {pace}"
        if total is None:
            layout = "{desc}: {n_fmt} " + unit + " [{elapsed}{postfix}] {pace}"
        self._bar = Bar(
            total=total,
            desc=description,
            initial=done,
            file=file,
            leave=False,
            mininterval=0.2,
            bar_format=layout,
            dynamic_ncols=width > 0,
            ncols=None if width > 0 else 80,
        )

    def update(self, count: int) -> None:
        try:
            self._bar.update(count)
        except OSError:  # the terminal was closed, and the work goes on
            self._bar.disable = True

    def go_back(self, count: int) -> None:
        self._bar.initial -= count
        self._bar.last_print_n -= count
        self._bar.n -= count

    def set_description_str(self, text: str) -> None:
        self._bar.set_description_str(text, refresh=False)

    def set_postfix_str(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()
        if self._file is not raw(sys.stderr):
            with contextlib.suppress(OSError):
                self._file.close()


def _display(total: int | None, description: str, unit: str, done: int) -> _Lines | _Bar:
    terminal = _terminal()
    if terminal is None:
        return _Lines(total, description, unit, sys.stderr, done=done)
    return _Bar(total, description, unit, terminal, done)


def _terminal() -> TextIO | None:
    name = os.environ.get(TERMINAL)
    if name:
        try:
            device = open(name, "w", encoding="utf-8", opener=_open_device)  # noqa: SIM115 - closed by _Bar
        except OSError:  # the terminal was closed since
            return None
        if device.isatty():
            return device
        device.close()
    stream: TextIO = raw(sys.stderr)
    return stream if stream.isatty() else None


def _open_device(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOCTTY)  # to draw on it is not to be ruled by its Ctrl-C


def rate(per_second: float | None, unit: str) -> str:
    """`3.2 s/iteration` where one takes longer than a second, else `41 images/s`; nothing where it is not known yet.

    unit: in the plural.
    """
    if per_second is None or per_second <= 0:
        return ""
    if per_second < 1:
        seconds = 1 / per_second
        return (
            f"{seconds:.0f} s/{unit.removesuffix('s')}"
            if seconds >= 100
            else f"{seconds:.1f} s/{unit.removesuffix('s')}"
        )
    return f"{per_second:.0f} {unit}/s" if per_second >= 10 else f"{per_second:.1f} {unit}/s"


def duration(seconds: float) -> str:
    """`42s`, `1m20s`, `2h05m`: rounded to what a person waits by."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"

"""What a person sees of an embedded run: one line when a step begins, its own log, one line when it ends.

kfp.local prints everything to stdout: its own records, rules and outputs, and what a step's process writes, indented
by four spaces. `Console` stands in for stdout and keeps of all that what a step wrote between the marked
lines of `latentac.runs.task`; the rest is held back, to be shown only if a step dies before it can say why.
"""

import io
import json
import re
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from latentac.runs.reporting.summary import read_timings
from latentac.runs.task import EVENT_MARK
from latentac.system.progress import duration
from latentac.system.reading import parse_json
from latentac.system.scratch import write_whole
from latentac.system.terminal import EscapingStream

_KFP_INDENT = " " * 4
_KFP_RECORD = re.compile(r"\d\d:\d\d:\d\d(\.\d+)? - [A-Z]+ - |-{20}")
_HELD_LINES = 40


class Console(io.TextIOBase):
    """A text stream for kfp.local to write to; what is to be seen goes to `out`. `optional`: steps that may be skipped.

    Keeps in the file `timings` the wall seconds of each step, `{"steps": {step: seconds}, "total": seconds}`, summed
    over all starts of the run.
    """

    def __init__(self, steps: Sequence[str], out: TextIO, timings: Path, optional: Sequence[str] = ()) -> None:
        self._steps, self._out, self._file, self._optional = list(steps), EscapingStream(out), timings, set(optional)
        before = read_timings(timings)
        self._booked: dict[str, float] = dict(before.get("steps", {}))
        self._total: float = before.get("total", 0.0)
        self._partial, self._held = "", deque[str](maxlen=_HELD_LINES)
        self._since = time.monotonic()
        self.running: str | None = None
        self.finished: dict[str, bool] = {}
        """Step that ended well -> whether it was done already."""
        self.failed: str | None = None
        """The first step that failed, or ended without a word, which shows when a later one begins."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._receive(line)
        return len(text)

    def say(self, line: str) -> None:
        """Print a line of the driver's own. Raises KeyboardInterrupt when nobody reads any more (`... | head`)."""
        try:
            self._out.clear_line()
            self._out.write(f"{line}\n")  # not print: kfp.local replaces that while a step runs
            self._out.flush()
        except BrokenPipeError:  # kfp.local waits for the step after any other error, however long it takes
            raise KeyboardInterrupt from None

    @property
    def held(self) -> list[str]:
        """The last lines that were not shown."""
        return list(self._held)

    def count(self, step: str | None) -> float:
        """Book the wall seconds since the last call on `step` and on the total. Returns them."""
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        self._total += seconds
        if step is not None:
            self._booked[step] = self._booked.get(step, 0.0) + seconds
        write_whole(self._file, json.dumps({"steps": self._booked, "total": self._total}, indent=2))
        return seconds

    def skip(self, step: str) -> None:
        """Tell of a step that need not be started."""
        self.finished[step] = True
        self.say(f"{self._label(step)} done already")

    def table(self) -> list[str]:
        """The steps' seconds, a line each, and the total."""
        rows = []
        for step in self._steps:
            seconds = f"{self._booked.get(step, 0.0):.1f} s" if step in self.finished else "skipped"
            rows.append(f"  {step:<16}{seconds:>10}" + ("  done already" if self.finished.get(step) else ""))
        return [*rows, f"  {'total':<16}{duration(self._total):>10}"]

    def _receive(self, line: str) -> None:
        text, _, encoded = line.partition(EVENT_MARK)
        event = self._event(encoded)
        text = text if event else line  # a prompt may hold anything, the mark too
        if text.strip():
            # Of several lines that a container gives at once, kfp indents the first.
            if self.running is not None and not _KFP_RECORD.match(text):
                self.say(f"      {text.removeprefix(_KFP_INDENT)}")
            else:
                self._held.append(text)
        if event:
            self._follow(event)

    def _event(self, encoded: str) -> dict[str, Any] | None:
        try:
            found = parse_json(encoded)
            return found if found["task"] in self._steps and found["event"] in ("begin", "end", "fail") else None
        except (ValueError, KeyError, TypeError):
            return None

    def _follow(self, event: dict[str, Any]) -> None:
        step, kind = event["task"], event["event"]
        if kind == "begin":
            self._begin(step)
            return
        self.running = None
        if self.failed is None:
            self._held.clear()
        label = self._label(step)
        if kind == "fail":
            self.failed = self.failed or step
            self.count(step)
            self.say(f"{label} failed")
            return
        reused = self.finished[step] = bool(event.get("reused"))
        seconds = self.count(None if reused else step)
        self.say(f"{label} done already" if reused else f"{label} done in {seconds:.1f} s")

    def _begin(self, step: str) -> None:
        before = self._steps[: self._steps.index(step)]
        silent = [name for name in before if name not in self.finished and name not in self._optional]
        if self.failed is None and silent:
            self.failed = silent[0]
            self.count(self.failed)
            self.say(f"{self._label(self.failed)} failed")
        self.running = step
        self.say(self._label(step))

    def _label(self, step: str) -> str:
        return f"[{self._steps.index(step) + 1}/{len(self._steps)}] {step}"

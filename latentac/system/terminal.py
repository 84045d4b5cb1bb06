"""What a process prints: names, prompts and messages come from elsewhere, and must neither steer a terminal nor fail.

A control character or a bidirectional one can repaint what stands above, or show a name as another. `escape_streams`
puts one filter before stdout and stderr of the process, so nothing that prints or logs has to think of it.
"""

import re
import sys
from typing import Any, TextIO

CLEAR_LINE = "\r\x1b[K"
"""Clears the line that the cursor is in, where a progress bar may be drawn."""

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"  # all but \t and \n
)

_MOVES = re.compile(r"\n*(?:\x1b\[A)+")


def printable(text: str) -> str:
    """`text` with its control, bidirectional and surrogate characters as Python writes them: `\\x1b`, `\\u202e`."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


class EscapingStream:
    """A text stream that writes what is `printable`, and escapes what its encoding has not. `raw`: the stream itself,
    for what is meant to steer a terminal.

    The progress bars of libraries get through: a carriage return before all else in a line, where only a bar may stand,
    and the moves to a line of another bar after that.
    """

    def __init__(self, stream: Any) -> None:
        self.raw: TextIO = raw(stream)
        self._begins, self._bar = True, False  # where the next text comes: in an empty line, behind a bar

    def write(self, text: str) -> int:
        if not text:
            return 0
        steering = 0
        if text.startswith("\r") and (self._begins or self._bar):
            steering = 1
        elif self._bar and _MOVES.fullmatch(text):
            steering = len(text)
        self._begins, self._bar = text.endswith("\n"), steering > 0
        encoding = getattr(self.raw, "encoding", None) or "utf-8"
        shown = printable(text[steering:]).encode(encoding, "backslashreplace").decode(encoding)
        self.raw.write(text[:steering] + shown)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def clear_line(self) -> None:
        """Take away a progress bar, if this is a terminal."""
        if self.raw.isatty():
            self.raw.write(CLEAR_LINE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw(stream: Any) -> Any:
    """The stream behind a guarded one; any other is itself."""
    return stream.raw if isinstance(stream, EscapingStream) else stream


def escape_streams() -> None:
    """From here on stdout and stderr of this process are guarded. Call it first, where a process begins."""
    sys.stdout, sys.stderr = EscapingStream(sys.stdout), EscapingStream(sys.stderr)

"""What comes from elsewhere reaches a terminal as text: it steers nothing, and printing it never fails."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from latentac.system.terminal import CLEAR_LINE, EscapingStream, printable

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
HOSTILE = "a\x1b[2J\x9b31m\r\x07\u202eb\u2066\u200f\u061c é 日本 😀"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\n", "plain\ttext\n"),
        ("é 日本 😀 שלום", "é 日本 😀 שלום"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("done\rfailed", "done\\rfailed"),
        ("\x00\x07\x08\x7f\x85\x9b", "\\x00\\x07\\x08\\x7f\\x85\\x9b"),
        ("a\u202eb\u2066c\u061c\u200e", "a\\u202eb\\u2066c\\u061c\\u200e"),
        ("a\u2028b\u2029c\u200f", r"a\u2028b\u2029c\u200f"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_what_steers_a_terminal_is_shown_escaped(text: str, shown: str) -> None:
    """As Python writes it; letters of every language stay."""
    assert printable(text) == shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_printing_fails_in_no_encoding(encoding: str) -> None:
    """What the encoding has not is escaped too."""
    written = io.BytesIO()
    stream = EscapingStream(io.TextIOWrapper(written, encoding=encoding))
    print(HOSTILE + "\ud800", file=stream, flush=True)
    assert not STEERING.search(written.getvalue().decode(encoding).removesuffix("\n"))


def test_a_guard_is_one_guard() -> None:
    """EscapingStream twice, a stream is written to once; and its own sequences get through to a terminal only."""
    plain = io.StringIO()
    stream = EscapingStream(EscapingStream(plain))
    stream.clear_line()
    stream.write("x\x1b")
    assert plain.getvalue() == "x\\x1b"
    plain.isatty = lambda: True  # type: ignore[method-assign]
    stream.clear_line()
    assert plain.getvalue() == f"x\\x1b{CLEAR_LINE}"


def test_bars_of_libraries_are_drawn() -> None:
    """Two at once, whose words are escaped; a return within a line, or a move behind a text, is none of a bar."""
    drawn = io.StringIO()
    stream = EscapingStream(drawn)
    with tqdm(total=2, file=stream, desc="a\x1b[2J", leave=False) as bar, tqdm(total=2, file=stream, desc="b") as below:
        bar.update()
        below.update()
    assert "\x1b[2J" not in drawn.getvalue()
    assert "\ra\\x1b[2J:   0%" in drawn.getvalue()
    assert "\x1b[A" in drawn.getvalue()
    drawn.seek(0)
    drawn.truncate()
    stream.write("done\n")
    stream.write("label: ")
    for text in ("\rfake", "\x1b[A"):
        stream.write(text)
    assert drawn.getvalue() == "done\nlabel: \\rfake\\x1b[A"


DOORS = {
    # What a parser does not know, it repeats as it is; a value that is refused is mostly shown as Python writes it.
    "latentac": (["-m", "latentac.runs.cli", "report", "--run", "a", HOSTILE], 2),
    "pipelines": (["-m", "latentac.pipelines", "run", HOSTILE], 2),
    "the mirror": (["-m", "latentac.store.mirror", "--store", "a", "--prefix", "a", "--to", "a", HOSTILE], 2),
    "the bootstrap": (["-m", "latentac.store.bootstrap", "--store", "a", HOSTILE], 2),
    "the server": (["-m", "latentac.serving", "--model", "a", HOSTILE], 2),
    "a place": (["-m", "latentac.runs.cli", "run", "--resume", "a", "--output", HOSTILE], 2),
    "options": (["-m", "latentac.runs.cli", "report", "--run", HOSTILE], 2),
    "the parser": (["-m", "latentac.runs.cli", HOSTILE], 2),
    "a field": (
        ["-m", "latentac.runs.cli", "config", "show", "--set", f"card.data={HOSTILE[1:3]}", "--config", HOSTILE],
        2,
    ),
    "the pipeline": (["-m", "latentac.pipelines", "run", "--resume", HOSTILE], 2),
    "a sweep": (["-m", "latentac.runs.cli", "sweep", "--name", HOSTILE], 2),
    "a mirror": (["-m", "latentac.store.mirror", "--store", HOSTILE, "--prefix", "a", "--to", "a"], 2),
    "a store": (["-m", "latentac.store.bootstrap", "--store", HOSTILE], 2),
    "a server": (["-m", "latentac.serving", "--model", HOSTILE], 8),
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(("arguments", "code"), DOORS.values(), ids=DOORS)
def test_no_door_lets_it_through(tmp_path: Path, arguments: list[str], code: int, encoding: str) -> None:
    """Each program of this project: one message, its exit code, and no character that steers."""
    words = [os.fsencode(word) for word in arguments]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    output = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode == code, output
    assert "Traceback" not in output
    assert not STEERING.search(output)
    assert not any(tmp_path.iterdir())


def test_a_tracebacks_text_is_guarded_too() -> None:
    """Whoever prints: a log, a bug's traceback, a warning of a library."""
    code = (
        "from latentac.system.terminal import escape_streams; escape_streams()\n"
        "import logging, warnings\n"
        f"logging.warning({HOSTILE!r}); warnings.warn({HOSTILE!r})\n"
        f"raise ValueError({HOSTILE!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    output = done.stderr.decode()
    assert output.count("\\x1b[2J") >= 3
    assert not STEERING.search(output)

"""What is shown of an embedded run, from a stream as kfp.local writes it."""

import io
import json
from pathlib import Path

import pytest

from latentac.pipelines.console import Console
from latentac.runs.task import EVENT_MARK

STEPS = ("prepare", "train")


def event(**fields: object) -> str:
    return f"    {EVENT_MARK}{json.dumps(fields)}\n"


def stream(step: str, log: str, last: str) -> str:
    """One task as kfp.local 2.17 prints it."""
    return (
        f"00:54:30.531 - INFO - Executing task \x1b[96m'{step}'\x1b[0m\n00:54:30.532 - INFO - Streamed logs:\n\n"
        "    [KFP Executor 2026-11-23 00:54:30,632 INFO]: Got executor_input:\n    {\n    }\n"
        f"{event(event='begin', task=step)}{log}{last}"
        "    \n\n00:54:31.223 - INFO - Task finished with status SUCCESS\n" + "-" * 80 + "\n"
    )


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(STEPS, io.StringIO(), tmp_path / "timings.json")


def shown(console: Console) -> list[str]:
    out = console._out.raw
    assert isinstance(out, io.StringIO)
    return out.getvalue().splitlines()


def test_step_is_a_line_at_each_end_and_its_own_log_between(console: Console) -> None:
    """Nothing of kfp's own records, rules and inputs is left."""
    console.write(stream("prepare", "    3 prompts\n", event(event="end", task="prepare", reused=False)))

    first, log, last = shown(console)
    assert (first, log) == ("[1/2] prepare", "      3 prompts")
    assert last.startswith("[1/2] prepare done in ")


def test_what_a_step_says_does_not_steer_the_terminal(console: Console) -> None:
    """Its words are shown with their control characters escaped."""
    console.write(event(event="begin", task="prepare") + "    a \x1b[2J\rb \u202e\n")
    assert shown(console)[-1] == "      a \\x1b[2J\\rb \\u202e"


@pytest.mark.parametrize(
    "expected", ["{", "[" * 100_000, "[]", "{}", '{"task": "x", "event": "end"}', '{"task": [], "event": 1}']
)
def test_a_mark_in_the_words_of_a_step_is_none(console: Console, expected: str) -> None:
    """A prompt may hold it; the line is shown as it is."""
    console.write(event(event="begin", task="prepare") + f"    drawing {EVENT_MARK}{expected}\n")
    assert shown(console)[-1] == f"      drawing {EVENT_MARK}{expected}"
    assert console.running == "prepare"


def test_text_may_arrive_in_any_pieces(console: Console) -> None:
    """kfp prints the indent and the line apart."""
    for letter in stream("prepare", "    a\n      b\n", event(event="end", task="prepare", reused=True)):
        console.write(letter)

    assert shown(console) == ["[1/2] prepare", "      a", "        b", "[1/2] prepare done already"]


def test_what_kfp_says_of_a_failure_is_left_to_the_driver(console: Console) -> None:
    """The step's own lines stay; kfp's record of the failure is held back."""
    begin = event(event="begin", task="prepare")
    console.write(f"{begin}    Killed\n00:54:31 - ERROR - Task 'prepare' finished with status FAILURE\n")

    assert shown(console) == ["[1/2] prepare", "      Killed"]
    assert console.running == "prepare"
    assert "FAILURE" in console.held[-1]


def test_timings_add_up_over_the_starts_of_a_run(tmp_path: Path) -> None:
    """A step that failed and was run again took both times; one that was done already keeps its own."""
    timings = tmp_path / "timings.json"
    timings.write_text(json.dumps({"steps": {"prepare": 2.0, "train": 100.0}, "total": 110.0}))
    console = Console(STEPS, io.StringIO(), timings)
    console.write(stream("prepare", "", event(event="end", task="prepare", reused=True)))
    console.write(stream("train", "", event(event="end", task="train", reused=False)))

    written = json.loads(timings.read_text())
    assert written["steps"]["prepare"] == 2.0
    assert 100.0 < written["steps"]["train"] < 101.0
    assert 110.0 < written["total"] < 111.0
    assert next(row.split() for row in console.table()) == ["prepare", "2.0", "s", "done", "already"]


def test_lines_that_a_container_gives_at_once_are_all_shown(console: Console) -> None:
    """kfp indents only the first of them."""
    console.write(stream("prepare", "    first\nsecond\n  third\n", event(event="end", task="prepare", reused=False)))

    assert shown(console)[1:-1] == ["      first", "      second", "        third"]


def test_step_that_died_without_a_word_is_found_when_a_later_one_begins(tmp_path: Path) -> None:
    """The task at the end runs after a failure too, and must not hide it: neither the name nor what was held back."""
    console = Console(
        ("prepare", "train", "deploy", "finish"), io.StringIO(), tmp_path / "t.json", optional=("deploy",)
    )
    console.write(stream("prepare", "", event(event="end", task="prepare", reused=False)))
    console.write(event(event="begin", task="train") + "    3 images\n00:54:31.223 - INFO - the end of it\n")
    console.write(stream("finish", "", event(event="end", task="finish", reused=False)))

    assert console.failed == "train"
    assert "[2/4] train failed" in shown(console)
    assert "00:54:31.223 - INFO - the end of it" in console.held
    assert "train" not in console.finished


def test_step_that_may_be_skipped_is_no_failure(tmp_path: Path) -> None:
    """The gate said hold: nothing was deployed, and that is a success."""
    console = Console(("gate", "deploy", "finish"), io.StringIO(), tmp_path / "t.json", optional=("deploy",))
    for step in ("gate", "finish"):
        console.write(stream(step, "", event(event="end", task=step, reused=False)))

    assert console.failed is None
    assert [row.split()[1] for row in console.table()[:3]][1] == "skipped"


def test_the_first_failure_stays_the_failure(console: Console) -> None:
    """What fails afterwards, of the same cause perhaps, does not take its place."""
    for step in STEPS:
        console.write(stream(step, "", event(event="fail", task=step, exit_code=3)))

    assert console.failed == "prepare"

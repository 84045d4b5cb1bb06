"""What is shown of an embedded run, from a stream as kfp.local writes it."""

import io
import json
from pathlib import Path

import pytest

from latentac.task import EVENT_MARK
from pipelines.console import Console

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
    out = console._out
    assert isinstance(out, io.StringIO)
    return out.getvalue().splitlines()


def test_step_is_a_line_at_each_end_and_its_own_log_between(console: Console) -> None:
    """Nothing of kfp's own records, rules and inputs is left."""
    console.write(stream("prepare", "    3 prompts\n", event(event="end", task="prepare", reused=False)))

    first, log, last = shown(console)
    assert (first, log) == ("[1/2] prepare", "      3 prompts")
    assert last.startswith("[1/2] prepare done in ")


def test_text_may_arrive_in_any_pieces(console: Console) -> None:
    """kfp prints the indent and the line apart."""
    for letter in stream("train", "    a\n      b\n", event(event="end", task="train", reused=True)):
        console.write(letter)

    assert shown(console) == ["[2/2] train", "      a", "        b", "[2/2] train done already"]


def test_what_kfp_says_of_a_failure_is_left_to_the_driver(console: Console) -> None:
    """The step's own lines stay; kfp's record of the failure is held back."""
    begin = event(event="begin", task="train")
    console.write(f"{begin}    Killed\n00:54:31 - ERROR - Task 'train' finished with status FAILURE\n")

    assert shown(console) == ["[2/2] train", "      Killed"]
    assert console.running == "train"
    assert "FAILURE" in console.held[-1]


def test_timings_add_up_over_the_starts_of_a_run(tmp_path: Path) -> None:
    """A step that failed and was run again took both times; one that was done already keeps its own."""
    timings = tmp_path / "timings.json"
    timings.write_text(json.dumps({"stages": {"prepare": 2.0, "train": 100.0}, "total": 110.0}))
    console = Console(STEPS, io.StringIO(), timings)
    console.write(stream("prepare", "", event(event="end", task="prepare", reused=True)))
    console.write(stream("train", "", event(event="end", task="train", reused=False)))

    written = json.loads(timings.read_text())
    assert written["stages"]["prepare"] == 2.0
    assert 100.0 < written["stages"]["train"] < 101.0
    assert 110.0 < written["total"] < 111.0
    assert next(row.split() for row in console.table()) == ["prepare", "2.0", "s", "done", "already"]

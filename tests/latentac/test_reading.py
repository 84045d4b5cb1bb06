"""JSON and numbers from anywhere: what cannot be used is refused, and nothing else."""

import argparse
import os
import time
from pathlib import Path

import pytest

from latentac.components.cluster import settings
from latentac.config import fields
from latentac.sampling.devices import pick_device
from latentac.system import reading
from latentac.system.errors import ConfigError, IntegrityError, ResourceError
from latentac.system.lifetime import lock_holder, refuse_links
from latentac.system.reading import (
    PORTS,
    SEEDS,
    parse_json,
    read_bytes,
    read_given,
    read_record,
    record,
    seconds,
    whole,
    whole_variable,
)

NO_JSON = {
    "nested lists": "[" * 100_000,
    "nested lists that close": "[" * 100_000 + "]" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "half a character": '{"a": "\\ud800"}',
    "half a character in a key": '{"\\uDFFF": 1}',
    "many digits": "9" * 5000,
    "cut off": '{"a": ',
    "no UTF-8": b"\xff\xfe[",
}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_one_error(text: str | bytes) -> None:
    """Also what Python's reader gives up on, or takes for text that no file can hold."""
    with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
        parse_json(text)
    with pytest.raises(IntegrityError, match="some place: it is not JSON"):
        record(text, "some place")


def test_what_is_json_is_read() -> None:
    """Both halves of a character are one; numbers that JSON lacks are read where this program writes them."""
    assert parse_json('{"a": "\\ud83d\\ude00", "b": [1e3, NaN][0]}'.replace(", NaN][0]", "]")) == {
        "a": "😀",
        "b": [1000.0],
    }
    assert parse_json(b"[[[]]]") == [[[]]]


@pytest.mark.parametrize("text", ["", "nan", "inf", "1e3", "1.0", "-1", "1_000", " 1", "٣", "9" * 5000, "0x1", "1e999"])
@pytest.mark.parametrize("bounds", [SEEDS, PORTS, (1, 1000)])
def test_a_whole_number_is_digits_within_bounds(text: str, bounds: tuple[int, int]) -> None:
    """The message is short, whatever was typed."""
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        whole(*bounds)(text)
    assert len(str(caught.value)) < 200


def test_the_bounds_are_whole_numbers_themselves() -> None:
    """And what is beyond them is not."""
    for least, most in (SEEDS, PORTS, (-5, 5)):
        assert (whole(least, most)(str(least)), whole(least, most)(str(most))) == (least, most)
        for beyond in (least - 1, most + 1):
            with pytest.raises(argparse.ArgumentTypeError):
                whole(least, most)(str(beyond))


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "1e999", "-1", "1e9", "9" * 5000])
def test_a_time_is_finite(text: str) -> None:
    """A wait of NaN or infinite seconds is none. The message is short."""
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        seconds(text)
    assert len(str(caught.value)) < 200
    assert (seconds("0"), seconds("1.5"), seconds("1e3")) == (0.0, 1.5, 1000.0)


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """To which nobody writes."""
    monkeypatch.setattr(reading, "PIPE_SECONDS", 0.3)
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_pipe_that_a_user_names_is_waited_for_within_a_bound(pipe: Path) -> None:
    """As --config and as the settings of a cluster: one message with its name and the seconds."""
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"--config = '{pipe}': cannot be read: no answer within 0.3 s"):
        fields.read_file(pipe)
    with pytest.raises(ConfigError, match=rf"'{pipe}': cannot be read: no answer within 0.3 s"):
        settings.read(pipe)
    assert time.monotonic() - began < 5


def test_a_pipe_that_somebody_writes_to_is_read() -> None:
    """`--config <(...)` of a shell."""
    reader, writer = os.pipe()
    os.write(writer, b"seed: 1")
    os.close(writer)
    try:
        assert read_given(Path(f"/dev/fd/{reader}")) == "seed: 1"
    finally:
        os.close(reader)


def test_a_file_without_an_end_is_read_no_further_than_asked() -> None:
    assert len(read_given(Path("/dev/zero"), 10)) == 10


@pytest.mark.timeout(20)
def test_a_pipe_in_a_runs_folder_is_waited_for_by_nobody(pipe: Path) -> None:
    """A run's folder may be anybody's."""
    with pytest.raises(ValueError, match="is not a regular file"):
        read_bytes(pipe)
    with pytest.raises(IntegrityError, match="is not a regular file"):
        read_record(pipe)
    assert lock_holder(pipe) == ""
    with pytest.raises(ResourceError, match="is neither a file nor a folder"):
        refuse_links(pipe.parent)


def test_a_record_that_is_no_text_is_one_error(tmp_path: Path) -> None:
    """As one that is no JSON."""
    (tmp_path / "record.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(IntegrityError, match="it is not JSON"):
        read_record(tmp_path / "record.json")


@pytest.mark.parametrize("text", ["x", "1.0", "-1", "9" * 30, "1e3", "0x1", "٣", "8"])
def test_a_number_of_the_environment_is_one_message(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the variable, what it says, and the remedy."""
    monkeypatch.setenv("SOME_NUMBER", text)
    with pytest.raises(ConfigError, match=r"^SOME_NUMBER = .*is not a whole number from 0 to 7\. .*unset it"):
        whole_variable("SOME_NUMBER", 0, 7, 1)


@pytest.mark.parametrize(("text", "value"), [("", 1), (" ", 1), ("7", 7), (" 3\n", 3)])
def test_a_variable_that_says_nothing_is_the_default(text: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """White space around it does not count."""
    monkeypatch.setenv("SOME_NUMBER", text)
    assert whole_variable("SOME_NUMBER", 0, 7, 1) == value
    monkeypatch.delenv("SOME_NUMBER")
    assert whole_variable("SOME_NUMBER", 0, 7, 1) == 1


def test_a_gpu_that_is_not_there_is_reported_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an agent of workers set may still stand in a shell."""
    for text in ("two", "9999", "-1"):
        monkeypatch.setenv("LOCAL_RANK", text)
        with pytest.raises(ConfigError, match=f"^LOCAL_RANK = '{text}'"):
            pick_device("cuda")
        assert pick_device("cpu").type == "cpu"

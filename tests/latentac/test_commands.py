"""Commands that are printed can be typed: by the name that leads to this installation, with what is not default."""

import shlex
import sys
from pathlib import Path

import pytest

from latentac.system.commands import program, typed


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, an environment in it that holds the program, and a PATH without any."""
    program = tmp_path / ".venv" / "bin" / "latentac"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", "/nonexistent")
    return tmp_path


def test_the_program_is_found_where_it_is(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path from the working folder, or in full; by name where PATH leads to this very one, not to another."""
    assert program() == ".venv/bin/latentac"
    (elsewhere / "a folder").mkdir()
    monkeypatch.chdir(elsewhere / "a folder")
    assert program() == str(elsewhere / ".venv/bin/latentac")
    monkeypatch.setenv("PATH", str(elsewhere / ".venv" / "bin"))
    assert program() == "latentac"
    other = elsewhere / "other" / "latentac"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    assert program() == str(elsewhere / ".venv/bin/latentac")


def test_without_an_environment_of_its_own_the_module_is_called(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package on a path has no program; where another one is on PATH, that is the name."""
    monkeypatch.setattr(sys, "prefix", str(elsewhere))
    assert program() == "python -m latentac.runs.cli"


def test_places_are_named_where_they_are_not_the_default(elsewhere: Path) -> None:
    """The same folder by another path is the default; words with spaces stay one."""
    here = Path.cwd()
    assert typed("serve", "first", "", "runs") == ".venv/bin/latentac serve --run first"
    assert typed("serve", "first", f"file://{here}/runs/store", str(here / "runs")).endswith("serve --run first")
    full = typed("gate", "first", "s3://models/demo", "my runs", "--set", "gate.floors={a: 1}")
    expected = ["gate", "--run", "first", "--output", "my runs", "--store", "s3://models/demo", "--set"]
    assert shlex.split(full)[1:] == [*expected, "gate.floors={a: 1}"]

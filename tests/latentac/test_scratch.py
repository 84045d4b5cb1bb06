"""Where temporary files go when TMPDIR will not do: elsewhere, with a line that says so, or a message that names it."""

import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentac.system import scratch
from latentac.system.errors import ResourceError
from latentac.system.scratch import MAX_PATH_BYTES, temporary_files, write_whole

USUAL = "/tmp"  # noqa: S108 - where they go instead


@pytest.fixture
def tiny() -> Iterator[Path]:
    """A real file system of 256 KiB at a short path."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    with tempfile.TemporaryDirectory(dir=USUAL) as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def lies_in(folder: Path, place: str) -> bool:
    return str(folder).startswith(f"{place}/latentac-")


def test_a_folder_that_will_do_is_used_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For this process and its children; afterwards all is as it was, and nothing is left there."""
    with tempfile.TemporaryDirectory(dir=USUAL) as mine:
        monkeypatch.setenv("TMPDIR", mine)
        before = tempfile.tempdir
        with temporary_files(Path("/none")) as folder:
            assert lies_in(folder, mine)
            assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(folder)
        assert (os.environ["TMPDIR"], tempfile.tempdir) == (mine, before)
        assert os.listdir(mine) == []
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["missing", "a file", "read-only", "tiny", "full", "long"])
def test_a_folder_that_will_not_do_is_done_without(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """One line says why, and where the files go instead."""
    wanted, words = tmp_path / "x", "is not a folder"
    if kind == "a file":
        wanted.touch()
    elif kind == "long":
        wanted, words = tmp_path / ("x" * 200), f"more than {MAX_PATH_BYTES} bytes"
        wanted.mkdir()
    elif kind == "read-only":
        wanted, words = Path("/proc/self"), "cannot be written to"
    elif kind in ("tiny", "full"):
        wanted, words = request.getfixturevalue("tiny"), "MiB free" if kind == "tiny" else "cannot be written to"
        if kind == "full":
            (wanted / "all").write_bytes(b"x" * 256 * 1024)
    monkeypatch.setenv("TMPDIR", str(wanted))
    if kind in ("missing", "a file"):
        monkeypatch.setattr(scratch, "MAX_PATH_BYTES", 4096)  # pytest's own folders are long
    with caplog.at_level(logging.WARNING), temporary_files(tmp_path) as folder:
        assert lies_in(folder, USUAL)
    assert f"TMPDIR = {wanted} " in caplog.text
    assert words in caplog.text
    assert caplog.text.rstrip().endswith(f"temporary files go to {USUAL}")


def test_the_runs_own_folder_is_the_last_resort(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However long its path; where there is no room in it either, the message names TMPDIR and every place."""
    monkeypatch.setenv("TMPDIR", str(tiny))
    monkeypatch.setattr(scratch, "_USUAL", (str(tiny),))
    with caplog.at_level(logging.WARNING), temporary_files(tmp_path) as folder:
        assert lies_in(folder, str(tmp_path))
    assert str(tmp_path) in caplog.text
    with pytest.raises(ResourceError) as caught, temporary_files(tiny / "runs"):
        pass
    assert str(caught.value).startswith("TMPDIR: ")
    assert f"{tiny} has only 0.2 MiB free" in str(caught.value)
    assert f"{tiny}/runs is not a folder" in str(caught.value)


def test_the_folder_of_a_killed_process_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """It says whose it is. A path that a file or a link names may be anybody's."""
    own, mine = tmp_path / "run" / "kfp", tmp_path / "documents"
    own.mkdir(parents=True)
    mine.mkdir()
    (mine / "letter").touch()
    with temporary_files(own) as folder:
        abandoned = folder.rename(tmp_path / "latentac-abandoned")
    (tmp_path / "link").symlink_to(abandoned)
    for place in (mine, tmp_path / "link", tmp_path / "nothing"):
        scratch.remove_abandoned(place, own)
    scratch.remove_abandoned(abandoned, tmp_path / "another-run" / "kfp")
    assert (mine / "letter").exists()
    assert abandoned.is_dir()
    scratch.remove_abandoned(abandoned, own)
    assert not abandoned.exists()


def test_a_file_is_written_whole_and_through_no_link(tmp_path: Path) -> None:
    """A link in its place is replaced, whether it leads somewhere or not; nothing else is left there."""
    (tmp_path / "letter").write_text("mine")
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.json").symlink_to(tmp_path / "letter")
    (own / "b.json").symlink_to(tmp_path / "nothing")
    for name in ("a.json", "b.json", "c.json"):
        scratch.write_whole(own / name, "ours")
    assert {path.name: path.read_text() for path in own.iterdir()} == dict.fromkeys(
        ("a.json", "b.json", "c.json"), "ours"
    )
    assert not any(path.is_symlink() for path in own.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter", "own"]
    assert (tmp_path / "letter").read_text() == "mine"


def test_a_link_in_the_place_of_our_own_folder_is_refused(tmp_path: Path) -> None:
    """Neither emptied nor written through."""
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").touch()
    (tmp_path / "kfp").symlink_to(tmp_path / "documents")
    with pytest.raises(ResourceError, match=r"is a link to .*documents"):
        scratch.empty_folder(tmp_path / "kfp")
    assert os.listdir(tmp_path / "documents") == ["letter"]


def test_a_link_among_what_killed_processes_left_is_not_followed(tmp_path: Path) -> None:
    """What it leads to stays; a folder goes."""
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "letter").touch()
    own = tmp_path / "own"
    (own / ".latentac-train-a").mkdir(parents=True)
    (own / ".latentac-train-b").symlink_to(tmp_path / "documents")
    scratch.remove_hidden(own)
    assert not (own / ".latentac-train-a").exists()
    assert (tmp_path / "documents" / "letter").exists()


def test_a_file_is_written_whole_or_not_at_all(tiny: Path) -> None:
    """On a full disk what was there before is there still, and nothing beside it takes the room that is left."""
    (tiny / "report.html").write_text("before")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tiny / "report.html", "x" * 2**20)
    assert {path.name: path.read_text() for path in tiny.iterdir()} == {"report.html": "before"}
    write_whole(tiny / "report.html", "after é")
    write_whole(tiny / "image.png", b"\x89PNG")
    assert (tiny / "report.html").read_text(encoding="utf-8") == "after é"
    assert sorted(path.name for path in tiny.iterdir()) == ["image.png", "report.html"]


def test_what_stands_in_for_the_file_meanwhile_is_no_link(tmp_path: Path) -> None:
    """Where others write too, somebody may have put one there."""
    (tmp_path / f".latentac-a.{os.getpid()}").symlink_to(tmp_path / "outside")
    write_whole(tmp_path / "a", "mine")
    assert not (tmp_path / "outside").exists()
    assert (tmp_path / "a").read_text() == "mine"

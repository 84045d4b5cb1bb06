"""Code of one's own: packed the same each time, bounded, never from outside the folder, importable elsewhere."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from latentac.runs.cli import main
from latentac.runs.package import MAX_INLINE_BYTES, digest, inline, make_importable, pack, read, unpack
from latentac.system.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package with a module, data, and what is not to be shipped."""
    package = tmp_path / "mine"
    for name, text in (
        ("__init__.py", ""),
        ("rewards.py", "ANSWER = 42\n"),
        ("data/words.txt", "red"),
        (".git/config", "secret"),
        ("__pycache__/rewards.pyc", "x"),
        ("venv/pyvenv.cfg", "home"),
        ("venv/lib/large.py", "x"),
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


def names(data: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(data)).namelist()


def test_a_package_is_packed_under_its_name_and_the_same_each_time(folder: Path) -> None:
    """Whatever the files' times; without hidden files, bytecode and environments."""
    data = pack(folder)
    assert names(data) == ["mine/__init__.py", "mine/data/words.txt", "mine/rewards.py"]
    os.utime(folder / "rewards.py", (1, 1))
    assert digest(pack(folder)) == digest(data)
    (folder / "rewards.py").write_text("ANSWER = 43\n")
    assert digest(pack(folder)) != digest(data)


@pytest.mark.parametrize("named", [True, False], ids=["__init__.py", "modules"])
def test_a_folder_is_imported_under_its_name(folder: Path, tmp_path: Path, named: bool) -> None:
    """With and without `__init__.py`, from another working directory; what was packed comes before a folder of that
    name there. Modules without a package can be imported by their own names, too."""
    if not named:
        (folder / "__init__.py").unlink()
    elsewhere, there = tmp_path / "elsewhere", tmp_path / "there"
    (elsewhere / "mine").mkdir(parents=True)
    (elsewhere / "mine" / "rewards.py").write_text("ANSWER = 0\n")
    unpack(pack(folder), there)
    for make in (f"make_unpacked_importable(Path({str(there)!r}))", f"use_in_place(Path({str(folder)!r}))"):
        code = f"from pathlib import Path; from latentac.runs.package import *; {make}; import mine.rewards as r; "
        code += "print(r.ANSWER)" if named else "import rewards; print(r.ANSWER, rewards.ANSWER)"
        done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["42"] * (1 if named else 2), done.stderr


def test_what_was_packed_can_be_imported_where_it_is_unpacked(folder: Path, tmp_path: Path) -> None:
    """Also by processes that are started then, whatever their working directory; it comes as text, too."""
    unpack(read(inline(pack(folder))), tmp_path / "there")
    script = (
        f"from pathlib import Path; from latentac.runs.package import make_importable\n"
        f"make_importable(Path({str(tmp_path / 'there')!r}))\n"
        "import subprocess, sys, mine.rewards\n"
        "there = 'import mine.rewards; print(mine.rewards.ANSWER)'\n"
        "subprocess.run([sys.executable, '-c', there], cwd='/', check=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_making_a_folder_importable_twice_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may open its run again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    make_importable(tmp_path)
    before = list(sys.path), os.environ["PYTHONPATH"]
    make_importable(tmp_path)
    assert (list(sys.path), os.environ["PYTHONPATH"]) == before
    assert before[1].split(os.pathsep) == [str(tmp_path), "/elsewhere"]


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """Its target is not the package's."""
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ConfigError, match="leads out of the folder"):
        pack(folder)


@pytest.mark.parametrize("given", ["no/such/folder", "zip:%%%", "x" * 300, "a\0b"])
def test_what_cannot_be_read_is_refused(given: str) -> None:
    """With the option's name."""
    with pytest.raises(ConfigError, match="--package"):
        read(given)


@pytest.mark.parametrize("name", ["none", "x" * 300, "mine.py"])
def test_a_folder_that_is_none_is_refused_where_settings_are_shown(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a run is prepared: a typing error would show the settings of another module of that name, or none."""
    (tmp_path / "mine.py").touch()
    assert main(["config", "show", "--package", str(tmp_path / name)]) == 2
    output = capsys.readouterr()
    assert "is not a folder" in output.err
    assert output.out == ""


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """Nothing in it can be meant."""
    with pytest.raises(ConfigError, match="holds no files"):
        pack(tmp_path)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a\\..\\x"])
def test_an_archive_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    """Nothing is written beside the folder."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr(name, "x")
    with pytest.raises(ConfigError, match="leads out"):
        unpack(archive.getvalue(), tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["there"])


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    """And what is too large to be a parameter of a step."""
    with pytest.raises(ConfigError, match="is not a readable zip archive"):
        unpack(b"PK", tmp_path)
    with pytest.raises(ConfigError, match="image of your own"):
        inline(os.urandom(MAX_INLINE_BYTES))


def archive(*entries: tuple[str, str]) -> bytearray:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in entries:
            packed.writestr(*entry)
    return bytearray(made.getvalue())


def patched(at: int, value: int) -> bytearray:
    """An archive of one file with another byte in both of its descriptions: `at` in the first, two further on in the
    second."""
    made = archive(("a.py", "x" * 100))
    made[at], made[made.find(b"PK\x01\x02") + at + 2] = value, value
    return made


def damaged() -> bytearray:
    made = archive(("a.py", "x" * 100))
    made[34:36] = b"\xff" * 2  # where its data begins
    return made


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (patched(6, 1), "encrypted"),
        (patched(8, 99), "compression method"),
        (damaged(), "is not a readable zip archive"),
        (archive(("a", "1"), ("a/b", "2")), "is a file and a folder"),
        (archive(("a/b", "1"), ("a", "2")), "is a file and a folder"),
    ],
)  # fmt: skip
def test_an_archive_that_cannot_be_unpacked_is_one_error(data: bytearray, expected: str, tmp_path: Path) -> None:
    """Whatever the library raises of it."""
    with pytest.raises(ConfigError, match=expected):
        unpack(bytes(data), tmp_path / "there")


def test_links_in_a_circle_are_no_files(tmp_path: Path) -> None:
    """As little as a link to nothing."""
    (tmp_path / "a.py").symlink_to(tmp_path / "b.py")
    (tmp_path / "b.py").symlink_to(tmp_path / "a.py")
    (tmp_path / "c.py").touch()
    (tmp_path / "d.py").symlink_to(tmp_path / "nothing")
    assert names(pack(tmp_path)) == [f"{tmp_path.name}/c.py"]


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """A zip archive holds names in UTF-8."""
    (tmp_path / os.fsdecode(b"\xff.py")).write_text("x = 1")
    with pytest.raises(ConfigError, match="has a name that is not UTF-8"):
        pack(tmp_path)


def test_code_that_changed_since_prepare_is_named(tmp_path: Path) -> None:
    """A class outside of a package is the file as it is now: a step warns if that is not the file of `prepare`."""
    reward = tmp_path / "mine.py"
    reward.write_text(
        "class Bright:\n    def __call__(self, images, prompts):\n        return images.mean((1, 2, 3))\n"
    )
    given = ["--set", "rewards=[{use: 'mine:Bright'}]", "--set", "gate.reward=Bright"]
    prepare = [
        "-c",
        "import sys; from latentac.runs.cli import main; sys.exit(main())",
        "prepare",
        "--run",
        "r",
        "--recipe",
        "shapes-unet-smoke",
        "--output",
        "out",
        *given,
    ]
    score = "from latentac.runs.workspace import open_run; open_run('r', '', 'out').rewards()"

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": f".:{Path.cwd()}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    run(*prepare)
    assert "has changed" not in run("-c", score)
    reward.write_text(reward.read_text() + "# better\n")
    assert "mine:Bright: its code has changed since the run was prepared" in run("-c", score)

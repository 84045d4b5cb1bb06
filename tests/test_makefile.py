"""What `make` is called with reaches the programs as it was written: spaces, brackets, quotes and all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentac.config.fields import read_overrides, split

ROOT = Path(__file__).resolve().parent.parent


def called(folder: Path, *arguments: str) -> list[str]:
    """The words that `make` hands to Python, or to `latentac`; what is not written down yet is not installed for it."""
    show = folder / "bin" / "latentac"
    show.parent.mkdir(exist_ok=True)
    show.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    show.chmod(0o755)
    command = ["make", "-o", f"{folder}/.installed", *arguments, f"PY={show}", f"VENV={folder}"]
    clean = {name: value for name, value in os.environ.items() if name not in ("SET", "OUTPUT", "RUN", "STORE", "SEED")}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    words: list[str] = json.loads(done.stdout)
    return words


@pytest.mark.parametrize(
    ("target", "words"), [("run", ["run"]), ("run-containers", ["run", "--containers"])], ids=["run", "run-containers"]
)
def test_set_comes_whole(tmp_path: Path, target: str, words: list[str]) -> None:
    """However it is written, it is one word; `latentac.config.fields.split` takes it apart."""
    value = 'rewards=[{name: a, weight: 1}, {name: "it\'s b"}] seed=3'
    assert called(tmp_path, target, f"SET={value}") == [*words, "--set", value]


def test_every_other_value_comes_whole_too(tmp_path: Path) -> None:
    """Paths with spaces and quotes, as a run's own last lines print them."""
    odd = 'my run\'s "folder"'
    given = [f"OUTPUT={odd}", f"CONFIG={odd}", f"STORE=file://{odd}", f"PACKAGE={odd}", f"RESUME={odd}"]
    words = called(tmp_path, "run", "SEED=1", "PROJECT=mine", *given)
    assert words == ["run", "--seed", "1", "--config", odd, "--project", "mine", "--package", odd,
                     "--output", odd, "--store", f"file://{odd}", "--resume", odd]  # fmt: skip
    assert called(tmp_path, "bench-steering", f"RUN={odd}")[-2:] == ["--run", odd]
    assert called(tmp_path, "bench-gpu", "MODELS=sd15 sd35m", "BUDGET=60", "SET=a.b=1 c=2", "DRY=1")[1:] == [
        "benchmarks.gpu", "--models", "sd15 sd35m", "--seconds", "60", "--set", "a.b=1 c=2", "--dry-run",
    ]  # fmt: skip
    assert called(tmp_path, "evidence", "ONLY=main critic")[-2:] == ["--only", "main critic"]
    released = called(
        tmp_path, "release-images", "IMAGES=train serve", "PREFIX=r.example", f"COSIGN_KEY={odd}", "TLOG=no"
    )
    assert released[1:] == ["images.publish", "train", "serve", "--prefix", "r.example", "--key", odd, "--log", "no"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed=3", ["seed=3"]),
        ("  seed=3\n train.num_iterations=8\t", ["seed=3", "train.num_iterations=8"]),
        ("rewards=[{name: a, weight: 1}, {name: b}] seed=3", ["rewards=[{name: a, weight: 1}, {name: b}]", "seed=3"]),
        ("a={x: [1, 2], y: {z: 3}} b=1", ["a={x: [1, 2], y: {z: 3}}", "b=1"]),
        ('a="x y=1" b=2', ['a="x y=1"', "b=2"]),
        ("a='it''s x=1' b=2", ["a='it''s x=1'", "b=2"]),
        (r'a="say \" x=1" b=2', [r'a="say \" x=1"', "b=2"]),
        ("a=[\"] x=1\", '} y=2'] b=2", ["a=[\"] x=1\", '} y=2']", "b=2"]),
        ("a=don't b=isn't", ["a=don't", "b=isn't"]),
        ("prompts.source=/my prompts/a b.json seed=3", ["prompts.source=/my prompts/a b.json", "seed=3"]),
        ("'rewards=[{name: a, weight: 1}]' \"seed=3\"", ["rewards=[{name: a, weight: 1}]", "seed=3"]),
        ("a=[1, b=2", ["a=[1, b=2"]),
        ("", []),
    ],
)
def test_assignments_are_parted_at_white_space_that_belongs_to_no_value(text: str, parts: list[str]) -> None:
    """Brackets and quotes hold together; so does a value with spaces that no `path=` follows."""
    assert split(text) == parts


def test_several_assignments_in_one_are_read() -> None:
    """The same for `--set` and for SET."""
    read = read_overrides(["rewards=[{name: a, weight: 1.5}, {name: b}] seed=3", "train.num_workers=2"])
    assert read == {
        "rewards": [{"name": "a", "weight": 1.5}, {"name": "b"}], "seed": 3, "train": {"num_workers": 2}
    }  # fmt: skip

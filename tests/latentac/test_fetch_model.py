"""`latentac fetch-model`: a published model, verified, in a folder that may be a mount."""

import json
import shutil
from pathlib import Path

import pytest

from latentac.cli import main
from latentac.release import UNFINISHED, fetch_version
from latentac.store import Store, open_store

FILES = {
    "latentac.json": json.dumps(
        {
            "schema": 3,
            "version": "v1",
            "run": "some-run",
            "backbone": {"use": "unet"},
            "kernel": {"use": "ddim"},
            "size": [32, 32],
            "policies": ["trained"],
            "rewards": [{"name": "shapes_verifier", "weight": 1.0, "unit": ""}],
            "examples": [],
            "methods": {},
            "default_method": "none",
            "limits": {"max_images": 8},
            "batching": {},
        }
    ),
    "model_index.json": "{}",
    "critic/config.json": "{}",
    "unet/weights.bin": "weights",
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = open_store(f"file://{tmp_path}/store")
    for path, text in FILES.items():
        (tmp_path / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / path).write_text(text)
    opened.publish("models/v1", tmp_path / "model", run="some-run", step="deploy", config_hash="0")
    opened.publish("models/other", tmp_path / "model" / "unet", run="some-run", step="deploy", config_hash="0")
    return opened


def found(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exists", [False, True])
def test_folder_is_filled(store: Store, tmp_path: Path, exists: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is not there and one that is there and empty; the folder itself stays, for it may be a mount; again
    changes nothing."""
    target = tmp_path / "to"
    if exists:
        target.mkdir()
        inode = target.stat().st_ino
    assert main(["fetch-model", "--version", "v1", "--store", store.url, "--to", str(target)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["key"], told["files"], told["bytes"]) == ("models/v1", 4, sum(map(len, FILES.values())))
    assert found(target) == FILES
    if exists:
        assert target.stat().st_ino == inode
    before = (target / "unet" / "weights.bin").stat().st_ino
    fetch_version("v1", store.url, target)
    assert (target / "unet" / "weights.bin").stat().st_ino == before


def test_folder_that_a_killed_call_left_is_filled_anew(store: Store, tmp_path: Path) -> None:
    """What stands beside its marker is its own, whole or not."""
    target = tmp_path / "to"
    (target / UNFINISHED / "model").mkdir(parents=True)
    (target / "unet").mkdir()
    (target / "unet" / "weights.bin").write_text("wei")
    fetch_version("v1", store.url, target)
    assert found(target) == FILES


def test_other_files_are_never_touched(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds anything else is refused, with exit code 6."""
    target = tmp_path / "to"
    target.mkdir()
    (target / "mine").write_text("mine")
    assert main(["fetch-model", "--version", "v1", "--store", store.url, "--to", str(target)]) == 6
    assert "is not the artifact models/v1" in capsys.readouterr().err
    assert found(target) == {"mine": "mine"}


def test_what_is_wrong_is_told(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No such version: 3; a damaged file: 4, and nothing arrives; an artifact that is no model: 8."""

    def code(version: str) -> int:
        shutil.rmtree(tmp_path / "to", ignore_errors=True)
        return main(["fetch-model", "--version", version, "--store", store.url, "--to", str(tmp_path / "to")])

    assert code("v0") == 3
    assert "nothing was published there" in capsys.readouterr().err
    assert code("other") == 8
    assert "is no exported model" in capsys.readouterr().err
    stored = tmp_path / "store" / store.manifest("models/v1").folder / "unet" / "weights.bin"
    stored.write_text("Weights")
    assert code("v1") == 4
    assert "unet/weights.bin: expected size 7" in capsys.readouterr().err
    assert set(found(tmp_path / "to")) <= {UNFINISHED}

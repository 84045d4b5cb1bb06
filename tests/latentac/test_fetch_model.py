"""`latentac fetch-model`: a published model, verified, in a folder that may be a mount."""

import json
import shutil
from pathlib import Path

import pytest

from latentac.runs.cli import main
from latentac.runs.release.deploy import UNFINISHED, fetch_version
from latentac.store import Store, open_store
from latentac.system.errors import ResourceError, StoreError

FILES = {
    "latentac.json": json.dumps(
        {
            "schema": 4,
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
    output = json.loads(capsys.readouterr().out)
    assert (output["key"], output["files"], output["bytes"]) == ("models/v1", 4, sum(map(len, FILES.values())))
    assert found(target) == FILES
    if exists:
        assert target.stat().st_ino == inode
    before = (target / "unet" / "weights.bin").stat().st_ino
    fetch_version("v1", store.url, target)
    assert (target / "unet" / "weights.bin").stat().st_ino == before


def test_folder_that_a_killed_call_left_is_completed(store: Store, tmp_path: Path) -> None:
    """Each part of the model was moved there whole or not at all."""
    target = tmp_path / "to"
    fetch_version("v1", store.url, target)
    (target / UNFINISHED).mkdir()
    (target / "unet").rename(target / UNFINISHED / "unet")
    fetch_version("v1", store.url, target)
    assert found(target) == FILES


@pytest.mark.parametrize("name", ["mine", "unet/weights.bin", "unet/mine"])
def test_the_marker_of_a_killed_call_gives_no_right_to_other_files(store: Store, tmp_path: Path, name: str) -> None:
    """Files that are not of the model, or not as the model has them, stay as they are and are named."""
    target = tmp_path / "to"
    (target / UNFINISHED).mkdir(parents=True)
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    with pytest.raises(ResourceError):
        fetch_version("v1", store.url, target)
    assert found(target)[name] == "mine"
    if name == "mine":
        assert sorted(path.name for path in target.iterdir()) == [UNFINISHED, "mine"], "nothing was put beside it"


def test_a_link_in_the_place_of_a_part_is_not_replaced(store: Store, tmp_path: Path) -> None:
    """Also one that leads nowhere."""
    target = tmp_path / "to"
    (target / UNFINISHED).mkdir(parents=True)
    (target / "latentac.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises((ResourceError, StoreError)):
        fetch_version("v1", store.url, target)
    assert (target / "latentac.json").is_symlink()
    assert not (tmp_path / "nowhere").exists()


def test_the_root_of_a_volume_is_filled(store: Store, tmp_path: Path) -> None:
    """A new file system has a folder of its own there. Again changes nothing."""
    (tmp_path / "to" / "lost+found").mkdir(parents=True)
    for _ in range(2):
        fetch_version("v1", store.url, tmp_path / "to")
        assert found(tmp_path / "to") == FILES


def test_a_marker_that_is_a_link_is_not_followed(store: Store, tmp_path: Path) -> None:
    """What it points to stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / UNFINISHED).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError, match="is a link"):
        fetch_version("v1", store.url, tmp_path / "to")
    assert found(tmp_path / "elsewhere") == {"mine": "mine"}


def test_other_files_are_never_touched(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds anything else is refused, with exit code 6."""
    target = tmp_path / "to"
    target.mkdir()
    (target / "mine").write_text("mine")
    assert main(["fetch-model", "--version", "v1", "--store", store.url, "--to", str(target)]) == 6
    assert "is not the artifact models/v1" in capsys.readouterr().err
    assert found(target) == {"mine": "mine"}


def test_what_is_wrong_is_reported(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No such version: 3; a damaged file: 4, and nothing arrives; an artifact that is not a model: 8."""

    def code(version: str) -> int:
        shutil.rmtree(tmp_path / "to", ignore_errors=True)
        return main(["fetch-model", "--version", version, "--store", store.url, "--to", str(tmp_path / "to")])

    assert code("v0") == 3
    assert "nothing was published there" in capsys.readouterr().err
    assert code("other") == 8
    assert "is not an exported model" in capsys.readouterr().err
    stored = tmp_path / "store" / store.manifest("models/v1").folder / "unet" / "weights.bin"
    stored.write_text("Weights")
    assert code("v1") == 4
    assert "unet/weights.bin: expected size 7" in capsys.readouterr().err
    assert set(found(tmp_path / "to")) <= {UNFINISHED}


def test_a_model_whose_description_is_out_of_bounds_does_not_arrive(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused as a server would refuse it, with exit code 8 and the field."""
    described = json.loads(FILES["latentac.json"]) | {"batching": {"batch_rows": 10**9}}
    (tmp_path / "model" / "latentac.json").write_text(json.dumps(described))
    store.publish("models/huge", tmp_path / "model", run="some-run", step="deploy", config_hash="0")
    assert main(["fetch-model", "--version", "huge", "--store", store.url, "--to", str(tmp_path / "to")]) == 8
    assert "batching.batch_rows" in capsys.readouterr().err
    assert set(found(tmp_path / "to")) <= {f"{UNFINISHED}/model/{name}" for name in FILES}

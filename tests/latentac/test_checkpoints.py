"""A training that is hurt goes on from its newest checkpoint that is sound, and ends with the weights of one that
nothing happened to."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from latentac.runs.failures import ATTEMPT
from latentac.runs.workspace import open_run
from latentac.store import Manifest, Store, open_store
from latentac.store.manifest import describe
from tests.latentac.extensions import Eventful
from tests.latentac.workers import RUN, prepared, train_here, trained_weights

LOSSES = 4
"""In an iteration."""

SETTINGS = (
    "algorithm.use=tests.latentac.extensions:Eventful",
    "train.num_iterations=4",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=3",
)
LAST, BEFORE = f"checkpoints/{RUN}/000003", f"checkpoints/{RUN}/000002"


class Crash(RuntimeError):
    """Something that nobody expects."""


def crash() -> None:
    raise Crash


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    yield
    Eventful.events, Eventful.calls = {}, 0


@pytest.fixture(scope="module")
def prototypes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A run that crashed in its fourth iteration, and the weights of one that did not."""
    folder, patch = tmp_path_factory.mktemp("prototype"), pytest.MonkeyPatch()
    with patch.context():
        prepared(folder, *SETTINGS)
        shutil.copytree(folder, folder.with_name("whole"))
        assert train_here(folder.with_name("whole"), patch) == (0, "")
        weights = trained_weights(open_run(RUN, "", str(folder.with_name("whole"))))
        Eventful.events, Eventful.calls = {3 * LOSSES + 1: crash}, 0
        with pytest.raises(Crash):
            train_here(folder, patch)
        Eventful.events, Eventful.calls = {}, 0
    yield folder, weights
    patch.undo()


@pytest.fixture
def crashed(prototypes: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A copy of it, whose files are no links to each other: the store and the working folder are on other disks."""
    shutil.copytree(prototypes[0], tmp_path / "runs")
    return tmp_path / "runs"


def goes_on(folder: Path, patch: pytest.MonkeyPatch, weights: dict[str, str], store: str = "") -> int:
    """The iteration from which the run in `folder` goes on, to the same end as a whole one."""
    Eventful.calls = 0
    assert train_here(folder, patch, store) == (0, "")
    done, rest = divmod(Eventful.calls, LOSSES)
    assert rest == 0
    space = open_run(RUN, store, str(folder))
    assert trained_weights(space) == weights
    assert not (folder / RUN / "checkpoints").exists(), "the training is over"
    assert len(space.store.keys(f"checkpoints/{RUN}")) == 3
    return 4 - done


def here(folder: Path, iteration: int) -> Path:
    return folder / RUN / "checkpoints" / f"{iteration:06d}"


def only_in_the_store(folder: Path) -> None:
    shutil.rmtree(folder / RUN / "checkpoints")


def only_here(folder: Path) -> None:
    """As if the third one had not been uploaded."""
    store = open_store(f"file://{folder}/store")
    store.delete(LAST)
    store.write_json(f"checkpoints/{RUN}/LATEST", {"key": BEFORE})


def rotten(state: Path, manifest: Path) -> str:
    content = bytearray((state / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    replace(state / "state.safetensors", bytes(content))
    return "state.safetensors"


def truncated(state: Path, manifest: Path) -> str:
    replace(state / "state.safetensors", (state / "state.safetensors").read_bytes()[:-100])
    return "state.safetensors"


def lacking(state: Path, manifest: Path) -> str:
    (state / "progress.json").unlink()
    return "progress.json"


def cut_manifest(state: Path, manifest: Path) -> str:
    replace(manifest, manifest.read_bytes()[:200])
    return "manifest.json"


def later_manifest(state: Path, manifest: Path) -> str:
    replace(manifest, manifest.read_bytes().replace(b"latentac/artifact/1", b"latentac/artifact/2"))
    return "manifest.json"


def later_state(state: Path, manifest: Path) -> str:
    """Whole by its hashes, and written by a version that means something else by it."""
    old = Manifest.from_json(manifest.read_bytes(), "", LAST)
    progress = json.loads((state / "progress.json").read_text())
    replace(state / "progress.json", json.dumps({**progress, "version": 2}).encode())
    made = describe(LAST, state, run=RUN, step="train", config_hash=old.config_hash, metrics=old.metrics)
    new = Manifest(**{**vars(made), "parents": old.parents})
    replace(manifest, new.to_json())
    if state.name == old.folder.rpartition("/")[2]:
        state.rename(state.with_name(new.folder.rpartition("/")[2]))
    return "progress.json"


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


DAMAGES: list[Callable[[Path, Path], str]] = [rotten, truncated, lacking, cut_manifest, later_manifest, later_state]


def damage_in_store(folder: Path, damage: Callable[[Path, Path], str]) -> str:
    place = folder / "store" / LAST
    [state] = place.glob("files-*")
    return damage(state, place / "manifest.json")


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_in_the_store_is_passed_over(
    damage: Callable[[Path, Path], str], crashed: Path, prototypes: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The one before is used, and a line names the file."""
    only_in_the_store(crashed)
    named = damage_in_store(crashed, damage)
    assert goes_on(crashed, monkeypatch, prototypes[1]) == 2
    [line] = [record.getMessage() for record in caplog.records if "checkpoint skipped" in record.getMessage()]
    assert LAST in line
    assert named in line


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_on_this_machine_is_passed_over(
    damage: Callable[[Path, Path], str], crashed: Path, prototypes: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The store had not got it yet. What it has is used, and a line names the file."""
    only_here(crashed)
    named = damage(here(crashed, 3) / "state", here(crashed, 3) / "manifest.json")
    assert goes_on(crashed, monkeypatch, prototypes[1]) == 2
    [line] = [record.getMessage() for record in caplog.records if "checkpoint skipped" in record.getMessage()]
    assert str(here(crashed, 3)) in line
    assert named in line


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, rotten, cut_manifest])
def test_a_newer_checkpoint_on_this_machine_is_uploaded_and_used(
    damage: Callable[[Path, Path], str] | None, crashed: Path, prototypes: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Also where the store has that iteration, damaged: nothing of it stays."""
    if damage is None:
        only_here(crashed)
    else:
        damage_in_store(crashed, damage)
    assert goes_on(crashed, monkeypatch, prototypes[1]) == 3
    assert f"the checkpoint of iteration 3 is uploaded from {crashed / RUN / 'checkpoints'}" in caplog.text
    store = open_store(f"file://{crashed}/store")
    store.verify(store.manifest(LAST))


@pytest.mark.slow
def test_a_checkpoint_of_another_critic_on_this_machine_is_none(
    crashed: Path, prototypes: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parents are not those of this run, which was deleted and made again, say."""
    only_here(crashed)
    manifest = here(crashed, 3) / "manifest.json"
    old = Manifest.from_json(manifest.read_bytes(), "", LAST)
    replace(manifest, Manifest(**{**vars(old), "parents": old.parents[:1]}).to_json())
    assert goes_on(crashed, monkeypatch, prototypes[1]) == 2


@pytest.mark.slow
def test_a_pointer_that_cannot_be_read_costs_no_checkpoint(
    crashed: Path, prototypes: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The manifests say what is whole."""
    only_in_the_store(crashed)
    replace(crashed / "store" / "checkpoints" / RUN / "LATEST", b'{"key": ')
    assert goes_on(crashed, monkeypatch, prototypes[1]) == 3
    assert "LATEST" in caplog.text


@pytest.mark.slow
def test_the_newest_few_are_kept_here_and_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.keep_checkpoints` of them, and the newest one is the last."""
    space = prepared(tmp_path, *SETTINGS, "train.keep_checkpoints=2", "train.num_iterations=6")
    Eventful.events = {5 * LOSSES + 1: crash}
    with pytest.raises(Crash):
        train_here(tmp_path, monkeypatch)
    assert sorted(path.name for path in (tmp_path / RUN / "checkpoints").iterdir()) == ["000004", "000005"]
    assert space.store.keys(f"checkpoints/{RUN}") == [f"checkpoints/{RUN}/000004", f"checkpoints/{RUN}/000005"]
    assert space.store.read_json(f"checkpoints/{RUN}/LATEST")["key"].endswith("000005")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"a small file system needs root: {done.stderr.strip() if done else 'no mount here'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def verified(store: Store, key: str) -> None:
    store.verify(store.manifest(key))


@pytest.mark.slow
def test_a_full_disk_ends_training_and_leaves_the_checkpoint_before(
    small_disk: Path, prototypes: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 6, with the place, what it takes and what is free; with room again it goes on from there."""
    space = prepared(small_disk, *SETTINGS)
    filler = small_disk / "filler"

    def fill() -> None:
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(free - 2**18))

    Eventful.events = {3 * LOSSES: fill}
    code, message = train_here(small_disk, monkeypatch)
    assert code == 6, message
    found = json.loads(message)
    assert found["kind"] == "ResourceError"
    assert found["where"] == str(here(small_disk, 3))
    assert "the disk is full" in found["problem"]
    assert "MiB to write" in found["problem"]
    assert not list((small_disk / RUN).glob(".latentac-*")), "what was written of it takes no room"
    verified(space.store, BEFORE)
    assert space.store.read_json(f"checkpoints/{RUN}/LATEST")["key"] == BEFORE
    filler.unlink()
    Eventful.events = {}
    assert goes_on(small_disk, monkeypatch, prototypes[1]) == 2


_WORK = "import sys; from latentac.runs.workers.worker import main; sys.exit(main(*sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whichever_machine_has_the_newest_checkpoint_all_go_on_from_it(
    crashed: Path, prototypes: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """Two workers with a folder each. The second was the leading one before, and the store has not got its last one."""
    only_here(crashed)
    nodes = [tmp_path / "first", tmp_path / "second"]
    store = f"file://{crashed}/store"
    for node in nodes:
        (node / RUN).mkdir(parents=True)
    shutil.move(crashed / RUN / "checkpoints", nodes[1] / RUN / "checkpoints")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORK, RUN, store, str(node)],
            env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2",
                              ATTEMPT: "attempt-1"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank, node in enumerate(nodes)
    ]  # fmt: skip
    told = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "the checkpoint of iteration 3 is uploaded from" not in told[0]
    assert f"the checkpoint of iteration 3 is uploaded from {nodes[1]}" in told[1]
    space = open_run(RUN, store, str(nodes[0]))
    assert trained_weights(space) == prototypes[1]
    manifest = space.finished("train")
    assert manifest is not None
    history = json.loads(space.store.read(manifest.key, "history.json"))
    assert [entry["world_size"] for entry in history] == [1, 1, 1, 2]

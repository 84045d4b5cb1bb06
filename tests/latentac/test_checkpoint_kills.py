"""A worker that is killed while it writes or uploads a checkpoint."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.latentac.extensions import Eventful
from tests.latentac.test_store import use
from tests.latentac.test_store_outage import LATEST, LOSSES, SETTINGS, calm, group, server, unharmed
from tests.latentac.workers import RUN, prepared, train_here, trained_weights

__all__ = ["calm", "server"]  # fixtures

_WORK = "from latentac.runs.workers.worker import main; import sys; sys.exit(main(*sys.argv[1:]))"
_KILL = "os.kill(os.getpid(), signal.SIGKILL)"
WRITING = f"""
import os, signal
from latentac.runs.workers import local
sync = local._sync
def syncs(path):
    sync(path)
    if '000003' in str(path):
        {_KILL}
local._sync = syncs
"""
"""Killed while it writes the third checkpoint: some files are there."""

UPLOADING = f"""
import os, signal
from latentac.store.blobs import Stream
read = Stream.read
def reads(self, size=-1):
    found = read(self, size)
    if self._stream and '000003/state/state' in str(getattr(self._stream, 'name', '')):
        {_KILL}
    return found
Stream.read = reads
"""
"""Killed while it uploads the third checkpoint: a part of the weights was read."""


LINKING = f"""
import os, signal
from latentac.store.blobs import Folder
place = Folder._place
def places(self, partial, name):
    place(self, partial, name)
    if '000003/files-' in name:
        {_KILL}
Folder._place = places
"""
"""The same in a folder, which gets links: one of two files is there."""


def killed(folder: Path, how: str, store: str = "") -> None:
    """A worker that ends by SIGKILL."""
    command = [sys.executable, "-c", how + _WORK, RUN, store, str(folder), str(folder / "failure.json")]
    done = subprocess.run(command, env=group(), capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never was: the one before is used, and what was written of it goes."""
    expected = unharmed(tmp_path / "whole", monkeypatch, "train.num_iterations=4")
    runs = tmp_path / "runs"
    runs.mkdir()
    space = prepared(runs, *SETTINGS, "train.num_iterations=4")
    killed(runs, WRITING)
    assert list((runs / RUN).glob(".latentac-checkpoint-*"))
    assert train_here(runs, monkeypatch) == (0, "")
    assert Eventful.calls == 2 * LOSSES
    assert trained_weights(space) == expected
    assert not list((runs / RUN).glob(".latentac-checkpoint-*"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["file", pytest.param("s3", marks=pytest.mark.minio)])
def test_kill_9_while_a_checkpoint_is_uploaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """It is whole on this machine, so not one iteration is lost."""
    expected = unharmed(tmp_path / "whole", monkeypatch, "train.num_iterations=4")
    runs, url = tmp_path / "runs", ""
    runs.mkdir()
    if kind == "s3":
        url = use(request.getfixturevalue("server"), monkeypatch)
    space = prepared(runs, *SETTINGS, "train.num_iterations=4", store=url)
    killed(runs, UPLOADING if kind == "s3" else LINKING, url)
    assert space.store.read_json(LATEST)["key"].endswith("000002")
    assert train_here(runs, monkeypatch, url) == (0, "")
    assert Eventful.calls == LOSSES
    assert trained_weights(space) == expected
    assert len(space.store.keys(f"checkpoints/{RUN}")) == 2

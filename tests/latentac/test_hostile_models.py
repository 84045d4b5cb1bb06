"""A model folder is data: whatever stands in it runs no code, reads nothing outside, and is refused fast and small."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.latentac import hostile

ROOT = Path(__file__).resolve().parents[2]
CODES = {"prepare": 2, "serve": 8}
CASES = [("prepare", name) for name in hostile.PREPARE] + [("serve", name) for name in hostile.SERVE]
MOST_SECONDS = 10
MOST_BYTES = 500 * 2**20

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Listener:
    """A port of loopback that counts who connects."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port, self.connections = self._socket.getsockname()[1], 0
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """role -> case -> what happened; `connections` of the role under the case ""."""
    found: dict[str, dict[str, Any]] = {}
    for role in CODES:
        root, listener = tmp_path_factory.mktemp(role), Listener()
        (root / "evil.py").write_text(hostile.CODE)
        proxy = f"http://127.0.0.1:{listener.port}"
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{root}", "HF_HOME": str(root / "hub")}
        environment |= {"HF_ENDPOINT": proxy, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "no_proxy": ""}
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"), proxy)
        command = [sys.executable, "-m", "tests.latentac.hostile", role, str(root)]
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=800
        )
        assert done.returncode == 0, done.stderr[-3000:]
        listener.close()
        found[role] = json.loads((root / "found.json").read_text()) | {"": {"connections": listener.connections}}
        shutil.rmtree(root)
    return found


def test_there_are_enough_of_them() -> None:
    """Forty were promised."""
    assert len(CASES) >= 40


@pytest.mark.parametrize("role", CODES)
def test_nothing_is_asked_of_a_network(attacked: dict[str, dict[str, Any]], role: str) -> None:
    """The proxy and the hub's address led to a listener, all the time."""
    assert attacked[role][""]["connections"] == 0


@pytest.mark.parametrize(("role", "name"), CASES, ids=[f"{role}: {name}" for role, name in CASES])
def test_a_hostile_folder_does_no_harm(attacked: dict[str, dict[str, Any]], role: str, name: str) -> None:
    """It is refused with the file, what was found there, and the exit code; or it is loaded as if what is hostile were
    not there. No code runs, nothing outside is read or copied, and it costs seconds and megabytes."""
    found = attacked[role][name]
    _, expected = getattr(hostile, role.upper())[name]
    assert not found["ran"], "code of the folder has run"
    assert not found["opened"], "a file outside was opened, or a process or a connection was begun"
    assert not found["leaked"], "what stands outside or is hidden was copied"
    if expected is None:
        assert found["code"] == 0, found["said"]
        return
    assert found["code"] == CODES[role], found["said"]
    assert expected in found["said"]
    assert "Traceback" not in found["said"]
    assert found["seconds"] < MOST_SECONDS
    assert found["bytes"] < MOST_BYTES

"""Training by a real torchrun agent on machines that are not as they should be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.latentac.workers import RUN, prepared

_TRAIN = "import sys; from latentac.run import train; print(train(*sys.argv[1:]).metrics['max_world_size'])"


def _renamed(name: str) -> list[str]:
    """A prefix for commands that shall find `name` to be the hostname; skips where the system allows none."""
    mapped = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    prefix = ["unshare", *mapped, "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no UTS namespace can be made here: {tried.stderr.strip()}")
    return prefix


@pytest.mark.slow
def test_a_machine_whose_hostname_does_not_resolve_trains(tmp_path: Path) -> None:
    """The workers of one machine find each other by the loopback address, whatever the machine is called."""
    prefix = _renamed("no-such-host")
    prepared(tmp_path, "train.num_workers=2")
    command = [*prefix, sys.executable, "-c", _TRAIN, RUN, "", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]

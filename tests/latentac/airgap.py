"""Processes that reach loopback alone.

environment(folder)     variables under which each Python process, children included, refuses any other connection
attempts(folder)        the connections that were refused, also where a library went on without them
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_HOOK = """
import os, sys
def _refuse(event, arguments):
    if event == "socket.connect":
        place = arguments[1]
        host = place[0] if isinstance(place, tuple) else "localhost"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        place = arguments[1] if event == "socket.sendto" else arguments[0]
        host = place[0] if isinstance(place, tuple) else place
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", "::1", "0.0.0.0", "::", os.uname().nodename) or str(host).startswith("127."):
        return
    with open({log!r}, "a") as log:
        print(event, host, file=log)
    raise PermissionError(f"{{event}} {{host}}: the network is off")
sys.addaudithook(_refuse)
"""


def environment(folder: Path) -> dict[str, str]:
    """`folder`: a new one for the hook, its log, an empty home, and copies of sources. Nothing says offline to the
    hub's client: that no hub is asked is for the code to do."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK.format(log=str(folder / "refused")))
    (folder / "home").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LATENTAC_", "XDG_"))}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    own = {"HOME": str(folder / "home"), "LATENTAC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return kept | own | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def attempts(folder: Path) -> str:
    log = folder / "refused"
    return log.read_text() if log.exists() else ""


def latentac(*arguments: str, folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """The command line in a process without a network."""
    command = [sys.executable, "-m", "latentac.runs.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(folder) | more, cwd=folder.parent
    )


def python(script: str, *arguments: str, folder: Path, **more: str) -> str:
    """What a script prints in a process without a network; it must succeed."""
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(folder) | more)
    assert done.returncode == 0, done.stderr
    return done.stdout

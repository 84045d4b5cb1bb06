"""A script in a process of its own, as a test of what it imports, prints, and asks the network."""

import os
import subprocess
import sys
from pathlib import Path

OFFLINE = (
    "import sys\n"
    "def refuse(event, arguments):\n"
    "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):\n"
    "        raise SystemExit(f'{event} {arguments}')\n"
    "sys.addaudithook(refuse)\n"
)
"""What a script begins with that must not ask the network. It sees Python's requests, not those of a C library."""


def alone(script: str, **environment: str) -> str:
    """What a process prints that runs `script`, which must succeed and have nothing to say on stderr."""
    root = Path(__file__).parents[3]
    # Either of them would keep onnxruntime from sending events, which is for the code to do.
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    variables = {**inherited, "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout

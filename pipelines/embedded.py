"""The steps as processes of this one's Python environment: what kfp.local's SubprocessRunner needs around it."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from latentac.pipelines.request import Request
from latentac.pipelines.ways import Way
from latentac.system.progress import TERMINAL
from latentac.system.scratch import empty_folder, remove_abandoned, temporary_files


@contextlib.contextmanager
def processes(run: str, request: Request, output: Path) -> Iterator[Way]:
    """What the steps inherit, and a clean place for kfp's files in `<output>/<run>/kfp`."""
    from kfp import local

    root = output / run / "kfp"
    if (root / "tmp").is_symlink():  # the last start was killed
        remove_abandoned((root / "tmp").readlink(), root)
    empty_folder(root)  # of copies of manifests of earlier starts: the store has the originals
    if sys.stderr.isatty():
        os.environ[TERMINAL] = os.ttyname(sys.stderr.fileno())
    python = sys.executable
    # kfp.local puts sys.executable, unquoted, wherever its command says python3, in paths too: make that the identity
    (root / "bin").mkdir()
    (root / "bin" / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(python)} "$@"\n')
    (root / "bin" / "python3").chmod(0o755)
    os.environ["PATH"] = f"{(root / 'bin').resolve()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    with temporary_files(root) as scratch:  # each step's shell leaves a folder with its source behind
        (root / "tmp").symlink_to(scratch)
        sys.executable = "python3"
        try:
            yield Way(
                runner=local.SubprocessRunner(use_venv=False),  # True would build a venv, for every step
                store=request.store_url(output),
                output=output,
                config=request.config,
            )
        finally:
            sys.executable = python

"""Where the shipped weights come from: seed, sources, machine, versions, curves and scores, in `provenance.json`."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

_LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Provenance:
    """A JSON file that grows stage by stage, so a run that was cut short can be continued."""

    path: Path
    content: dict[str, object]

    @classmethod
    def begin(cls, path: Path, seed: int, command: str, packages: Sequence[ModuleType]) -> "Provenance":
        """Keeps what a former run recorded in `path`, and describes this run beside it. packages: whose sources decide
        the weights."""
        folders = [Path(str(package.__file__)).parent for package in packages]
        sources = {f"{folder.name}/{file.name}": file for folder in folders for file in sorted(folder.glob("*.py"))}
        content = json.loads(path.read_text()) if path.exists() else {}
        content |= {
            "seed": seed,
            "command": command,
            "commit": _commit(folders[0]),
            "sources": {name: _sha256(file) for name, file in sources.items()},
            "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "platform": platform.platform()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        }
        return cls(path, content)

    def value(self, stage: str, key: str) -> object:
        """What `stage` recorded under `key`, or None."""
        recorded = self.content.get(stage)
        return recorded.get(key) if isinstance(recorded, dict) else None

    def record(self, stage: str, result: object) -> None:
        """Adds the result of one stage and writes the file."""
        self.content[stage] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def finish(self, folder: Path) -> None:
        """Adds size and sha256 of every other file in `folder`."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != self.path]
        described = {
            file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in files
        }
        self.record("files", described)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _commit(folder: Path) -> str | None:
    """The commit that is checked out, or None outside a repository; `sources` identifies the code in any case."""
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() if found.returncode == 0 else None


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

"""The examples in the documents, executed exactly as they stand in the text, in a folder outside the checkout.

In a document, from top to bottom: a Python, YAML, JSONL or Dockerfile block is written to the file that its first line
(`# name`), or `<!-- file: name -->` above it, names; a Python block without a name is a script; a shell block is run.
`<!-- not run: why, and which test runs it -->` stands above a block that is not run. A `text`
or `math` block is only shown.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from latentac.worlds.builtin import builtin_pipeline
from tests.latentac.serving.conftest import exported_folder, resolved  # noqa: F401  # the folder that a server reads

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = "latentac/runs/reporting/README.md"


def documents() -> list[str]:
    """Every document of the repository that has a fenced block. The chart's README is generated from its template."""
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.splitlines()
    return [name for name in sorted(set(names)) if (ROOT / name).is_file() and "```" in (ROOT / name).read_text()]


DOCUMENTS = documents()
WRITTEN, RUN, SHOWN = {"python", "yaml", "jsonl", "dockerfile"}, {"sh"}, {"text", "math"}
FENCE = re.compile(
    r"(?P<comments>(?:^<!-- (?:file|not run): [^>]* -->\n)*)^```(?P<language>\S*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SECONDS = 600
INTERVAL = {"mean", "low", "high", "n"}


@dataclass(frozen=True)
class Block:
    """where: document and line; file: what it is written to, or ""; reason: why it is not run, or ""."""

    where: str
    language: str
    text: str
    file: str
    reason: str


def blocks(document: str) -> list[Block]:
    """The fenced blocks of the document, in order."""
    content, found = (ROOT / document).read_text(), []
    for match in FENCE.finditer(content):
        notes = dict(re.findall(r"<!-- (file|not run): (.*?) -->", match["comments"], re.DOTALL))
        first = re.match(r"# ([\w/.-]+\.(?:py|yaml))\n", match["text"])
        line = content.count("\n", 0, match.start("language")) + 1
        name = notes.get("file") or (first[1] if first else "")
        found.append(Block(f"{document}:{line}", match["language"], match["text"], name, notes.get("not run", "")))
    return found


class Reader:
    """Somebody who does what a document says, in the folder `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        own = Path(sys.executable).parent
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment = {**kept, "PATH": f"{own}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        shutil.copytree(builtin_pipeline("shapes-unet"), place / "my-model")

    def write(self, block: Block) -> None:
        file = self.place / block.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text)

    def run(self, block: Block) -> None:
        shell = ["bash", "-euo", "pipefail", "-c", block.text]
        command = shell if block.language in RUN else [sys.executable, "-c", block.text]
        done = subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, f"{block.where}\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def rows() -> list[str]:
    """The keys in the table of summary.json, as paths: `gate.decision`, `training[].rewards.<reward>`."""
    table = (ROOT / SCHEMA).read_text().partition("| Key | Type |")[2].partition("\n\n")[0]
    found = []
    for line in table.splitlines()[2:]:
        first, *others = re.findall(r"`([^`]+)`", line.split(" | ")[0])
        found += [first, *(first.rpartition(".")[0] + other for other in others)]
    return found


def table_faults(summary: dict[str, Any]) -> list[str]:
    """Keys of the summary that the table does not have, and rows of the table that the summary does not have."""
    listed = rows()
    lists = {"training", "steering"}  # the rows below say what is in each entry
    patterns = [re.sub(r"<\w+>", r"[^.]+", re.escape(row).replace(r"\<", "<")) for row in listed if row not in lists]

    def unknown(value: Any, path: str) -> list[str]:
        if any(re.fullmatch(pattern, path) for pattern in patterns):
            return []
        if path.removeprefix("steering[].") in INTERVAL:
            return []
        if isinstance(value, dict):
            return [fault for key, item in value.items() for fault in unknown(item, f"{path}.{key}".lstrip("."))]
        if path in lists:
            return [fault for item in value for fault in unknown(item, f"{path}[]")]
        return [] if value is None else [f"not in the table: {path}"]

    def has(value: Any, parts: list[str]) -> bool:
        if not parts or value is None or value == []:
            return True
        if isinstance(value, list):
            return all(has(item, parts) for item in value)
        if not isinstance(value, dict):
            return False
        name = parts[0].removesuffix("[]")
        chosen = value.values() if name.startswith("<") else [value[name]] if name in value else []
        return any(has(item, parts[1:]) for item in chosen)

    stale = [f"only in the table: {row}" for row in listed if not has(summary, row.split("."))]
    return [*unknown(summary, ""), *stale]


def is_run(block: Block) -> bool:
    """Whether the test of whole documents writes or runs it."""
    return not block.reason and block.language not in SHOWN and not is_contract(block)


def is_contract(block: Block) -> bool:
    """Whether it runs tests, which takes seconds."""
    return block.language in RUN and block.text.startswith("python -m pytest")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_block_is_run_or_says_why_not(document: str) -> None:
    """Nothing is skipped silently. This finds a fence that the tests below do not understand, a reason that names no
    test, and a file that no example uses."""
    found, problems = blocks(document), []
    assert len(found) == (ROOT / document).read_text().count("\n```") // 2, "a fence that is not read"
    for block in found:
        later = [each.text for each in found if each is not block]
        modules = block.file.removesuffix(".py").replace("/", ".")
        if block.language not in WRITTEN | RUN | SHOWN:
            problems.append(f"{block.where}: nobody runs {block.language or 'a block without a language'}")
        if block.language in {"yaml", "jsonl"} and not (block.file or block.reason):
            problems.append(f"{block.where}: names no file")
        if block.file and not any(block.file in text or modules in text for text in later):
            problems.append(f"{block.where}: no example uses {block.file}")
        targets = re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE) if block.language in RUN else []
        problems += [f"{block.where}: no target {target}" for target in targets if target not in TARGETS]
        tests = re.findall(r"tests/[\w/]+\.py|make [\w-]+", block.reason)
        if block.reason and not any(test.startswith("make") or (ROOT / test).is_file() for test in tests):
            problems.append(f"{block.where}: its reason names no test and no target that runs it")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(map(is_contract, blocks(name)))])
def test_extensions_of_the_documents_keep_the_contracts(document: str, tmp_path: Path) -> None:
    """The tests that a document shows pass for the classes that it shows."""
    reader = Reader(tmp_path)
    for block in blocks(document):
        if block.file:
            reader.write(block)
    for block in filter(is_contract, blocks(document)):
        reader.run(block)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(map(is_run, blocks(name)))])
def test_each_document_works_as_it_is_written(document: str, tmp_path: Path, exported_folder: Path) -> None:  # noqa: F811
    """From top to bottom: files are written, scripts and commands end well. `my-model` is a pipeline to begin with,
    `model` an exported one."""
    shutil.copytree(exported_folder, tmp_path / "model")
    reader = Reader(tmp_path)
    for block in filter(is_run, blocks(document)):
        reader.write(block) if block.file else reader.run(block)
    for summary in sorted(tmp_path.glob("runs/*/summary.json")):
        assert not table_faults(json.loads(summary.read_text()))


def test_the_table_of_layers_is_the_contract() -> None:
    """The table of latentac/README.md has the layers of the linter's contract, in its order."""
    (contract,) = [
        found
        for found in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
        if found["type"] == "layers"
    ]
    held = [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    table = (ROOT / "latentac" / "README.md").read_text().partition("| Layer | Folder |")[2].partition("\n\n")[0]
    rows = [(int(level), name) for level, name in re.findall(r"^\| (\d+) \| \[?`(\w+)`", table, re.MULTILINE)]
    levels = sorted({level for level, _ in rows}, reverse=True)
    assert [{name for level, name in rows if level == each} for each in levels] == held

"""Rules of the house that no linter knows. Each is checked over what is on disk, so it holds for files to come."""

import ast
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("latentac", "components", "pipelines", "images", "helm", "tests", "benchmarks", "tools")
PACKAGES = ("latentac", "components", "pipelines")
CONVERTER = "latentac/rewards/checkpoints.py"  # the one module that opens pickles
MAX_BYTES = 16 * 2**20
MAX_MODULE_LINES = 350
MAX_POSITIONAL = 6

# Tables whose keys a user writes in a configuration or on the command line, beside those of "module:Class" rows.
TABLES = {"KERNELS", "PIPELINES", "RECIPES", "FUNCTIONS"}
METHOD_MAY_IMPORT = {"collections.abc", "dataclasses", "enum", "hashlib", "jaxtyping", "math", "typing", "torch"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NO_NAMES = {"utils", "common", "base", "core", "registry", "helpers", "misc"}
UNSAFE_KEYWORD = re.compile(r"(trust_remote_code|allow_pickle)=(?!False)")
READER = re.compile(r"json\.loads?|yaml\.\w*load\w*|csv\.(reader|DictReader)|tomllib\.loads?")
HEAVY = {"torch", "diffusers", "transformers", "peft", "kfp", "kserve", "kubernetes", "torchx", "matplotlib", "scipy"}

MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:work|root|home/\w+|Users/\w+|opt/wheels)/")
REGISTRY = re.compile(
    r"\b(?:pypi\.org|pythonhosted\.org|proxy\.golang\.org|registry-1\.docker\.io)\b"
    r"|(?<!\w)--(?:extra-)?index-url\b|(?<!\w)--find-links\b|\b(?:artifactory|jfrog|sonatype)\b"
)


def tracked() -> list[Path]:
    """Every file that is committed or about to be: tracked, or untracked and not ignored."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, check=True, text=True).stdout.split("\0")
    return [path for name in sorted(set(names) - {""}) if (path := ROOT / name).is_file()]


FILES = tracked()
SOURCES = [path for path in FILES if path.suffix == ".py"]
PRODUCT = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES]


def text_of(path: Path) -> str:
    """The file's text, or nothing for a binary file."""
    content = path.read_bytes()
    return "" if b"\0" in content[:8192] else content.decode()


def at(path: Path, node: ast.expr | ast.stmt | None = None) -> str:
    return str(path.relative_to(ROOT)) + (f":{node.lineno}" if node else "")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute names of what is imported anywhere in the tree; `from a import b` yields `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node


def tables(path: Path) -> Iterator[list[str]]:
    """The keys of each table of the module: public, upper case, a literal, known by name or by its rows."""
    for node in ast.parse(path.read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if not (isinstance(target, ast.Name) and target.id.isupper() and isinstance(value, ast.Dict)):
            continue
        keys = [key.value for key in value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
        rows = [row.value for row in value.values if isinstance(row, ast.Constant) and isinstance(row.value, str)]
        lazy = bool(rows) and all(re.fullmatch(r"[\w.]+:\w+", row) for row in rows)
        if not target.id.startswith("_") and (lazy or target.id in TABLES):
            yield keys


def is_call_of(node: ast.Call, name: str) -> bool:
    return ast.unparse(node.func) == name


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`latentac ...` in a process that then says on its last line which heavy packages it has imported."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['latentac', *{list(arguments)!r}]\n"
        "try:\n    from latentac.runs.cli import main\n    code = main()\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        f"print('imported:', *sorted({HEAVY!r} & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


def commands() -> list[str]:
    """The commands that `latentac --help` lists."""
    listed = run_cli("--help")
    assert listed.returncode == 0, listed.stderr
    found = re.findall(r"^ {4,8}([a-z][a-z-]+)(?: {2,}\S.*|)$", listed.stdout, re.MULTILINE)
    assert found, f"no commands in the help:\n{listed.stdout}"
    return found


# The layers


def test_modules_import_only_from_the_layers_below() -> None:
    """import-linter's contracts in pyproject.toml hold: layers, no cycles, no kfp or kubernetes in latentac."""
    linter = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(linter, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_method_is_pure_mathematics() -> None:
    """latentac.method imports torch, a few modules of Python's library and itself: no configuration, no files."""
    for path in (ROOT / "latentac" / "method").glob("*.py"):
        known = {imported for imported, _ in imports(ast.parse(path.read_text()))}
        foreign = {each for each in known if not each.startswith(("torch.", "latentac.method."))} - METHOD_MAY_IMPORT
        assert not foreign, f"{at(path)} imports {sorted(foreign)}"


def test_the_folders_of_the_library_are_subjects() -> None:
    """At most 15 entries in the library's folder, each a package."""
    entries = {path.relative_to(ROOT).parts[1] for path in PRODUCT if path.relative_to(ROOT).parts[0] == "latentac"}
    linked = {path.name for path in (ROOT / "latentac").iterdir() if path.is_symlink()}
    assert linked == {"components", "pipelines"}
    assert len(linked | entries - {"__init__.py"}) <= 15
    assert not [name for name in entries - {"__init__.py"} if name.endswith(".py")]


def test_components_import_the_library_only_inside_their_function() -> None:
    """KFP ships the function's source alone, and compiling a pipeline must not load torch. The images' names are read
    when it is compiled."""
    for path in (ROOT / "components").glob("*/component.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                found = {name for name, _ in imports(statement) if name.split(".")[0] in {"latentac", "torch"}}
                assert found <= {"latentac.components"}, f"{at(path, statement)} imports {sorted(found)} at the top"


# The files


def test_no_file_is_large() -> None:
    """Whatever a clone fetches stays small: 16 MB a file."""
    large = {at(path): path.stat().st_size for path in FILES if path.stat().st_size > MAX_BYTES}
    assert not large


def test_no_file_names_a_machine_or_a_registry() -> None:
    """Paths of one machine, and addresses of package registries, belong in the environment of whoever installs."""
    found = []
    for path in FILES:
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if match := MACHINE_PATH.search(line) or REGISTRY.search(line):
                found.append(f"{at(path)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_modules_are_of_a_size_to_read() -> None:
    """A module of more than 350 lines is two, and half of them have at most about 120."""
    long = {at(path): lines for path in PRODUCT if (lines := len(path.read_text().splitlines())) > MAX_MODULE_LINES}
    assert not long
    assert statistics.median(len(path.read_text().splitlines()) for path in PRODUCT) <= 130


def test_functions_take_few_positional_parameters() -> None:
    """Beyond six a call cannot be read: the others are named. KFP calls a pipeline's function by position."""
    many = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any(ast.unparse(each).startswith("dsl.pipeline(") for each in node.decorator_list):
                continue
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in {"self", "cls"}]
            many += [f"{at(path)}:{node.lineno} {node.name}: {len(names)}"] if len(names) > MAX_POSITIONAL else []
    assert not many, "\n".join(many)


def test_modules_are_named_after_what_they_hold() -> None:
    """No utils, no common, no base: such a name tells nobody what to look for in it."""
    poor = [at(path) for path in PRODUCT if {path.stem, *path.relative_to(ROOT).parts[:-1]} & NO_NAMES]
    assert not poor, "\n".join(poor)


# The code


def test_nothing_that_is_loaded_can_run_code() -> None:
    """No pickle in any form, and no code from a model's repository: weights are safetensors, records are JSON. Only
    the command that converts published pickles opens one, as tensors alone."""
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        found += [f"{at(path, node)} {name}" for name, node in imports(tree) if name.split(".")[0] in UNPICKLERS]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and is_call_of(node, "torch.load")]
        only = all("weights_only=True" in map(ast.unparse, call.keywords) for call in calls)
        safe = {"torch.load"} if at(path) == CONVERTER and only else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"} - safe:
                found.append(f"{at(path, node)} {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and UNSAFE_KEYWORD.match(ast.unparse(node)):
                found.append(f"{at(path, node.value)} {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_what_comes_from_elsewhere_is_read_in_few_places() -> None:
    """JSON and YAML go through the readers that have bounds and one kind of error. Of the others each reads what this
    very program has made."""
    readers = {
        *(
            "latentac/system/reading.py",
            "latentac/system/hub.py",
            "latentac/system/modelfiles.py",
            "latentac/worlds/promptfiles.py",
            "latentac/config/fields.py",
        ),
        *(
            "latentac/serving/routes.py",
            "latentac/worlds/pretraining/stages.py",
            "latentac/worlds/pretraining/provenance.py",
        ),
    }
    found = []
    for path in PRODUCT:
        if path.relative_to(ROOT).parts[0] in PACKAGES and at(path) not in readers:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and READER.fullmatch(ast.unparse(node)):
                    found.append(f"{at(path, node)} {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_numbers_of_the_environment_are_read_in_one_place() -> None:
    """`int(os.environ[...])` is a traceback where somebody has exported something else: see `whole_variable`."""
    found = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"int", "float"}:
                found += [f"{at(path, node)} {ast.unparse(node)}"] if "environ" in ast.unparse(node) else []
    assert not found, "\n".join(found)


def test_the_library_does_not_print() -> None:
    """Only a command line prints. The library logs, and what must reach a stream all the same names it (`file=`)."""
    found = []
    for path in PRODUCT:
        if path.relative_to(ROOT).parts[0] != "latentac" or path.name in {"cli.py", "running.py", "__main__.py"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if isinstance(node, ast.Call) and printing and all(keyword.arg != "file" for keyword in node.keywords):
                found.append(at(path, node))
    assert not found, "\n".join(found)


def test_annotations_are_live() -> None:
    """KFP and pydantic read annotations at run time: none is a string by way of __future__."""
    found = [
        at(path, node)
        for path in SOURCES
        for name, node in imports(ast.parse(path.read_text()))
        if name == "__future__"
    ]
    assert not found, "\n".join(found)


# The documentation


def test_each_room_and_each_table_has_a_readme() -> None:
    """Every room opens with a README, and the README beside a table names each of its keys as code."""
    expected: dict[Path, set[str]] = {ROOT / room / "README.md": set() for room in ROOMS if (ROOT / room).is_dir()}
    for path in PRODUCT:
        for keys in tables(path):
            expected.setdefault(path.parent / "README.md", set()).update(keys)
    problems = []
    for readme, names in expected.items():
        text = readme.read_text() if readme.is_file() else ""
        problems += [] if text else [f"{at(readme)} is missing"]
        problems += [f"{at(readme)} does not name `{name}`" for name in sorted(names) if f"`{name}`" not in text]
    assert not problems, "\n".join(problems)


def test_each_command_is_documented() -> None:
    """latentac/runs/README.md names each command, and each step is command, function and folder."""
    text = (ROOT / "latentac" / "runs" / "README.md").read_text()
    known = commands()
    assert not [command for command in known if f"`{command}`" not in text and f"`latentac {command}" not in text]
    folders = {path.parent.name.replace("_", "-") for path in (ROOT / "components").glob("*/component.py")}
    assert folders <= set(known), f"components without a command: {sorted(folders - set(known))}"


def test_links_and_make_targets_in_documents_exist() -> None:
    """A relative link leads to a file of the checkout, and to a heading that the file has. Each `make` target that a
    document names is in the Makefile."""
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    broken = []
    for path in (path for path in FILES if path.suffix == ".md"):
        text = path.read_text()
        for link, heading in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text):
            target = path.parent / link if link else path
            if not target.exists() or (heading and heading not in headings(target)):
                broken.append(f"{at(path)}: {link}#{heading}")
        for goal in re.findall(r"(?:`|^ {4,}|^\$ )make ((?!-)[a-z0-9-]+)", text, re.MULTILINE):
            if goal not in targets:
                broken.append(f"{at(path)}: make {goal}")
    assert not broken, "\n".join(broken)


def headings(document: Path) -> set[str]:
    """The names by which links reach the headings of a Markdown file, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in found}


def test_make_help_lists_every_target() -> None:
    """`make help` is the manual: each target has its line, from whatever folder one asks."""
    makefile = (ROOT / "Makefile").read_text()
    phony = " ".join(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)).split()
    done = subprocess.run(["make", "-C", str(ROOT), "help"], cwd="/", capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")] == phony


# The command line


@pytest.mark.parametrize("command", ["", "each"])
def test_help_comes_without_torch_and_has_an_example(command: str) -> None:
    """The help of the command and of each command shows how to call it, and loads nothing that takes seconds."""
    for arguments in [[each, "--help"] for each in commands()] if command else [["--help"]]:
        done = run_cli(*arguments)
        assert done.returncode == 0, done.stderr
        text, imported = done.stdout.rsplit("imported:", 1)
        assert not imported.split(), f"latentac {' '.join(arguments)} imports {imported}"
        assert "example" in text.lower(), text
        assert f"latentac {arguments[0] if command else ''}" in text, text


def test_help_comes_at_once() -> None:
    """Half a second is the promise; the test allows four times that for a busy machine, and takes the best of three."""
    command = [str(Path(sys.executable).with_name("latentac")), "--help"]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2.0


# The installation


def pins(name: str) -> dict[str, str]:
    """Package to version of a requirements file, whose every row must be an exact pin."""
    rows = re.sub(r"\\\n| --hash=\S+|(?:^|\s)#.*|^-r .*", "", (ROOT / "requirements" / name).read_text(), flags=re.M)
    found = {}
    for row in filter(None, map(str.strip, rows.splitlines())):
        match = re.fullmatch(r"([\w.-]+)==([\w.+-]+)(?: ;.*)?", row)
        assert match, f"requirements/{name}: {row!r} is not an exact pin"
        found[match[1].lower()] = match[2]
    return found


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [
    row
    for rows in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for row in map(Requirement, rows)
    if row.name != "latentac"
]
"""What the wheel asks for, with and without its extras."""


def test_what_is_asked_for_is_what_is_locked() -> None:
    """Every row of the .in files is an exact pin, and the lock has that version, with hashes and without addresses."""
    for source, lock in ((f"{name}.in", f"{name}.lock") for name in ("dev", "installer", "docs", "optimizers")):
        locked = pins(lock)
        assert {name: locked.get(name) for name in pins(source)} == pins(source), f"{source}: run `make lock`"
        text = (ROOT / "requirements" / lock).read_text()
        assert "://" not in text
        assert not re.search(r"^[\w.-]+==[^\\]*\n(?! +--hash)", text, re.MULTILINE), f"{lock} has a row without a hash"
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build == [f"setuptools=={pins('dev.lock')['setuptools']}"]
    locked = pins("dev.lock") | pins("optimizers.lock")
    outside = [str(row) for row in ASKED if locked[row.name] not in row.specifier]
    assert not outside, "not what requirements/dev.lock has: run `make lock`"


def test_the_wheel_has_lower_bounds_and_no_exact_pins() -> None:
    """Whoever installs the library beside others chooses the versions. kubernetes and torch break between majors."""
    kinds = {str(row): {each.operator for each in row.specifier} for row in ASKED}
    assert not [row for row, operators in kinds.items() if ">=" not in operators or operators - {">=", "<"}]


def test_this_environment_is_the_locked_one() -> None:
    """What the tests prove, they prove for the locked versions. Some packages are in a folder of their own."""
    locked, apart = pins("dev.lock"), pins("optimizers.lock")
    names = {*pins("dev.in"), *(row.name for row in ASKED)} - apart.keys()
    assert {name: importlib.metadata.version(name) for name in names} == {name: locked[name] for name in names}
    found = importlib.metadata.distributions(path=[str(Path(sys.prefix) / "optimizers")])
    assert {each.name: each.version for each in found} == apart


def test_the_wheel_is_one_complete_package(tmp_path: Path) -> None:
    """A wheel carries every file of the package (weights, templates, golden YAML), and nothing beside the package."""
    for path in (*FILES, ROOT / "latentac" / "components", ROOT / "latentac" / "pipelines"):
        name = path.relative_to(ROOT)
        if name.parts[0] in {*PACKAGES, "pyproject.toml", "LICENSE", "README.md"}:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.readlink(path) if path.is_symlink() else path, tmp_path / name)
    script = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    parts = {path: path.relative_to(ROOT).parts for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES}
    ours = {"/".join(each if each[0] == "latentac" else ("latentac", *each)) for each in parts.values()}
    assert packed == ours, "see package-data in pyproject.toml"


@pytest.mark.parametrize("script", [".ci/run", "requirements/install.sh"])
def test_scripts_are_sound(script: str) -> None:
    """The shell scripts parse, stop at the first failure, and can be executed."""
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()
    assert os.access(path, os.X_OK)

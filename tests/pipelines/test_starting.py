"""`latentac run`: from any folder, dry, and resumed after everything was moved. `make test-wheel` tests the wheel."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentac.pipelines.request import Request, create_run, load_run, local_sources, read_request
from latentac.runs import package as packages
from latentac.runs.configuration import resolve_recipe
from latentac.store import open_store
from latentac.system.errors import ConfigError
from latentac.worlds.builtin import builtin_pipeline
from tests.pipelines.test_end_to_end import OPTIONS, Driver, come_to, run_id, weights

BACKBONE = builtin_pipeline("shapes-unet")
PROGRAM = str(Path(sys.executable).with_name("latentac"))


def latentac(folder: Path, *arguments: str, program: str = PROGRAM) -> "subprocess.CompletedProcess[str]":
    command = [program, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def model(folder: Path) -> Path:
    shutil.copytree(BACKBONE, folder)
    return folder


def prompts(file: Path) -> Path:
    """Two prompts to train on and eight to hold out."""
    from latentac.worlds.prompts import load_prompts

    found = json.loads(load_prompts("builtin:shapes").to_json())
    file.write_text(json.dumps({"train": found["train"][:2], "held_out": found["held_out"][:8]}))
    return file


def test_the_help_comes_at_once_with_examples(tmp_path: Path) -> None:
    """Half a second of work, from any folder."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    helped = latentac(tmp_path, "run", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert helped.returncode == 0
    assert "latentac run --resume" in helped.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


# What is resolved at the start


def test_relative_places_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources in --set and in the file, the file itself and the store mean the same from any other folder."""
    model(tmp_path / "my model"), prompts(tmp_path / "p.json"), prompts(tmp_path / "seen.json")
    prompts(tmp_path / "unseen.json")
    (tmp_path / "mine.yaml").write_text("seed: 3\nprompts: {source: p.json, train: seen.json}\n")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    overrides = ("backbone.source=my model", "prompts.held_out=./runs/../unseen.json", "policy.learning_rate=1e-4")
    run, _ = create_run(Request("shapes-unet", "mine.yaml", overrides, "file://elsewhere/store"), Path("runs"))

    (tmp_path / "mine.yaml").unlink()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    request = load_run(run, Path("../runs"), {})
    settings = resolve_recipe(request.recipe, request.config, request.overrides)
    assert settings.backbone.source == str(tmp_path / "my model")
    named = (settings.prompts.source, settings.prompts.train, settings.prompts.held_out)
    assert named == tuple(str(tmp_path / name) for name in ("p.json", "seen.json", "unseen.json"))
    assert local_sources(request) == [str(tmp_path / "my model"), *named]
    assert (settings.seed, settings.policy.learning_rate) == (3, 1e-4)
    assert request.store == f"file://{tmp_path}/elsewhere/store"
    assert Path(request.config).name == "mine.yaml"


@pytest.mark.parametrize("source", ["builtin:shapes-unet", "org/model", "no/such/folder", "x" * 300])
def test_what_is_no_path_here_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """A built-in pipeline, a hub id, and a mistake, which is reported by its own name."""
    monkeypatch.chdir(tmp_path)
    _, request = create_run(Request("shapes-unet", overrides=(f"backbone.source={source}", "nonsense")), Path("runs"))
    assert request.overrides == (f"backbone.source={source}", "nonsense")


def test_a_request_moves_with_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in the output folder, the default one or a named one, and the file of settings are where that is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    first, _ = create_run(Request("shapes-unet", "mine.yaml"), Path("runs"))
    second, _ = create_run(Request("shapes-unet", store="file://runs/artifacts"), Path("runs"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    monkeypatch.chdir("/")

    request = load_run(first, tmp_path / "moved", {})
    assert request.store_url(tmp_path / "moved") == f"file://{tmp_path}/moved/store"
    assert Path(request.config).read_text() == "seed: 3\n"
    assert load_run(second, tmp_path / "moved", {}).store == f"file://{tmp_path}/moved/artifacts"


def test_a_request_from_before_is_read(tmp_path: Path) -> None:
    """Earlier versions named the copy of the settings by a path relative to the folder that they were called from."""
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "given-config.yaml").write_text("seed: 4\n")
    fields = {"recipe": "shapes-unet", "config": "runs/old/given-config.yaml", "overrides": [], "store": ""}
    (folder / "request.json").write_text(json.dumps(fields | {"way": "processes"}))
    assert load_run("old", tmp_path, {}).config == str(folder / "given-config.yaml")


@pytest.mark.parametrize("named", [True, False])
def test_code_of_ones_own_is_kept_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """A package, or a folder of modules: the run has a copy that is the same to it, whatever becomes of the original;
    the same code may be named again, other code is refused."""
    code = tmp_path / "mine"
    code.mkdir()
    (code / "rewards.py").write_text("x = 1\n")
    if named:
        (code / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    before = packages.pack(code)
    run, request = create_run(Request("shapes-unet", package="mine"), Path("runs"))
    assert packages.pack(Path(request.package)) == before
    load_run(run, Path("runs"), {"package": "mine"})
    (code / "rewards.py").write_text("x = 2\n")
    with pytest.raises(ConfigError, match="--package"):
        load_run(run, Path("runs"), {"package": "mine"})
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert packages.pack(Path(load_run(run, tmp_path / "moved", {}).package)) == before


def test_options_may_be_repeated_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ones agree, typed as before or from another folder; a file that differs is refused."""
    monkeypatch.chdir(tmp_path)
    prompts(tmp_path / "p.json")
    (tmp_path / "mine.yaml").write_text("seed: 3\nprompts: {source: p.json}\n")
    overrides = ("prompts.source=p.json",)
    run, _ = create_run(Request("shapes-unet", "mine.yaml", overrides, "file://s"), Path("runs"))
    load_run(run, Path("runs"), {"config": "mine.yaml", "overrides": overrides, "store": "file://s"})
    (tmp_path / "mine.yaml").write_text("seed: 5\n")
    with pytest.raises(ConfigError, match="--config"):
        load_run(run, Path("runs"), {"config": "mine.yaml"})


@pytest.mark.parametrize("content", ['{"recipe": ', "[" * 100_000, '{"recipe": "\\ud800", "overrides": []}', "[]"])
def test_a_damaged_request_is_one_message(tmp_path: Path, content: str) -> None:
    """A file that was cut off by a full disk, say, or that somebody else wrote."""
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "request.json").write_text(content)
    failed = latentac(tmp_path, "run", "--resume", "cut", "--output", ".")
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "its request.json cannot be read" in failed.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "its content is \\[\\]"),
        ("null", "its content is None"),
        ('{"recipe": 5}', "recipe is 5"),
        ('{"recipe": "a", "overrides": [5]}', "overrides.0 is 5"),
        ('{"recipe": "a", "config": {"b": 1}}', "config is {'b': 1}"),
        ('{"recipe": "a", "way": "elsewhere"}', "way is 'elsewhere'"),
        ('{"overrides": []}', "it has no field recipe"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_request_of_another_shape_is_one_error(tmp_path: Path, content: str, expected: str) -> None:
    """It names the field and its value."""
    (tmp_path / "request.json").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        read_request(tmp_path)


# The dry run


def test_a_dry_run_says_settings_steps_and_needs_and_writes_nothing(tmp_path: Path) -> None:
    """Nothing in the working folder, nor in the output, nor in the store."""
    arguments = [
        "run",
        "--dry-run",
        "--recipe",
        "shapes-unet-smoke",
        "--seed",
        "7",
        "--project",
        "mine",
        "--output",
        "out",
        "--gpu",
        "a100",
        "--gpu-price",
        "2",
    ]
    found = latentac(tmp_path, *arguments)

    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert "seed: 7" in found.stdout
    assert "\nproject: mine" in found.stdout
    assert "learning_rate: 0.0001" in found.stdout
    for step in ("prepare", "pretrain-value", "train", "evaluate", "steer", "gate", "deploy", "finish"):
        assert f" {step}" in found.stdout
    assert re.search(r"^needs    disk: \d+ MiB \(base \d+ MiB", found.stdout, re.M)
    assert re.search(r"^         memory \(\w+\): \d+ MiB .* in each of 2 workers$", found.stdout, re.M)
    assert re.search(r"^         compute: [\d.]+ \wFLOP \(pretrain-value ", found.stdout, re.M)
    assert re.search(r"^         time on one a100: about \S+ h at 15% of its 312 TFLOP/s$", found.stdout, re.M)
    assert re.search(r"^         cost: about \S+ at 2 per GPU-hour$", found.stdout, re.M)
    assert "max_clip_share" not in found.stdout  # a setting that has its default
    assert everything(tmp_path) == {}


def test_a_dry_run_says_all_refusals_at_once(tmp_path: Path) -> None:
    """Of the settings, the prompts, the backbone, the output and the store, with exit code 2; nothing is written."""
    (tmp_path / "file").touch()
    before = everything(tmp_path)
    bad = ["--set", "backbone.source=./none", "--set", "prompts.source=none.json", "--set", "algorithm.use=pppo"]
    found = latentac(tmp_path, "run", "--dry-run", *bad, "--output", "file/x", "--store", f"file://{tmp_path}/file")

    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    for words in ("./none", "none.json", "pppo", "file/x", "--store"):
        assert f"{words}" in found.stderr, words
    assert all(line.startswith("refused: ") for line in found.stderr.splitlines())
    assert everything(tmp_path) == before


def test_a_dry_run_of_wrong_fields_names_each(tmp_path: Path) -> None:
    """No settings come of them, and no estimate; what is wrong beside them is told too."""
    found = latentac(
        tmp_path, "run", "--dry-run", "--set", "polcy=1", "--set", "seed=x", "--store", "ftp://x", "--output", "o"
    )
    assert found.returncode == 2
    assert [words for words in ("polcy", "seed", "store") if words not in found.stderr] == []
    assert everything(tmp_path) == {}


ENDS = {
    "by an exit code": ("os._exit(3)", "", "reward mine, prompt '.*ended with exit code 3"),
    "as if all were well": ("os._exit(0)", "", "reward mine, prompt '.*ended with exit code 0"),
    "by a signal": ("ctypes.string_at(0)", "", "reward mine, prompt '.*was killed by SIGSEGV"),
    "where it is imported": ("pass", "os._exit(0)", "one of your classes ended the process that tried it"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("call", "module", "words"), ENDS.values(), ids=ENDS)
def test_a_dry_run_survives_a_reward_that_ends_the_process(tmp_path: Path, call: str, module: str, words: str) -> None:
    """What a run would report of it is a refusal like any other: the settings and the steps are told all the same."""
    code = f"import ctypes, os\n{module}\nclass Mine:\n    def __call__(self, images, prompts):\n        {call}\n"
    (tmp_path / "mine.py").write_text(code)
    before = everything(tmp_path)
    mine = ["--set", "rewards=[{use: 'mine:Mine', name: mine}]", "--set", "gate.reward=mine"]
    found = latentac(tmp_path, "run", "--dry-run", "--recipe", "shapes-unet-smoke", *mine)
    assert found.returncode == 2, found.stderr
    assert re.search(f"^refused: {words}", found.stderr, re.M), found.stderr
    assert "Traceback" not in found.stderr
    assert "  1 prepare" in found.stdout
    assert "mine:Mine" in found.stdout
    assert everything(tmp_path) == before


# Moved and resumed


def start(folder: Path, *arguments: str) -> Driver:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = folder / f"{time.time_ns()}.log"
    with log.open("wb") as file:
        command = [PROGRAM, "run", *arguments]
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    return Driver(process, log)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_killed_and_moved_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """kill -9 in training, everything moved, the sources gone, another working folder: bitwise the same weights. The
    state is right at each point."""
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home, away):
        folder.mkdir()
        prompts(folder / "mine.json"), model(folder / "base")
        (folder / "mine.yaml").write_text("prompts: {source: mine.json}\n")
    options = [*OPTIONS, "--config", "mine.yaml", "--set", "backbone.source=base", "--output", "out"]
    for step, given in (("prepare", options), ("pretrain-value", ["--output", "out"]), ("train", ["--output", "out"])):
        undisturbed = latentac(home, step, "--run", "undisturbed", *given)
        assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr

    driver = start(away, *options)
    run = run_id(driver)
    come_to(driver, "train", 2, away / "out", run)
    assert state(away / "out", run) == ("running", "train")
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.process.wait(60)
    time.sleep(2)
    assert state(away / "out", run) == ("stopped", "train")
    moved = tmp_path / "quite" / "elsewhere"
    moved.parent.mkdir()
    (away / "out").rename(moved)
    for name in ("mine.yaml", "mine.json", "base"):
        path = away / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    resumed = latentac(Path("/"), "run", "--resume", str(moved / run))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert not (away / "out").exists()
    assert state(moved, run) == ("done", "")
    trained = [open_store(f"file://{home}/out/store").manifest("undisturbed/train")]
    trained.append(open_store(f"file://{moved}/store").manifest(f"{run}/train"))
    assert weights(trained[0]) == weights(trained[1])


def state(output: Path, run: str) -> tuple[str, str]:
    listed = json.loads(latentac(output, "runs", "--json", "--output", str(output)).stdout)
    return next((found["state"], found["step"]) for found in listed if found["run"] == run)

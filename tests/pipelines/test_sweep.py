"""`latentac sweep`: what its grid means, what it refuses, and that it goes through all members, whatever one does."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentac.pipelines.__main__ import SETTINGS
from latentac.pipelines.grid import Member, Sweep, load, members, read_axis, read_seeds
from latentac.pipelines.request import Request, absolute, load_run, packed, with_copies
from latentac.runs.cli import main
from latentac.runs.configuration import recipe_fields
from latentac.system.errors import ConfigError
from latentac.system.steps import NAMES as STEPS
from tests.latentac.published import publish_until
from tests.pipelines.kfp_server import Frame, serving

SMALL = [
    "kernel.num_steps=2",
    "pretrain={num_images: 8, num_held_out_images: 8, num_passes: 1, minibatch_states: 8}",
    "train={num_iterations: 2, images_per_iteration: 4, block_images: 2, updates_per_iteration: 2, num_workers: 1}",
    "evaluation={num_images: 8, num_gallery_prompts: 2, num_diversity_prompts: 2, images_per_prompt: 2}",
    "steering.num_images=8",
    "rewards=[{use: jpeg_compressibility}]",
    "gate={reward: jpeg_compressibility, min_gain: 100.0}",
]


def sweep(folder: Path, *arguments: str) -> int:
    return main(["sweep", "--recipe", "shapes-unet-smoke", "--output", str(folder / "runs"), *arguments])


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "latentac.runs.cli", "sweep", "--output", str(folder / "runs"), *arguments]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("policy.learning_rate=1e-4,2e-4", [1e-4, 2e-4]),
        ("policy.learning_rate=[1e-4, 2e-4]", [1e-4, 2e-4]),
        ("policy.adaptation=full,lora", ["full", "lora"]),
        ("steering.methods=[[{use: svdd}], [{use: twisted}]]", [[{"use": "svdd"}], [{"use": "twisted"}]]),
        ("steering.methods=[{use: svdd}],[{use: twisted}]", [[{"use": "svdd"}], [{"use": "twisted"}]]),
        ("train.early_stopping=null,{reward: x}", [None, {"reward": "x"}]),
        ("train.num_iterations=3", [3]),
    ],
)
def test_an_axis_is_a_list_of_values(text: str, values: list[object]) -> None:
    """With commas, or as a YAML list; a value that is a list itself stands in one."""
    assert read_axis(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize("text", ["policy.learning_rate", "=1,2", "a b=1", "policy.learning_rate=", "x=[1,", "x=[]"])
def test_what_is_no_axis_is_refused(text: str) -> None:
    """With an example of how to write it."""
    with pytest.raises(ConfigError, match=r"Write for example --grid policy.learning_rate=1e-4,2e-4"):
        read_axis(text)


def test_seeds_are_a_list_or_a_range() -> None:
    """Each once, in the order given."""
    assert read_seeds("0,1,2") == [0, 1, 2]
    assert read_seeds("0-2, 7,1") == [0, 1, 2, 7]
    for wrong in ("", "a", "3-1", "-1", "1.5"):
        with pytest.raises(ConfigError, match="are not seeds"):
            read_seeds(wrong)


def test_members_are_all_points_with_all_seeds() -> None:
    """The seeds of a point follow each other; the words of a point are its values."""
    found = members(["policy.learning_rate=1e-4,2e-4", "policy.adaptation=full,lora"], [0, 1])
    assert len(found) == 8
    assert found[1].point == "policy.learning_rate=0.0001, policy.adaptation=full"
    assert found[1].overrides == ["policy.learning_rate=0.0001", 'policy.adaptation="full"', "seed=1"]
    assert [member.seed for member in found] == [0, 1] * 4
    assert members([], [3])[0].point == "as configured"
    with pytest.raises(ConfigError, match="seed"):
        members(["seed=1,2"], [0])
    with pytest.raises(ConfigError, match="is swept twice"):
        members(["kernel.noise=0.5", "kernel.noise=1.0"], [0])


def test_a_dry_run_lists_the_members_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a member, before anything is made."""
    assert sweep(tmp_path, "--grid", "kernel.num_steps=4,6", "--seeds", "0,1", "--set", "seed=9", "--dry-run") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "4 members on this machine: recipe shapes-unet-smoke, seed=9"
    assert shown[2:] == [f"    {n}  kernel.num_steps={k}, seed {s}" for n, k, s in ((2, 4, 1), (3, 6, 0), (4, 6, 1))]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "kernel.num_steps=4,1,zero"], ["kernel.num_steps = 1:", "kernel.num_steps = 'zero':"]),
        (["--grid", "kernel.num_step=4"], ['Did you mean "num_steps"?']),
        (["--release", "latentac"], ["--host = None: no API of Kubeflow Pipelines is named"]),
        (["--name", "../x"], ["cannot be the name of a new sweep"]),
        (["--parallel", "0"], ["--parallel = 0: is not from 1 to 1000"]),
        (["--name", "x" * 300], ["cannot be the name of a new sweep"]),
        (["--name", ""], ["cannot be the name of a new sweep"]),
        (["--name", "store"], ["cannot be the id of a run"]),
        (["--seeds", "0-99999999999"], ["are not seeds"]),
        (["--seeds", "0-4999", "--grid", "kernel.num_steps=4,5,6"], ["gives 15000 members"]),
        (["--resume", "../x"], ["no such sweep"]),
        (["--resume", ""], ["no such sweep"]),
        (["--resume", "nothing"], ["no such sweep"]),
    ],
)
def test_what_is_wrong_is_reported_before_a_member_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    """Of all members together, exit code 2, and nothing is left behind."""
    assert sweep(tmp_path, *arguments) == 2
    output = capsys.readouterr().err
    assert all(word in output for word in words), output
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    """With the state of each member; a file that is none is an integrity error, not a traceback."""
    made = Sweep("s", Request("r", overrides=("a=1",)), [], [Member("p", 0, ["seed=0"], "run-1", "failed", 7)])
    made.save(tmp_path)
    assert load("s", tmp_path) == made
    for content in ("{}", "[" * 100_000, '{"name": "\\ud800"}', "7"):
        (tmp_path / "s" / "sweep.json").write_text(content)
        assert main(["sweep", "--resume", "s", "--output", str(tmp_path)]) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_member_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are tried, the reason of each is told with its log, the exit code is the first one's; a resume tries again
    those that are not done, and only those."""
    grid = f"prompts.source={tmp_path}/one.json,{tmp_path}/two.json"
    assert sweep(tmp_path, "--name", "failing", "--grid", grid, "--parallel", "2") == 2
    output = capsys.readouterr().out
    assert output.count("failed after") == 2
    assert "2 failed" in output
    assert f"latentac sweep --resume failing --output {tmp_path}/runs" in output
    assert "fewer than two runs have published anything" in output
    state = load("failing", tmp_path / "runs")
    assert [(member.state, member.exit_code) for member in state.members] == [("failed", 2)] * 2
    log = tmp_path / "runs" / "failing" / f"{state.members[0].run}.log"
    assert "one.json" in log.read_text()

    state.members[0].state = "done"
    state.save(tmp_path / "runs")
    assert sweep(tmp_path, "--resume", "failing") == 2
    output = capsys.readouterr().out
    assert "[1/2]" not in output
    assert output.count("failed after") == 1


def test_a_moved_sweep_finds_its_files(tmp_path: Path) -> None:
    """Its copies of the file of settings and of the package, and a store beside it, move with the output folder; a
    store elsewhere stays where it is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    output = tmp_path / "runs"
    asked = absolute(
        Request("r", str(tmp_path / "mine.yaml"), (), f"file://{output}/store", package=str(tmp_path / "mine"))
    )
    made = Sweep("s", with_copies(asked, output / "s", packed(asked)), [])
    made.save(output)
    assert load("s", output) == made
    moved = tmp_path / "elsewhere" / "runs"
    moved.parent.mkdir()
    output.rename(moved)
    found = load("s", moved).request
    assert Path(found.config).read_text() == "seed: 3\n"
    assert (Path(found.config).name, Path(found.package).name) == ("mine.yaml", "mine")
    assert (Path(found.package) / "__init__.py").is_file()
    assert found.store == f"file://{moved}/store"
    Sweep("t", Request("r", store="file:///data/store"), []).save(moved)
    assert load("t", moved).request.store == "file:///data/store"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_members_have_your_code_and_the_name_of_your_file(tmp_path: Path) -> None:
    """A package and relative places are those of the folder where the sweep began; the project is the file's name."""
    (tmp_path / "code" / "mine").mkdir(parents=True)
    (tmp_path / "code" / "mine" / "__init__.py").touch()
    broken = "class Broken:\n    def __call__(self, images, prompts):\n        raise ValueError('the scorer is away')\n"
    (tmp_path / "code" / "mine" / "rewards.py").write_text(broken)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\na green circle\n")
    settings = "prompts: {source: prompts.txt}\nrewards: [{use: 'mine.rewards:Broken', name: broken}]\n"
    (tmp_path / "mine.yaml").write_text(settings + "gate: {reward: broken}\n")
    words = command(tmp_path, "--name", "own", "--recipe", "shapes-unet-smoke", "--config", "mine.yaml")
    done = subprocess.run([*words, "--package", "code/mine"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stdout + done.stderr
    (member,) = load("own", tmp_path / "runs").members
    assert "the scorer is away" in (tmp_path / "runs" / "own" / f"{member.run}.log").read_text()
    request = load_run(member.run, tmp_path / "runs", {})
    fields = recipe_fields(request.recipe, request.config, request.overrides)
    assert fields["project"] == "mine"
    assert fields["prompts"]["source"] == str(tmp_path / "prompts.txt")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_ends_in_the_page_with_seeds_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds at one point, real runs of the smallest size, and a point that cannot start: the page has them all."""
    settings = [word for assignment in SMALL for word in ("--set", assignment)]
    grid = f"prompts.source=builtin:shapes,{tmp_path}/none.json"
    assert sweep(tmp_path, "--name", "two", "--grid", grid, "--seeds", "0,1", "--parallel", "2", *settings) == 2
    output = capsys.readouterr().out
    assert "2 done, 2 failed" in output
    assert "prompts.source=builtin:shapes (2 seeds)" in output
    content = json.loads((tmp_path / "runs" / "two" / "compare.json").read_text())
    (series,) = content["series"]
    assert [run["seed"] for run in series["runs"]] == [0, 1]
    assert content["rewards"][0]["series"][0]["trained"]["n"] == 2
    assert content["rewards"][0]["series"][0]["over"] == "seeds"
    assert (tmp_path / "runs" / "two" / "compare.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_that_is_stopped_leaves_nothing_running_and_can_go_on(tmp_path: Path) -> None:
    """SIGTERM while a member works: it is stopped too, waits for the next start, and the command for that is told."""
    running = subprocess.Popen(
        command(tmp_path, "--name", "stopped", "--recipe", "shapes-unet-smoke", "--seeds", "0,1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    state, deadline = tmp_path / "runs" / "stopped" / "sweep.json", time.monotonic() + 120
    run = ""
    while time.monotonic() < deadline:
        time.sleep(0.3)
        run = json.loads(state.read_text())["members"][0]["run"] if state.exists() else ""
        log = tmp_path / "runs" / "stopped" / f"{run}.log"
        if run and log.exists() and "[1/" in log.read_text():
            break
    running.send_signal(signal.SIGTERM)
    _, reported = running.communicate(timeout=60)
    assert running.returncode == 130
    assert f"resume with: latentac sweep --resume stopped --output {tmp_path}/runs" in reported
    found = load("stopped", tmp_path / "runs").members
    assert [(member.state, bool(member.run)) for member in found] == [("waiting", True), ("waiting", False)]
    deadline = time.monotonic() + 20
    while alive := [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and run in _command_of(pid)]:
        assert time.monotonic() < deadline, [_command_of(pid) for pid in alive]
        time.sleep(0.3)


def _command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_members_run_on_a_cluster_where_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is submitted with its own id and settings and followed to its end; the page is made from their store."""
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")
    for seed in (1, 2):
        publish_until(tmp_path, "gate", run=f"far-0{seed}")
    with serving() as kfp:
        kfp.script = [Frame("SUCCEEDED", dict.fromkeys(STEPS, "SUCCEEDED"))]
        place = ["--host", kfp.url, "--cluster-settings", str(SETTINGS), "--store", f"file://{tmp_path}/runs/store"]
        assert sweep(tmp_path, "--name", "far", "--seeds", "0,1", "--grid", "kernel.num_steps=4", *place) == 0
        given = [run["runtime_config"]["parameters"] for run in kfp.runs.values()]
    assert [parameters["run"] for parameters in given] == ["far-01", "far-02"]
    assert given[1]["overrides"] == ["kernel.num_steps=4", "seed=1"]
    assert given[1]["recipe"] == "shapes-unet-smoke"
    output = capsys.readouterr().out
    assert "2 done" in output
    assert "kernel.num_steps=4 (2 seeds)" in output
    assert str(tmp_path / "runs" / "far" / "compare.html") in output

"""A reward, an algorithm, a backbone and a critic's body that stand outside the package, by name alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentac.runs.package import digest, pack
from latentac.runs.steps import evaluate, gate, prepare, steer
from latentac.system.errors import ConfigError
from tests.latentac.test_incumbent import start
from tests.latentac.workers import prepared, train_here

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.latentac.extensions"
ADDED = {
    "reward": [f"rewards=[{{use: {HERE}:Warmth}}]", "gate.reward=Warmth"],
    "algorithm": [f"algorithm.use={HERE}:Reinforce", "train.divergence.max_kl=100.0"],
    "backbone": [f"backbone.use={HERE}:Backwards"],
    "critic": [f"critic.body.use={HERE}:Mean"],
}


@pytest.mark.parametrize("kind", ADDED)
def test_what_is_added_from_outside_is_checked_pretrained_and_trained(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the package knows it: named as `module:Class`, it passes `prepare`, its critic is pretrained, and two
    iterations are trained and published."""
    space = prepared(tmp_path, *ADDED[kind])
    assert train_here(tmp_path, monkeypatch) == (0, "")
    manifest = space.finished("train")
    assert manifest is not None
    last = manifest.metrics["last"]
    assert last["iteration"] == 2
    assert last["gradient_norm"] > 0
    assert ("value_loss" in last) == (kind != "algorithm")
    if kind == "reward":
        assert list(last["rewards"]) == ["Warmth"]
    assert space.trained_policy().backbone.latent_shape == (4, 8, 8)


@pytest.mark.slow
def test_a_reward_has_one_name_from_the_first_step_to_the_last(tmp_path: Path) -> None:
    """The configured one, whatever its class says of itself; two entries of one class are two rewards."""
    named = f"rewards=[{{use: {HERE}:Warmth, name: warm}}, {{use: {HERE}:Warmth, name: again, weight: 0}}]"
    space = start(tmp_path, "named", named, "gate.reward=warm")
    place = ("named", "", str(tmp_path))
    evaluate(*place)
    steer(*place)
    gate(*place)
    evaluation = json.loads((space.artifact("evaluate") / "evaluation.json").read_text())
    assert [list(evaluation[arm]) for arm in ("base", "trained", "difference")] == [["warm", "again"]] * 3
    assert evaluation["units"] == dict.fromkeys(("warm", "again"), "grey levels of red above blue")
    rows = json.loads((space.artifact("steer") / "steering.json").read_text())
    assert {row["reward"] for row in rows} == {"warm", "again"}
    decision = json.loads((space.artifact("gate") / "gate.json").read_text())
    assert "warm" in decision["reasons"][0]


@pytest.mark.slow
def test_code_of_ones_own_is_found_and_its_hash_is_recorded(tmp_path: Path) -> None:
    """In the working folder, or in a folder that is named; what is published tells which code it was."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    code = "class Bright:\n    def __call__(self, images, prompts):\n        return images.mean((1, 2, 3))\n"
    (tmp_path / "mine" / "rewards.py").write_text(code)
    settings = ["--set", 'rewards=[{use: "mine.rewards:Bright"}]', "--set", "gate.reward=Bright"]

    def prepared_by(program: list[str], run: str, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [*program, "prepare", "--run", run, "--recipe", "shapes-unet-smoke", *settings, *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}  # as an installed program finds it
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    program = [sys.executable, "-m", "latentac.runs.cli"]
    found = prepared_by(program, "here")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["metrics"]["given"]["package"] == ""
    (tmp_path / "mine").rename(tmp_path / "elsewhere")
    assert prepared_by(program, "lost").returncode == 2
    (tmp_path / "code").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "code" / "mine")
    found = prepared_by(program, "named", "--package", "code/mine")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["metrics"]["given"]["package"] == digest(pack(tmp_path / "code" / "mine"))
    (tmp_path / "code" / "mine" / "rewards.py").write_text(code + "\n")
    assert "exists with another configuration" in prepared_by(program, "named", "--package", "code/mine").stderr


@pytest.mark.parametrize("path", ["backbone.use", "algorithm.use", "critic.body.use", "kernel.use"])
def test_a_module_that_ends_itself_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without a guard: the command must not end as if all were done."""
    (tmp_path / "a_script.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"{path} = 'a_script:Own': cannot be imported \(SystemExit: 0\)"):
        prepare("r", "", str(tmp_path), "shapes-unet-smoke", overrides=[f"{path}=a_script:Own"])


@pytest.mark.parametrize("path", ["backbone.use", "algorithm.use", "critic.body.use"])
def test_a_name_of_no_table_and_no_module_is_refused(path: str, tmp_path: Path) -> None:
    """Before anything runs, with the field, and how to name one's own."""
    with pytest.raises(ConfigError, match=rf"{path} = 'nothing': no such .*Your own: module:Class"):
        prepare("r", "", str(tmp_path), "shapes-unet-smoke", overrides=[f"{path}=nothing"])

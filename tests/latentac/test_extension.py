"""A reward, an algorithm, a backbone and a critic's body that stand outside the package, by name alone."""

from pathlib import Path

import pytest

from latentac.errors import ConfigError
from latentac.run import prepare
from tests.latentac.workers import prepared, train_here

HERE = "tests.latentac.extensions"
ADDED = {
    "reward": [f"rewards=[{{use: {HERE}:Warmth}}]", "gate.reward=Warmth"],
    "algorithm": [f"algorithm.use={HERE}:Reinforce", "train.guard.max_kl=100.0"],
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

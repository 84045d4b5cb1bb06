"""YAML that a person writes: a key that stands there twice is a mistake, and is told with its lines."""

from pathlib import Path

import pytest

from components.cluster.settings import read
from latentac.errors import ConfigError
from latentac.fields import read_file, read_overrides, read_yaml
from pipelines.__main__ import SETTINGS


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "seed: 1\ntrain: {num_iterations: 2}\nseed: 2\n", "has the key 'seed' twice, in lines 1 and 3"),
        ("a.yaml", "train:\n  num_workers: 1\n  num_workers: 1\n", "'num_workers' twice, in lines 2 and 3"),
        ("a.yaml", "rewards:\n- {name: a}\n- name: b\n  weight: 1\n  name: c\n", "'name' twice, in lines 3 and 5"),
        ("a.json", '{"seed": 1,\n "seed": 2}', "'seed' twice, in lines 1 and 2"),
        ("a.yaml", "train: {1: a, 1: b}\n", "has the key 1 twice, in line 1"),
        ("a.yaml", "'seed': 1\nseed: 2\n", "'seed' twice, in lines 1 and 2"),
    ],
)
def test_a_file_with_a_key_twice_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    """At every depth, in JSON too, and also where both say the same."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_file(tmp_path / name)
    assert words in str(caught.value)
    assert "Keep one of them." in str(caught.value)


def test_a_value_of_set_with_a_key_twice_is_refused() -> None:
    """The assignment is named; two assignments of one field are no mistake, the later counts."""
    with pytest.raises(ConfigError, match=r"--set = 'train=.*has the key 'num_workers' twice"):
        read_overrides(["train={num_workers: 1, num_workers: 2}"])
    assert read_overrides(["seed=1", "seed=2"]) == {"seed": 2}


def test_merge_keys_and_anchors_still_work() -> None:
    """What a mapping takes over it may say anew: that is what merging is for."""
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert read_yaml(text)["b"] == {"x": 1, "y": 3}


def test_a_clusters_settings_with_a_key_twice_are_refused(tmp_path: Path) -> None:
    """cluster.yaml is the chart's, and a person may have changed it."""
    text = SETTINGS.read_text()
    (tmp_path / "cluster.yaml").write_text(text)
    assert read(tmp_path / "cluster.yaml") == read(SETTINGS)
    (tmp_path / "cluster.yaml").write_text(f"{text}\nnamespace: other\n")
    with pytest.raises(ConfigError, match=r"cluster.yaml.*has the key 'namespace' twice, in lines \d+ and \d+"):
        read(tmp_path / "cluster.yaml")


@pytest.mark.parametrize(
    ("value", "words"),
    [("9" * 5000, "is not YAML"), ("[" * 3000, "nested too deep"), ("{a: &x [1], b: *y}", "is not YAML")],
)
def test_a_value_that_cannot_be_read_is_one_short_message(value: str, words: str, tmp_path: Path) -> None:
    """In a file and in --set alike, whatever the parser raises."""
    (tmp_path / "mine.yaml").write_text(f"seed: {value}\n")
    for reading in (lambda: read_overrides([f"seed={value}"]), lambda: read_file(tmp_path / "mine.yaml")):
        with pytest.raises(ConfigError, match=words) as caught:
            reading()
        assert len(str(caught.value)) < 1200


def test_a_file_in_another_encoding_is_told_as_such(tmp_path: Path) -> None:
    """With what converts it."""
    (tmp_path / "mine.yaml").write_text("seed: 3\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text .*iconv"):
        read_file(tmp_path / "mine.yaml")

"""YAML that a person writes: a key that stands there twice is a mistake, and is told with its lines."""

from pathlib import Path

import pytest

from latentac.components.cluster.settings import read
from latentac.config.fields import read_file, read_overrides, read_yaml
from latentac.config.recipes import RECIPES
from latentac.config.validation import resolve
from latentac.pipelines.__main__ import SETTINGS
from latentac.runs.configuration import recipe_fields
from latentac.runs.resolution import resolve_all
from latentac.system.errors import ConfigError


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
    """The assignment is named; two assignments of one field are not a mistake, the later counts."""
    with pytest.raises(ConfigError, match=r"--set = 'train=.*has the key 'num_workers' twice"):
        read_overrides(["train={num_workers: 1, num_workers: 2}"])
    assert read_overrides(["seed=1", "seed=2"]) == {"seed": 2}


def test_merge_keys_and_anchors_still_work() -> None:
    """What a mapping takes over it may say anew: that is what merging is for."""
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert read_yaml(text)["b"] == {"x": 1, "y": 3}
    assert read_yaml(f"{text}c: {{<<: *a, z: 4}}\nd: [*a, *a]\n")["d"] == [{"x": 1, "y": 2}] * 2


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
    [("9" * 5000, "number of 5000"), ("[" * 3000, "nested too deep"), ("{a: &x [1], b: *y}", "is not YAML")],
)
def test_a_value_that_cannot_be_read_is_one_short_message(value: str, words: str, tmp_path: Path) -> None:
    """In a file and in --set alike, whatever the parser raises."""
    (tmp_path / "mine.yaml").write_text(f"seed: {value}\n")
    for reading in (lambda: read_overrides([f"seed={value}"]), lambda: read_file(tmp_path / "mine.yaml")):
        with pytest.raises(ConfigError, match=words) as caught:
            reading()
        assert len(str(caught.value)) < 1200


def bomb(item: str, level: str, levels: int = 11) -> str:
    """A few lines that stand for 9 ** levels values. level: of one anchor, with the one before it for {}."""
    lines = [f"a0: &a0 {item}"]
    lines += [f"a{number}: &a{number} {level.replace('{}', f'*a{number - 1}')}" for number in range(1, levels + 1)]
    return "\n".join(lines)


NINE = ", ".join(["{}"] * 9)
HOSTILE = {
    "a list of lists of lists": (bomb("[x]", f"[{NINE}]"), "written out, are more than"),
    "a mapping of mappings": (bomb("{k: x}", "{" + ", ".join(f"k{n}: {{}}" for n in range(9)) + "}"), "written out"),
    "merges of merges": (bomb("{k: x}", f"{{<<: [{NINE}]}}"), "written out"),
    "one long text, often": (f"a: &a {'y' * 10000}\nb: [{', '.join(['*a'] * 200)}]", "written out"),
    "an anchor in itself": ("seed: &a [*a]", "holds itself"),
    "a mapping in itself": ("train: &a {x: *a}", "holds itself"),
    "nested lists": (f"seed: {'[' * 100_000}", "nested too deep"),
    "nested lists that close": (f"seed: {'[' * 60}{']' * 60}", "nested too deep"),
    "nested mappings": (f"seed: {'{a: ' * 60_000}", "nested too deep"),
    "nested entries": (f"seed:\n  {'- ' * 50_000}1", "nested too deep"),
    "anchors as deep": (bomb("[x]", "[{}]", 60), "nested too deep"),
    "a large file": ("# " + "x" * 300_000, "more than 262144 characters"),
    "many digits": ("seed: " + "9" * 4000, "a number of 4000 characters"),
    "many hexadecimal digits": ("seed: 0x" + "f" * 4000, "a number of 4002 characters"),
    "many binary digits": ("seed: 0b" + "1" * 90_000, "a number of 90002 characters"),
    "many sexagesimal digits": ("seed: 1" + ":59" * 30_000, "a number of 90001 characters"),
    "no whole number": ("seed: !!int x", "is not what it says"),
    "an empty number": ("seed: !!float ''", "is not what it says"),
    "no truth": ("seed: !!bool x", "is not what it says"),
    "no date": ("seed: !!timestamp x", "is not what it says"),
    "a long tag": (f"seed: !{'x' * 100_000} 1", "could not determine a constructor"),
    "no such day": ("seed: 2001-99-99", "is not what it says"),
    "no bytes": ("seed: !!binary a", "failed to decode base64"),
    "an object of Python": ("seed: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "half a character": ('recipe: "a\\ud800"', r"has the character '\\ud800', in line 1"),
    "half a character in a key": ('"a\\ud800": 1', r"has the character '\\ud800'"),
    "an escape character": ('"\\e[31mred": 1', r"has the character '\\x1b'"),
    "a zero": ('recipe: "a\\0b"', r"has the character '\\x00'"),
    "no character": ('recipe: "\\UFFFFFFFF"', "is not YAML"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_at_once(text: str, words: str, tmp_path: Path) -> None:
    """In seconds, with one short message: in a file of settings, in a value, and in a cluster's settings."""
    (tmp_path / "a.yaml").write_text(text)
    readings = [lambda: read_file(tmp_path / "a.yaml"), lambda: read(tmp_path / "a.yaml")]
    if text.startswith("seed:"):
        readings.append(lambda: read_overrides([f"seed={text.removeprefix('seed:')}"]))
    for reading in readings:
        with pytest.raises(ConfigError, match=words) as caught:
            reading()
        assert len(str(caught.value)) < 1200


@pytest.mark.timeout(20)
def test_a_file_that_is_wrong_throughout_is_a_page_of_problems() -> None:
    """Not a book: neither of lines, nor in one."""
    for fields in ({f"k{number}": 1 for number in range(2_000)}, {"k" * 200_000: "v" * 200_000}):
        with pytest.raises(ConfigError) as caught:
            resolve_all({**RECIPES["shapes-unet"], "train": fields})
        assert len(str(caught.value)) < 20_000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["seed=1" + " " * 120_000 + "x", "a." * 30_000 + "a=1", "a " * 60_000])
def test_a_hostile_assignment_is_refused_at_once(text: str) -> None:
    """White space without end, and a path as long as a book."""
    with pytest.raises(ConfigError):
        resolve(read_overrides([text]))


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize(
    "path",
    [
        "policy.learning_rate", "policy.ema_decay", "prompts.held_out_fraction", "critic.target_clip", "gate.min_gain",
        "gate.floors.shapes_verifier", "rewards.shapes_verifier.weight", "serving.ready_seconds", "algorithm.clip",
        "steering.methods.value_gradient.strength", "train.num_iterations", "seed",
    ],
)  # fmt: skip
def test_what_is_no_finite_number_is_refused(path: str, number: str) -> None:
    """In each kind of field, the framework's and the extensions'."""
    with pytest.raises(ConfigError) as caught:
        resolve_all(recipe_fields("shapes-unet", "", [f"{path}={number}"]))
    assert any(problem.path.split(".")[-1] == path.split(".")[-1] for problem in caught.value.problems)


def test_a_file_in_another_encoding_is_reported_as_such(tmp_path: Path) -> None:
    """With what converts it."""
    (tmp_path / "mine.yaml").write_text("seed: 3\n", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text .*iconv"):
        read_file(tmp_path / "mine.yaml")


@pytest.mark.parametrize("text", ["- seed\n", "3"])
def test_a_file_without_fields_is_reported_as_such(tmp_path: Path, text: str) -> None:
    """A list and a number are YAML too."""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="does not hold fields"):
        read_file(tmp_path / "mine.yaml")


def test_a_name_that_no_file_can_have_is_reported_as_such() -> None:
    """The parameter of a step is any text."""
    with pytest.raises(ConfigError, match="cannot be the name of a file"):
        read_file(Path("mine\0.yaml"))

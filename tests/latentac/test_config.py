"""The configuration: strict, complete, and every problem told at once with its path, value and remedy."""

import pytest

from latentac.config import Config, resolve
from latentac.errors import ConfigError
from latentac.fields import merge, read_file, read_overrides
from latentac.names import as_name, is_name
from latentac.recipes import RECIPES
from latentac.run import resolve_recipe


def resolved(*overrides: str) -> Config:
    return resolve(merge(RECIPES["shapes-unet"], read_overrides(overrides)))


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolved(*overrides)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_complete(name):
    """A recipe resolves as it is and carries its own name."""
    assert resolve(RECIPES[name]).recipe == name


def test_overrides_are_typed_and_nested():
    """Values are YAML; 1e-4 is a number, as everyone who types it means."""
    config = resolved("policy.learning_rate=1e-4", "seed=7", "steering.gradient_strengths=[0, 1.5]")
    assert (config.policy.learning_rate, config.seed, config.steering.gradient_strengths) == (1e-4, 7, [0, 1.5])
    assert config.hash != resolved().hash
    assert config.hash == resolved("seed=7", "steering.gradient_strengths=[0, 1.5]", "policy.learning_rate=0.0001").hash


def test_all_problems_come_at_once_with_path_value_and_remedy():
    """Unknown and misspelt fields, wrong types and missing fields, each with what to do."""
    found = problems("policy.learning_rat=1", "kernel.num_steps=ten", "zzz=1", "rewards=[{weight: 1.0}]")
    assert len(found) == 4
    text = "\n".join(found)
    assert 'policy.learning_rat = 1: unknown field. Did you mean "learning_rate"?' in text
    assert "kernel.num_steps = 'ten': input should be a valid integer" in text
    assert "zzz = 1: unknown field. Known: recipe, project, seed, backbone" in text
    assert "rewards.0.name = None: is required" in text


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["kernel.noise=0"], "kernel.noise", "deterministic"),
        (["algorithm={name: grpo, group_size: 1, value_guidance: 0}"], "algorithm.group_size", "at least 2"),
        (["algorithm={name: ddpo, value_guidance: 2}"], "algorithm.value_guidance", "has no critic"),
        (["train.early_stopping={reward: shapes_verifier}"], "train.early_stopping.reward", "rises to the end"),
        (["train.early_stopping={reward: nothing}"], "train.early_stopping.reward", "not a watched reward"),
        (["algorithm.baseline=group"], "algorithm.baseline", "'batch' or 'prompt'"),
        (["policy.ema_decay=1"], "policy.ema_decay", "less than 1"),
        (["critic.dropout=1"], "critic.dropout", "less than 1"),
        (["algorithm.clip=0"], "algorithm.clip", "greater than 0"),
        (["train.guard.rate_factor=2"], "train.guard.rate_factor", "less than or equal to 1"),
        (["algorithm.group_size=3"], "train.block_images", "multiple"),
        (["train.num_workers=3"], "train.images_per_iteration", "dealt evenly"),
        (["train.updates_per_iteration=1000"], "train.updates_per_iteration", "transitions of a block"),
        (["gate.reward=beauty"], "gate.reward", "none of this run's rewards"),
        (["rewards=[{name: shapes_verifier, weight: 0}]"], "rewards", "nothing to learn"),
        (["rewards=[{name: shapes_verifier}, {name: shapes_verifier}]"], "rewards", "twice"),
        (["critic.num_heads=7"], "critic.width", "multiple"),
        (["policy.learning_rate=-1"], "policy.learning_rate", "greater than 0"),
        (["policy.learning_rate=.nan"], "policy.learning_rate", "finite"),
        (["seed=-1"], "seed", "greater than or equal to 0"),
        (["seed=1.5"], "seed", "integer"),
    ],
)
def test_what_cannot_run_does_not_construct(overrides, path, words):
    """Impossible values and combinations name the field to change."""
    (problem,) = problems(*overrides)
    assert problem.startswith(f"{path} = ")
    assert words in problem


@pytest.mark.parametrize("assignment", ["seed", "=3", "a b=1", "seed=[1"])
def test_a_malformed_override_is_refused(assignment):
    """One message that shows the assignment."""
    with pytest.raises(ConfigError, match="--set"):
        read_overrides([assignment])


@pytest.mark.parametrize(
    ("content", "words"), [("a: [1", "is not YAML"), ("- 1", "does not hold fields"), (None, "cannot be read")]
)
def test_an_unusable_file_is_refused(tmp_path, content, words):
    """Missing, malformed, or of another shape."""
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_file(path)


def test_a_file_lies_between_recipe_and_overrides(tmp_path):
    """Merged field by field, in that order."""
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 3\npolicy:\n  learning_rate: 2e-5\n")
    fields = merge(merge(RECIPES["shapes-unet"], read_file(path)), read_overrides(["seed=4"]))
    config = resolve(fields)
    assert (config.seed, config.policy.learning_rate) == (4, 2e-5)
    assert config.policy.warmup_updates == resolved().policy.warmup_updates


def test_a_configuration_is_frozen():
    """Nothing changes under a run."""
    with pytest.raises(ValueError, match="frozen"):
        resolved().seed = 3


@pytest.mark.parametrize(
    ("overrides", "file", "project"),
    [
        ([], None, "shapes-unet"),
        (["seed=3", "train.num_iterations=2"], None, "shapes-unet"),
        (["recipe=trial of mine"], None, "trial-of-mine"),
        (["backbone.source=/models/my model/"], None, "shapes-unet-my-model"),
        (["gate.reward=jpeg_compressibility"], None, "shapes-unet-jpeg_compressibility"),
        ([], "seed: 3", "mine"),
        ([], "gate: {reward: jpeg_compressibility}", "mine"),
        (["gate.reward=jpeg_compressibility"], "seed: 3", "mine-jpeg_compressibility"),
        ([], "recipe: named in the file", "named-in-the-file"),
        ([], "project: theirs", "theirs"),
        (["project=ours", "backbone.source=elsewhere"], "project: theirs", "ours"),
    ],
)
def test_a_project_is_the_configurations_name(tmp_path, overrides, file, project):
    """Unless it is named: of the recipe or the file, and of what makes it another model than that."""
    path = tmp_path / "mine.yaml"
    path.write_text(file or "")
    assert resolve_recipe("shapes-unet", str(path) if file else "", overrides).project == project


@pytest.mark.parametrize("name", ["../x", ".hidden", "a b", "a/b", "", "files-1", "manifest.json", "x" * 101, "a\n"])
def test_a_project_that_is_no_name_is_refused(name):
    """It is a part of keys in the store, as a run's id is."""
    with pytest.raises(ConfigError, match=r"project = .*is no name\. Use letters"):
        resolve(RECIPES["shapes-unet"] | {"project": name})
    assert is_name(as_name(name))
